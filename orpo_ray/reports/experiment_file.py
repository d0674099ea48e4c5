"""Files and commands that train a sweep's trials again: `experiment.yaml`, `best.yaml`, `orpo-ray train ...`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.config import ExperimentConfig, as_given
from orpo_ray.config.flatten import train_command
from orpo_ray.config.space import describe
from orpo_ray.provenance import without_password
from orpo_ray.storage.run_dir import SWEEP_FILE

EXPERIMENT_FILE = "experiment.yaml"
"""The sweep's config as it ran; the commands on the page refer to it."""
BEST_FILE = "best.yaml"
"""The best setting alone."""


def read_config(run_dir: Path) -> dict[str, Any] | None:
    """The config in `sweep.json`, without the tracking server's password; None without that file."""
    path = run_dir / SWEEP_FILE
    if not path.is_file():
        return None
    # Reports are sent to other people.
    known = json.loads(without_password(path.read_text(encoding="utf-8")))
    return as_given(known["config"])


def write_experiment(run_dir: Path) -> Path | None:
    """Write the config of `sweep.json` as a file that `orpo-ray train` reads; None without `sweep.json`."""
    if (config := read_config(run_dir)) is None:
        return None
    path = run_dir / EXPERIMENT_FILE
    path.write_text("# The experiment as it ran, with every setting.\n" + as_yaml(config), encoding="utf-8")
    return path


def write_best(run_dir: Path, config: ExperimentConfig, params: dict[str, Any]) -> Path:
    """Write `best.yaml`: the experiment with these params applied and without its sweep section."""
    tree = config.trial(params).model_dump(mode="json", exclude_unset=True)
    tree["name"] = f"{config.name[:95]}-best"
    command = f"# The best trial of {config.name}: {describe(params)}. Run it with: orpo-ray train <this file>\n"
    path = run_dir / BEST_FILE
    path.write_text(command + without_password(as_yaml(tree)), encoding="utf-8")
    return path


def as_yaml(tree: Mapping[str, Any]) -> str:
    """YAML in the given order, with λ as λ."""
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return text


def command_of(trial: Mapping[str, Any], name: str, file: str, config: Mapping[str, Any] | None) -> str | None:
    """The command that trains one trial again under a name of its own.

    Args:
        trial: from `results.summarize`.
        name: the sweep's name.
        file: path of the experiment file.
        config: from `read_config`; without it a bundle's settings are unknown and left out.

    Returns:
        None for a trial that took over another's weights (population-based training): no single run reproduces it.
    """
    if trial.get("forks"):
        return None
    space = ((config or {}).get("sweep") or {}).get("space") or {}
    settings: dict[str, Any] = {}
    for axis, value in trial["params"].items():
        if space.get(axis, {}).get("type") == "bundle":
            settings |= space[axis]["values"][value]
        elif "." in axis:
            settings[axis] = value
    return train_command(file, name, trial["trial_id"], settings)
