"""Load an experiment file with overrides into an `ExperimentConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orpo_ray.config import strict_yaml
from orpo_ray.config.candidates import with_coerced_space
from orpo_ray.config.experiment import ExperimentConfig, set_dotted, validated
from orpo_ray.config.problems import ConfigError

MAX_FILE_BYTES = 1 << 20
"""Maximum size of an experiment file."""


def load(path: str | Path, overrides: list[str] | None = None) -> ExperimentConfig:
    """Read an experiment file, apply `key.path=value` overrides, and check everything, including each sweep candidate.

    Args:
        path: YAML file.
        overrides: e.g. `["optim.lr=1e-5", "train.max_steps=100"]`; values are read as YAML.

    Raises:
        ConfigError: lists every broken rule with its path and value.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, too large for an experiment file; if it holds the data, "
            "give it as data.path"
        )
    try:
        tree = strict_yaml.read(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}; save it as UTF-8") from None
    except strict_yaml.NotPlain as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: an experiment file is a mapping (name, model, data, ...), got {type(tree).__name__}"
        )
    return parse(tree, overrides, source=str(path))


def parse(tree: dict[str, Any], overrides: list[str] | None = None, source: str = "config") -> ExperimentConfig:
    """Like `load`, for a file that has been read already.

    Args: tree: the content of the file. Overrides are set in it; nested mappings are copied first, as a YAML alias may
        have put one mapping in two places.

    Raises:
        ConfigError: lists every broken rule with its path and value.
    """
    try:
        strict_yaml.require_plain(tree)
    except strict_yaml.NotPlain as error:
        raise ConfigError(f"{source}: {error}") from None
    if tree.get("scaling") == "auto":
        tree["scaling"] = {"auto": True}  # so that an override can set one of its keys
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r}: write key.path=value, e.g. optim.lr=1e-5")
        if key.startswith("sweep.space."):
            raise ConfigError(f"override {override!r}: axis names contain dots; edit sweep.space in the file")
        try:
            strict_yaml.require_plain(key)
            set_dotted(tree, key, strict_yaml.read(text))
        except strict_yaml.NotPlain as error:
            raise ConfigError(f"override {override!r:.200}: {text!r:.200} is not valid YAML: {error}") from None
    config = validated(tree, source)
    return config if config.sweep is None else with_coerced_space(config, source)
