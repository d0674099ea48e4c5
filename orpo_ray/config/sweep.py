"""The `sweep` section: search space, searcher, scheduler, budget and confirmation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from orpo_ray.config.sections import LossConfig, Section, TrainConfig
from orpo_ray.config.space import Axis, Bundle, Choice, Grid, LogUniform, Uniform, grid_size

METRIC_MODES: dict[str, Literal["max", "min"]] = {
    "eval/preference_accuracy": "max",
    "eval/log_odds": "max",
    "eval/nll": "min",
    "eval/nll_per_byte": "min",
    "eval/odds_ratio_loss": "min",
    "eval/loss": "min",
}
"""Held-out metrics a sweep may rank trials by, and which direction is better."""
_NOT_MEASURED: dict[str, frozenset[str]] = {
    "reward": frozenset(METRIC_MODES) - {"eval/preference_accuracy", "eval/loss"},
    "rloo": frozenset({"eval/loss"}),
}
"""Loss -> held-out metrics that its trials do not have: a reward model predicts nothing, and rloo's loss is of sampled
answers."""
_WHAT_AN_ANSWER_IS = frozenset({"loss.answer_padding", "loss.preset"})
MEANING_MOVED_BY: dict[str, frozenset[str]] = {
    "eval/loss": frozenset(f"loss.{setting}" for setting in LossConfig.model_fields),
    "eval/nll": frozenset({"loss.nll_scope", "loss.nll_reduction", "loss.nll_eos", "loss.preset"}),
    "eval/preference_accuracy": _WHAT_AN_ANSWER_IS,
    "eval/log_odds": _WHAT_AN_ANSWER_IS,
    "eval/odds_ratio_loss": _WHAT_AN_ANSWER_IS,
    "eval/nll_per_byte": _WHAT_AN_ANSWER_IS,
}
"""Metric -> settings that change what the metric measures; sweeping one of them by that metric ranks the
setting, not the model (law 4)."""
MAX_TRIALS = 100_000
"""Of one sweep: all cells of a grid are held in memory."""


class FifoConfig(Section):
    """Every trial runs to its end."""

    type: Literal["fifo"]


class AshaConfig(Section):
    """Asynchronous successive halving (Li et al. 2018), separately within each bundle.

    A trial that is not among the best of its rung is paused, not stopped: it frees its workers and goes on from its
    checkpoint if it turns out to be among the best after all.
    """

    type: Literal["asha"]
    grace_steps: int = Field(ge=1)
    """No trial is paused before this step; the first rung."""
    reduction_factor: float = Field(3.0, gt=1)
    """At each rung about one trial in this many goes on; rungs are grace_steps × reduction_factor^k."""


class HyperBandConfig(Section):
    """HyperBand (Li et al. 2017), separately within each bundle: halving in brackets of unlike first rungs."""

    type: Literal["hyperband"]
    reduction_factor: float = Field(3.0, gt=1)
    """At each halving about one trial in this many goes on."""


class PbtConfig(Section):
    """Population-based training (Jaderberg et al. 2017), separately within each bundle.

    Every `interval_steps` the worst of the population take over weights and optimizer state of the best, and go on
    with settings moved a little. The population waits for its slowest at each interval, so that nobody goes back.
    """

    type: Literal["pbt"]
    interval_steps: int = Field(ge=1)
    """Steps between exploits; a multiple of train.eval_every."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """Share of the population that is replaced, and that is copied from."""
    resample_probability: float = Field(0.25, ge=0, le=1)
    """Chance of drawing a setting anew instead of moving it by the factors 0.8 or 1.2."""


class Pb2Config(Section):
    """Population-based bandits (Parker-Holder et al. 2020): PBT whose new settings a Gaussian process proposes.

    Axes must be uniform or loguniform; a loguniform one is modelled on its plain scale.
    """

    type: Literal["pb2"]
    interval_steps: int = Field(ge=1)
    """Steps between exploits; a multiple of train.eval_every."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """Share of the population that is replaced, and that is copied from."""


class MedianConfig(Section):
    """Stop a trial whose running mean is worse than the median of the others in its bundle (Golovin et al. 2017)."""

    type: Literal["median"]
    grace_steps: int = Field(ge=1)
    """No trial is stopped before this step."""
    min_trials: int = Field(3, ge=1)
    """Trials that must have reported before any is stopped."""


class RandomConfig(Section):
    """Grid and bundle axes are spanned, the others sampled at random."""

    type: Literal["random"]


class OptunaConfig(Section):
    """Optuna proposes; grid and bundle axes become categories."""

    type: Literal["optuna"]
    sampler: Literal["tpe", "gp", "cmaes", "nsga2", "random"] = "tpe"
    """Tree-structured Parzen estimator, Gaussian process, CMA-ES (continuous axes only; others are drawn at random),
    the genetic NSGA-II, or independent random draws."""
    startup_trials: int = Field(10, ge=1)
    """Random trials before the model begins; the population's size for nsga2."""
    objectives: tuple[str, ...] = ()
    """Held-out metrics to optimise together, `sweep.metric` among them; empty: that one alone. tpe, nsga2 and random
    take several."""


class HyperOptConfig(Section):
    """HyperOpt's tree-structured Parzen estimator proposes; needs the extra `hyperopt`."""

    type: Literal["hyperopt"]
    startup_trials: int = Field(10, ge=1)
    """Random trials before TPE begins to model."""


class LadderConfig(Section):
    """Small models propose for large ones, within `sweep.budget`; needs a bundle axis whose labels are model sizes.

    A Gaussian process over the axes, the logarithm of the model's parameters and the share of the steps done says what
    to expect of each setting at each size, and how surely; the next trial is the one that tells most about the best
    setting of the largest size per device-hour. Scheduler fifo suits it: the ladder gives up
    trials by itself, each by its own curve against others of its size.
    """

    type: Literal["ladder"]
    startup_trials: int = Field(6, ge=2)
    """Spread-out trials of the smallest size before the model begins."""


class BudgetConfig(Section):
    """What a sweep may cost."""

    device_hours: float = Field(gt=0)
    """Hours of training × workers, over all trials. No trial is begun that is expected to exceed it; trials still in
    training when it is spent end at their next evaluation."""


class ConfirmConfig(Section):
    """Further seeds for the finalists, after the search."""

    top: int = Field(3, ge=1)
    """How many of the best finished settings are confirmed."""
    seeds: int = Field(5, ge=2)
    """Seeds each is trained with in all; the search's own run is the first of them."""


Scheduler = FifoConfig | AshaConfig | HyperBandConfig | MedianConfig | PbtConfig | Pb2Config


Searcher = RandomConfig | OptunaConfig | HyperOptConfig | LadderConfig


class SweepConfig(Section):
    """Which settings are explored, how, and how trials are judged."""

    metric: str = "eval/preference_accuracy"
    """Held-out metric that ranks trials and drives early stopping."""
    num_samples: int = Field(1, ge=1)
    """random: repeats of the whole grid, with fresh draws; optuna, hyperopt: trials in all; ladder: at most."""
    seed: int = Field(0, ge=0)
    """Seed of the searcher's draws."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials running at once; by default as many as the cluster holds. Where a sweep is continued on a larger cluster,
    Tune still proposes no more trials ahead than its first run did."""
    max_failures: int = Field(2, ge=0)
    """How often a trial whose worker process died is started again from its last checkpoint."""
    max_group_trials: int = Field(200, ge=1)
    """Trials that one worker group runs before its processes are replaced, against slow leaks in what it runs."""
    scheduler: Annotated[Scheduler, Field(discriminator="type")] = FifoConfig(type="fifo")
    """Early stopping, or populations."""
    searcher: Annotated[Searcher, Field(discriminator="type")] = RandomConfig(type="random")
    """Where proposals come from."""
    budget: BudgetConfig | None = None
    """What the sweep may cost; confirmation is part of it."""
    warm_start: str | None = None
    """An MLflow experiment whose finished trials are taken into account: one that differs in nothing but the axes
    informs the searcher, and the same setting is not trained again."""
    confirm: ConfirmConfig | None = None
    """Train the best settings with further seeds before a winner is named."""
    space: dict[str, Axis] = Field(default_factory=dict)
    """config path -> axis; a bundle's key is a name of your choice. Empty: one trial."""

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
        """How many trials the search proposes, at most where there is a budget; confirmation not counted."""
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
    def _judged_by_what_the_axes_cannot_move(self) -> SweepConfig:
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
                f"axis {lone[0]} changes the model or what a trial occupies, so it belongs in a bundle: early stopping "
                "compares trials of one bundle only, and each bundle has worker groups of its own"
            )
        if sum(isinstance(axis, Bundle) for axis in self.space.values()) > 1:
            raise ValueError("a sweep has at most one bundle axis; merge them into one, with a label per combination")
        return self

    @model_validator(mode="after")
    def _can_be_listed(self) -> SweepConfig:
        if self.num_trials > MAX_TRIALS:
            cells = "" if self.is_model_based else f" (num_samples {self.num_samples} × {grid_size(self.space)} cells)"
            raise ValueError(
                f"the sweep would have {self.num_trials} trials{cells}, more than {MAX_TRIALS}; "
                "draw some axes at random (choice, uniform, loguniform), or give fewer values"
            )
        return self

    @model_validator(mode="after")
    def _no_trial_twice(self) -> SweepConfig:
        grids = all(isinstance(axis, Grid | Bundle) for axis in self.space.values())
        if self.space and grids and not self.is_model_based and self.num_samples > 1:
            raise ValueError(
                f"num_samples ({self.num_samples}) would run each of the grid's {grid_size(self.space)} cells that "
                "often with the same seed; drop it, or add an axis train.seed: {type: grid, values: [1, 2, 3]}"
            )
        return self

    @model_validator(mode="after")
    def _scheduler_and_searcher_go_together(self) -> SweepConfig:
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
                    "settings changed on its way; confirm the best in a sweep of its own"
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
                raise ValueError(f"sampler {searcher.sampler} takes one objective; use tpe, nsga2 or random")
            if not isinstance(scheduler, FifoConfig):
                raise ValueError(f"scheduler {scheduler.type} ends trials by one metric; several objectives need fifo")
        if isinstance(searcher, LadderConfig):
            if self.budget is None or self.bundle_axis is None:
                raise ValueError(
                    "searcher ladder climbs model sizes within a budget: give sweep.budget: {device_hours: ...} and a "
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


def require_stoppable(sweep: SweepConfig, train: TrainConfig) -> None:
    scheduler = sweep.scheduler
    if isinstance(scheduler, FifoConfig):
        return
    if train.eval_every is None:
        raise ValueError(f"scheduler {scheduler.type} decides at evaluations: set train.eval_every")
    if isinstance(scheduler, PbtConfig | Pb2Config):
        if scheduler.interval_steps % train.eval_every:
            raise ValueError(
                f"scheduler.interval_steps ({scheduler.interval_steps}) must be a multiple of train.eval_every "
                f"({train.eval_every}): the population is compared at evaluations"
            )
        return
    if isinstance(scheduler, HyperBandConfig):
        if train.max_steps is None:
            raise ValueError("scheduler hyperband plans its brackets by the trials' length: give train.max_steps")
        return
    if train.max_steps is not None and scheduler.grace_steps >= train.max_steps:
        raise ValueError(
            f"scheduler.grace_steps ({scheduler.grace_steps}) must be below train.max_steps ({train.max_steps}), "
            "or nothing is ever stopped early"
        )


def require_measured(loss: LossConfig, sweep: SweepConfig | None, keep_best: str | None) -> None:
    axis = None if sweep is None else sweep.space.get("loss.name")
    names = {loss.name} if axis is None else {str(name) for name in axis.candidates()}
    if "reward" in names and len(names) > 1:
        raise ValueError(
            f"loss.name varies over {', '.join(sorted(names))}, but a reward model and a language model are judged by "
            "different things: give reward an experiment of its own"
        )
    for name in sorted(names & _NOT_MEASURED.keys()):
        asked = {"sweep.metric": sweep.metric if sweep else None, "checkpoint.keep_best": keep_best}
        for setting, metric in asked.items():
            if metric in _NOT_MEASURED[name]:
                measured = [known for known in METRIC_MODES if known not in _NOT_MEASURED[name]]
                raise ValueError(
                    f"{setting} is {metric}, which loss.name {name} does not measure; use one of {', '.join(measured)}"
                )
