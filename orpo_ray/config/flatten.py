"""An experiment's settings as flat names and values, for MLflow parameters and comparisons of runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from orpo_ray.config.experiment import ExperimentConfig

SPEED_ONLY = (
    "scaling.",
    "deepspeed.",
    "data.cache_dir",
    "train.micro_batch_size",
    "train.max_tokens_per_micro_batch",
    "train.log_every",
    "train.checkpoint_every",
    "model.gradient_checkpointing",
    "model.attention",
)
"""Settings that change speed and memory, never the numbers (law 2)."""


NOT_SETTINGS = frozenset({"name", "output_dir", "storage", "checkpoint", "generation", "tracking", "sweep"})
"""Sections that set where results are kept and what is shown, not what is trained."""

AXES = "axes."
"""Prefix of the parameters of a trial that repeat the sweep's axes (see `trial_params`)."""


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Config path -> value of a nested config; an empty section stays a single value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def settings_of(config: ExperimentConfig) -> dict[str, Any]:
    """Config path -> value, without the sweep and without the sections in `NOT_SETTINGS`."""
    return flat(config.model_dump(mode="json", exclude=set(NOT_SETTINGS)))


def trial_params(config: ExperimentConfig, params: dict[str, Any]) -> dict[str, Any]:
    """All settings of a trial, the label of its bundle, and its axes a second time under names that sort first.

    By default, MLflow's parallel coordinates show the first three parameters, sorted by name, that differ between runs.
    """
    return {f"{AXES}{name}": value for name, value in params.items()} | settings_of(config.trial(params)) | params


def parent_params(config: ExperimentConfig) -> dict[str, str]:
    """The settings that all trials share, and the search space and methods, as text."""
    shared = settings_of(config)
    if config.sweep is not None:
        tree = config.sweep.model_dump(mode="json")
        space = tree.pop("space")
        for axis in space.values():
            for path in [p for label in axis["values"].values() for p in label] if axis["type"] == "bundle" else []:
                shared.pop(path, None)
        shared = {path: value for path, value in shared.items() if path not in space}
        shared |= flat(tree, "sweep.") | {f"sweep.space.{name}": axis for name, axis in space.items()}
    return {key: as_text(value) for key, value in shared.items()}


def as_text(value: Any) -> str:
    """A parameter's value as MLflow stores it: a string as it is, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def override_text(value: Any) -> str:
    """A setting's value as an override on the command line spells it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def train_command(
    file: str, name: str, trial_id: str, settings: Mapping[str, Any], overrides: Sequence[str] = ()
) -> str:
    """The command that trains one trial of a sweep alone, under a name of its own.

    Args:
        file: the sweep's experiment file.
        name: the sweep's.
        trial_id: the trial's.
        settings: config path -> value, from `ExperimentConfig.settings`.
        overrides: `key.path=value` that the sweep was started with.
    """
    given = [f"{path}={override_text(value)}" for path, value in settings.items()]
    return shlex.join(["orpo-ray", "train", file, *overrides, f"name={name[:80]}-{trial_id}", *given])
