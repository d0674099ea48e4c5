"""Folder of one reproduction: its scale, experiments, models and kept task results, and results of other seeds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from orpo_ray import provenance
from orpo_ray.config import ExperimentConfig, parse
from orpo_ray.errors import UserError
from orpo_ray.orchestration.tasks import Task, run_all
from orpo_ray.reproduction.scales import Scale
from orpo_ray.results import export
from orpo_ray.storage.run_dir import write_results

RESULT_FILE = "reproduction.json"
_BEGUN_FILE = "begun.json"


class ReproduceError(UserError, RuntimeError):
    """The reproduction cannot continue; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Folder and scale of one reproduction."""

    folder: Path
    scale: Scale

    def experiment(self, role: str, **settings: Any) -> ExperimentConfig:
        """Experiment of a role such as `sft`. `settings` override dotted config paths."""
        tree = self.scale.tree(role) | {"name": role, "output_dir": str(self.folder)}
        return parse(tree, [f"{path}={json.dumps(value)}" for path, value in settings.items()], source=role)

    def from_base(self) -> dict[str, Any]:
        """Settings by which everything but RLHF and DPO starts from the pretrained base, if the scale has one."""
        return {"model.path": str(self.model("base"))} if self.scale.pretrain else {}

    def model(self, name: str) -> Path:
        """Folder of an exported model, whether it exists yet or not."""
        return self.folder / "models" / name

    def digest(self, name: str) -> str:
        """Digest of an exported model's weights."""
        marker = json.loads((self.model(name) / export.MARKER_FILE).read_text(encoding="utf-8"))
        return str(marker["digest"])

    @property
    def kept(self) -> Path:
        """Folder of the task results that later commands reuse."""
        return self.folder / "kept"

    def results_of(self, tasks: Sequence[Task], console: Console) -> dict[str, Any]:
        """Results of tasks, by name. Each task gets the resources of one training worker. Ray must be initialised."""
        return run_all(tasks, self.kept, self.experiment("lambda").scaling, console)

    def begin(self) -> dict[str, Any]:
        """Claim the folder for this scale. Later commands with the same scale find it claimed.

        Returns:
            `provenance.collect()` of the first command.

        Raises:
            ReproduceError: the folder was begun with other settings, or the scale's data or seed cannot be used.
        """
        if self.scale.seed < 0:
            raise ReproduceError(f"--seed ({self.scale.seed}) must be 0 or more")
        if self.scale.pretrain and not self.scale.data.startswith("builtin://"):
            raise ReproduceError(
                f"scale {self.scale.name} trains a model from scratch on the language of the built-in pairs, so it "
                f"cannot start from {self.scale.data}: give a pretrained model with --model, too"
            )
        file, mine = self.folder / _BEGUN_FILE, json.loads(json.dumps(dataclasses.asdict(self.scale)))
        if file.exists():
            begun = json.loads(file.read_text(encoding="utf-8"))
            if changed := sorted(key for key in mine if mine[key] != begun["scale"].get(key)):
                known = "; ".join(f"{key} was {begun['scale'].get(key)}, is {mine[key]}" for key in changed)
                raise ReproduceError(
                    f"{self.folder} was begun with other settings ({known}): give another --output-dir, or remove it "
                    "to start over"
                )
            return dict(begun["provenance"])
        begun = {"scale": mine, "provenance": provenance.collect()}
        write_results(file, begun)
        return dict(begun["provenance"])

    def results_of_other_seeds(self) -> list[dict[str, Any]]:
        """Results in sibling folders whose settings differ in the seed only, sorted by seed."""

        def settings(folder: Path) -> dict[str, Any]:
            return dict(json.loads((folder / _BEGUN_FILE).read_text(encoding="utf-8"))["scale"])

        mine, found = settings(self.folder), {}
        for file in sorted(self.folder.parent.glob(f"*/{RESULT_FILE}")):
            theirs = settings(file.parent)
            if theirs | {"seed": mine["seed"]} == mine and theirs != mine:
                found[theirs["seed"]] = json.loads(file.read_text(encoding="utf-8"))
        return [found[seed] for seed in sorted(found)]
