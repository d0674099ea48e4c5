"""Search methods: schedulers, which pause, stop or change trials, and searchers, which propose their settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orpo_ray.config.section import Section


class FifoConfig(Section):
    """Every trial runs to its end."""

    type: Literal["fifo"]


class AshaConfig(Section):
    """Asynchronous successive halving (Li et al. 2018), separately within each bundle.

    A trial that is not among the best of its rung is paused, not stopped: it frees its workers, and continues from its
    checkpoint if it later turns out to be among the best.
    """

    type: Literal["asha"]
    grace_steps: int = Field(ge=1)
    """Step of the first rung; no trial is paused before it."""
    reduction_factor: float = Field(3.0, gt=1)
    """About one trial in this many continues beyond each rung; rungs are at grace_steps × reduction_factor^k steps."""


class HyperBandConfig(Section):
    """HyperBand (Li et al. 2017), separately within each bundle: successive halving in brackets with different first
    rungs."""

    type: Literal["hyperband"]
    reduction_factor: float = Field(3.0, gt=1)
    """About one trial in this many continues after each halving."""


class PbtConfig(Section):
    """Population-based training (Jaderberg et al. 2017), separately within each bundle.

    Every `interval_steps` the worst trials of the population copy weights and optimizer state from the best ones, and
    continue with slightly changed settings. At each interval all trials wait for the slowest, so that no trial moves
    backwards in steps.
    """

    type: Literal["pbt"]
    interval_steps: int = Field(ge=1)
    """Steps between these exchanges; a multiple of train.eval_every."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """Fraction of the population that is replaced, and fraction that is copied from."""
    resample_probability: float = Field(0.25, ge=0, le=1)
    """Probability that a setting is drawn anew instead of multiplied by 0.8 or 1.2."""


class Pb2Config(Section):
    """Population-based bandits (Parker-Holder et al. 2020): PBT whose new settings a Gaussian process proposes.

    Axes must be uniform or loguniform; loguniform axes are modelled on a linear scale.
    """

    type: Literal["pb2"]
    interval_steps: int = Field(ge=1)
    """Steps between these exchanges; a multiple of train.eval_every."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """Fraction of the population that is replaced, and fraction that is copied from."""


class MedianConfig(Section):
    """Stop a trial whose running mean is worse than the median of the others in its bundle (Golovin et al. 2017)."""

    type: Literal["median"]
    grace_steps: int = Field(ge=1)
    """No trial is stopped before this step."""
    min_trials: int = Field(3, ge=1)
    """Number of trials that must have reported before any trial is stopped."""


class RandomConfig(Section):
    """Grid and bundle axes are tried in full; other axes are sampled at random."""

    type: Literal["random"]


class OptunaConfig(Section):
    """Optuna proposes settings; grid and bundle axes become categories."""

    type: Literal["optuna"]
    sampler: Literal["tpe", "gp", "cmaes", "nsga2", "random"] = "tpe"
    """Tree-structured Parzen estimator, Gaussian process, CMA-ES (continuous axes only; others are drawn at random),
    the genetic algorithm NSGA-II, or independent random draws."""
    startup_trials: int = Field(10, ge=1)
    """Number of random trials before the model is used; for nsga2 the population size."""
    objectives: tuple[str, ...] = ()
    """Held-out metrics to optimise together, including `sweep.metric`; by default that metric alone. Samplers tpe,
    nsga2 and random support several."""


class HyperOptConfig(Section):
    """HyperOpt's tree-structured Parzen estimator proposes settings; needs the extra `hyperopt`."""

    type: Literal["hyperopt"]
    startup_trials: int = Field(10, ge=1)
    """Number of random trials before the model is used."""


class LadderConfig(Section):
    """Small models inform the choice for large ones, within `sweep.budget`; needs a bundle axis whose labels are model
    sizes.

    A Gaussian process over the axes, the logarithm of the parameter count and the fraction of the steps done predicts
    the metric of each setting at each size, with its uncertainty. The next trial is the one that tells most, per
    device-hour, about the best setting of the largest size. Use scheduler fifo: the ladder itself stops trials whose
    curve falls behind those of other trials of the same size.
    """

    type: Literal["ladder"]
    startup_trials: int = Field(6, ge=2)
    """Number of spread-out trials of the smallest size before the model is used."""


Scheduler = FifoConfig | AshaConfig | HyperBandConfig | MedianConfig | PbtConfig | Pb2Config
Searcher = RandomConfig | OptunaConfig | HyperOptConfig | LadderConfig
