"""Schedulers, which end trials early, and searchers, which propose settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orpo_ray.config.section import Section


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


Scheduler = FifoConfig | AshaConfig | HyperBandConfig | MedianConfig | PbtConfig | Pb2Config
Searcher = RandomConfig | OptunaConfig | HyperOptConfig | LadderConfig
