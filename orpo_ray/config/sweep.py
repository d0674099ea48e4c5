"""The `sweep` section: search space, searcher, scheduler, budget and confirmation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from orpo_ray.config.methods import (
    AshaConfig,
    FifoConfig,
    LadderConfig,
    OptunaConfig,
    Pb2Config,
    PbtConfig,
    RandomConfig,
    Scheduler,
    Searcher,
)
from orpo_ray.config.metrics import MEANING_MOVED_BY, METRIC_MODES
from orpo_ray.config.section import Section
from orpo_ray.config.space import Axis, Bundle, Choice, Grid, LogUniform, Uniform, grid_size

MAX_TRIALS = 100_000
"""Maximum trials of one sweep: all cells of a grid are held in memory."""


class BudgetConfig(Section):
    """Limit on the cost of a sweep."""

    device_hours: float = Field(gt=0)
    """Maximum hours of training × workers, summed over all trials. Trials expected to exceed it are not started; trials
    still training when it is spent end at their next evaluation."""


class ConfirmConfig(Section):
    """Training of the finalists with further seeds, after the search."""

    top: int = Field(3, ge=1)
    """Number of best finished settings to confirm."""
    seeds: int = Field(5, ge=2)
    """Total number of seeds per setting; the search's own run counts as the first."""


class SweepConfig(Section):
    """Which settings are explored, how, and how trials are ranked."""

    metric: str = "eval/preference_accuracy"
    """Held-out metric that ranks trials and drives early stopping."""
    num_samples: int = Field(1, ge=1)
    """random: repeats of the whole grid, each with fresh draws; optuna, hyperopt: total number of trials; ladder:
    maximum number of trials."""
    seed: int = Field(0, ge=0)
    """Seed of the searcher's random draws."""
    max_concurrent: int | None = Field(None, ge=1)
    """Maximum trials running at once; by default as many as fit the cluster. If a sweep is continued on a larger
    cluster, Tune still proposes no more trials ahead than in its first run."""
    max_failures: int = Field(2, ge=0)
    """How often a trial may be restarted from its last checkpoint after one of its worker processes died."""
    max_group_trials: int = Field(200, ge=1)
    """Number of trials that a worker group runs before its processes are replaced, which bounds slow memory leaks."""
    scheduler: Annotated[Scheduler, Field(discriminator="type")] = FifoConfig(type="fifo")
    """Method that stops, pauses or changes trials while they train; by default every trial runs to its end."""
    searcher: Annotated[Searcher, Field(discriminator="type")] = RandomConfig(type="random")
    """Method that proposes settings."""
    budget: BudgetConfig | None = None
    """Limit on the cost of the sweep, including confirmation; null for none."""
    warm_start: str | None = None
    """MLflow experiment whose finished trials are reused: those that differ only in the axes inform the searcher, and
    their settings are not trained again."""
    confirm: ConfirmConfig | None = None
    """Train the best settings with further seeds before a winner is named; null for no confirmation."""
    space: dict[str, Axis] = Field(default_factory=dict)
    """Axes: config path -> axis; the key of a bundle is a name of your choice. An empty space is one trial."""

    @property
    def mode(self) -> Literal["max", "min"]:
        """Which direction of the metric is better."""
        return METRIC_MODES[self.metric]

    @property
    def is_model_based(self) -> bool:
        """Whether proposals depend on results."""
        return not isinstance(self.searcher, RandomConfig)

    @property
    def num_trials(self) -> int:
        """How many trials the search proposes, or at most if there is a budget; confirmation is not counted."""
        return self.num_samples * (1 if self.is_model_based else grid_size(self.space))

    @property
    def num_confirmations(self) -> int:
        """How many trials confirmation adds, at most."""
        return 0 if self.confirm is None else self.confirm.top * (self.confirm.seeds - 1)

    @property
    def bundle_axis(self) -> str | None:
        """Name of the bundle axis, if there is one."""
        return next((name for name, axis in self.space.items() if isinstance(axis, Bundle)), None)

    def bundle_of(self, params: dict[str, Any]) -> str:
        """The bundle that a trial belongs to; "" where there is no bundle axis."""
        return str(params[self.bundle_axis]) if self.bundle_axis else ""

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, metric: str) -> str:
        if metric not in METRIC_MODES:
            raise ValueError(f"metric {metric!r} is not a held-out metric; use one of {', '.join(METRIC_MODES)}")
        return metric

    @model_validator(mode="after")
    def _metric_keeps_its_meaning(self) -> SweepConfig:
        swept = set(self.space)
        for axis in self.space.values():
            if isinstance(axis, Bundle):
                swept.update(path for settings in axis.values.values() for path in settings)
        moved = sorted(swept & MEANING_MOVED_BY[self.metric])
        if moved:
            allowed = [m for m in METRIC_MODES if not swept & MEANING_MOVED_BY[m]]
            advice = f"use one of {', '.join(allowed)}"
            if not allowed:
                of = "a preset's settings one by one" if "loss.preset" in moved else "fewer of these settings"
                advice = f"and so does every other metric; vary {of}, or run one experiment per value"
            raise ValueError(
                f"metric {self.metric} changes its meaning with {', '.join(moved)}, which this sweep varies: "
                f"it would rank the setting, not the model; {advice}"
            )
        lone = [path for path, axis in self.space.items() if not isinstance(axis, Bundle) and _needs_bundle(path)]
        if lone:
            raise ValueError(
                f"axis {lone[0]} changes the model or the resources of a trial, so it belongs in a bundle: early "
                "stopping compares trials of one bundle only, and each bundle has worker groups of its own"
            )
        if sum(isinstance(axis, Bundle) for axis in self.space.values()) > 1:
            raise ValueError("a sweep has at most one bundle axis; merge them into one, with a label per combination")
        return self

    @model_validator(mode="after")
    def _has_few_enough_trials(self) -> SweepConfig:
        if self.num_trials > MAX_TRIALS:
            cells = "" if self.is_model_based else f" (num_samples {self.num_samples} × {grid_size(self.space)} cells)"
            raise ValueError(
                f"the sweep would have {self.num_trials} trials{cells}, more than {MAX_TRIALS}; "
                "draw some axes at random (choice, uniform, loguniform), or give fewer values"
            )
        return self

    @model_validator(mode="after")
    def _no_repeated_trials(self) -> SweepConfig:
        grids = all(isinstance(axis, Grid | Bundle) for axis in self.space.values())
        if self.space and grids and not self.is_model_based and self.num_samples > 1:
            raise ValueError(
                f"num_samples ({self.num_samples}) would run each of the grid's {grid_size(self.space)} cells that "
                "many times with the same seed; drop it, or add an axis train.seed: {type: grid, values: [1, 2, 3]}"
            )
        return self

    @model_validator(mode="after")
    def _methods_fit_each_other(self) -> SweepConfig:
        scheduler, searcher = self.scheduler, self.searcher
        plain = {name: axis for name, axis in self.space.items() if not isinstance(axis, Bundle)}
        if isinstance(scheduler, PbtConfig | Pb2Config):
            if self.is_model_based:
                raise ValueError(
                    f"scheduler {scheduler.type} changes settings while trials train, and searcher {searcher.type} "
                    "proposes from settings that do not change: use searcher random"
                )
            if not any(isinstance(axis, Uniform | LogUniform | Choice) for axis in plain.values()):
                raise ValueError(f"scheduler {scheduler.type} needs an axis to move: uniform, loguniform or choice")
            if self.confirm is not None:
                raise ValueError(
                    f"confirm trains a setting anew with other seeds, but under scheduler {scheduler.type} a trial's "
                    "settings changed while it trained; confirm the best settings in a separate sweep"
                )
        if isinstance(scheduler, Pb2Config):
            other = [name for name, axis in plain.items() if not isinstance(axis, Uniform | LogUniform)]
            if other:
                raise ValueError(f"scheduler pb2 models continuous axes only, but {other[0]} is {plain[other[0]].type}")
        if isinstance(searcher, OptunaConfig) and searcher.objectives:
            unknown = [metric for metric in searcher.objectives if metric not in METRIC_MODES]
            if unknown or self.metric not in searcher.objectives or len(set(searcher.objectives)) < 2:
                raise ValueError(
                    f"searcher.objectives {list(searcher.objectives)} must be two or more of "
                    f"{', '.join(METRIC_MODES)}, with sweep.metric ({self.metric}) among them"
                )
            if searcher.sampler in ("gp", "cmaes"):
                raise ValueError(f"sampler {searcher.sampler} supports one objective; use tpe, nsga2 or random")
            if not isinstance(scheduler, FifoConfig):
                raise ValueError(f"scheduler {scheduler.type} stops trials by one metric; several objectives need fifo")
        if isinstance(searcher, LadderConfig):
            if self.budget is None or self.bundle_axis is None:
                raise ValueError(
                    "searcher ladder tries model sizes within a budget: give sweep.budget: {device_hours: ...} and a "
                    "bundle axis whose labels are the sizes"
                )
            if not isinstance(scheduler, FifoConfig | AshaConfig):
                raise ValueError(f"searcher ladder goes with scheduler asha or fifo, not {scheduler.type}")
            grids = [name for name, axis in plain.items() if not isinstance(axis, Uniform | LogUniform)]
            if grids or not plain:
                raise ValueError(
                    "searcher ladder models continuous axes (uniform, loguniform)"
                    + (f", but {grids[0]} is {plain[grids[0]].type}" if grids else ", and there is none")
                )
        if self.confirm is not None and any(
            path == "train.seed" or (isinstance(axis, Bundle) and any("train.seed" in s for s in axis.values.values()))
            for path, axis in self.space.items()
        ):
            raise ValueError("confirm adds seeds itself: drop the axis train.seed, or confirm")
        return self


def _needs_bundle(path: str) -> bool:
    return path in {"model.path", "model.gguf_file", "model.revision"} or path.startswith("scaling.")
