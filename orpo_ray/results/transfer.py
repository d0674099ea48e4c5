"""Extrapolate the best learning rate and λ from small model sizes to larger ones, with uncertainty.

At each size the metric is fitted, by least squares, with a parabola over log lr plus one over log λ; the vertex is that
size's best setting. The line log best = a + b · log N is fitted through these and evaluated at the target sizes. Where
the data do not support that, the result gives the reasons instead of a value. Resampling cannot show whether the
parabola is the right shape, whether the best lr is the same at every λ (the two are fitted as a sum), or whether the
line continues.

Shape suffixes: T trials of one size, S sizes, G target sizes, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import get_args

import numpy as np
import pandas as pd

from orpo_ray.formatting import short_count
from orpo_ray.results.bootstrap import LEVEL, RESAMPLES, Mode
from orpo_ray.results.parabola import Axis, SizeFit, Vertex

TARGETS = (1.3e9, 7e9)
"""Default target sizes in parameters: the paper's OPT-1.3B and its 7B models."""

_MIN_SIZES = 3
"""A line always fits two points."""
_MAX_FACTOR = 10.0
"""An interval whose ends differ by more than this factor does not help to choose."""
_MAX_WRONG = 0.1
"""Largest share of resamples that may bend the wrong way, and that may have a size's best at an edge."""
_MAX_DEGENERATE = 0.5
"""Largest share of resamples that may draw too few settings; the remaining ones are no longer a fair sample."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One trial."""

    parameters: int
    """Parameters of the model, N."""
    lr: float
    orpo_lambda: float
    value: float
    """The metric; NaN or infinite where the trial diverged. Such a trial is left out."""


@dataclass(frozen=True, slots=True)
class SizeOptimum:
    """The optimum of one size's parabola."""

    parameters: int
    trials: int
    """Number of trials with a value."""
    diverged: int
    """Number of trials without one."""
    best: float
    """Best value of the axis by the fit, within the range tried."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    """Upper end."""
    lowest_tried: float
    highest_tried: float
    at_edge: bool
    """True where the fit is best at or beyond an end of the range tried, or the best trials are at an end: the true
    best may lie anywhere outside."""


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """The line evaluated at one target size."""

    parameters: float
    best: float
    low: float
    """Lower end of its 95 % interval."""
    high: float
    """Upper end."""
    says_nothing: tuple[str, ...]
    """Reasons why `best` means nothing; empty where it means something."""
    statement: str
    """The result as a sentence."""


@dataclass(frozen=True, slots=True)
class Law:
    """The line log best = a + b · log N of one axis; natural logarithms."""

    axis: Axis
    intercept: float
    """a."""
    exponent: float
    """b: -0.5 means that the best value halves when the model is four times as large."""
    exponent_low: float
    """Lower end of its 95 % interval."""
    exponent_high: float
    """Upper end."""
    farthest_off: float
    """The largest factor between a size's best and the line, at least 1. Not part of the intervals."""
    wrong_way: float
    """Share of the fitted resamples with a size whose parabola opens the wrong way: it has a worst value, no best."""
    cut_off: float
    """Share of the fitted resamples, without those, with a size whose fit is best at an end of the range tried. The
    intervals use that end as the best, so they are too narrow where the share is large."""
    optima: tuple[SizeOptimum, ...]
    """One for each size, ascending."""
    extrapolations: tuple[Extrapolation, ...]
    """One for each target size, in the order given."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Result of `study`."""

    lr: Law
    orpo_lambda: Law | None
    """None where fewer than two sizes have at least three λ > 0."""
    resamples: int
    degenerate: int
    """Number of resamples left out because they drew too few different settings at some size to fit it."""


def study(
    trials: pd.DataFrame | Sequence[Tried],
    mode: Mode,
    targets: Sequence[float] = TARGETS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Transfer:
    """Estimate the best learning rate and λ by model size, and extrapolate them to the target sizes.

    λ = 0 has no logarithm: such trials have a constant of their own, which shifts the parabola over log lr. At a size
    with fewer than three λ > 0, each λ has such a constant.

    Intervals are percentiles of a bootstrap that draws the trials of each size with replacement. A resample whose
    parabola opens the wrong way counts with the better end of the range.

    Args:
        trials: trials, or a frame with the columns `parameters`, `lr`, `orpo_lambda` and `value` as in `Tried`.
        mode: whether `max` or `min` of the value is better.
        targets: target sizes in parameters.
        resamples: number of resamples, B.
        seed: seed of the draws.

    Raises:
        ValueError: a column is missing; a number of parameters or an lr is not above 0, or a λ is below 0; there are
            fewer than 2 sizes; or at some size the trials with a value are too few, or too alike, to fit the parabolas.
    """
    frame = _frame(trials)
    _require_valid(frame, mode, targets)
    numbers = sorted(frame["parameters"].unique())
    sizes = [SizeFit.of(frame[frame["parameters"] == number], mode) for number in numbers]
    if len(sizes) < 2:
        raise ValueError(f"a transfer study needs at least 2 model sizes, and has {len(sizes)}")
    rng = np.random.default_rng(seed)
    drawn = [[size.fit(rng.integers(0, size.trials, size.trials)) for size in sizes] for _ in range(resamples)]
    whole = [[fit for fit in fits if fit is not None] for fits in drawn if None not in fits]
    degenerate = resamples - len(whole)

    def law(axis: Axis) -> Law | None:
        having = [s for s, size in enumerate(sizes) if axis in size.tried]
        if len(having) < 2:
            return None
        fits_BS = [[fits[s][axis] for s in having] for fits in whole]
        return _law(axis, [sizes[s] for s in having], fits_BS, targets, degenerate / resamples)

    of_lr = law("lr")
    assert of_lr is not None  # each size has learning rates
    return Transfer(of_lr, law("orpo_lambda"), resamples, degenerate)


def _law(
    axis: Axis, sizes: list[SizeFit], fits_BS: list[list[Vertex]], targets: Sequence[float], degenerate: float
) -> Law:
    """Fit the line through the sizes' vertices, on all trials and on each resample.

    Args:
        axis: which axis.
        sizes: the S sizes that have a parabola over it.
        fits_BS: their vertices on each resample that could be fitted.
        targets: target sizes in parameters.
        degenerate: share of the resamples that could not be fitted.
    """
    whole_S = [fit[axis] for size in sizes if (fit := size.fit(np.arange(size.trials))) is not None]
    log_size_S = np.log([size.parameters for size in sizes])
    log_target_G = np.log(np.asarray(targets, dtype=float))
    log_best_S = np.array([vertex.log_best for vertex in whole_S])
    drawn_BS = np.array([[vertex.log_best for vertex in fits] for fits in fits_BS]).reshape(-1, len(sizes))
    intercept, exponent = _line(log_size_S, log_best_S)
    intercept_B, exponent_B = _line(log_size_S, drawn_BS)
    off = float(np.abs(log_best_S - intercept - exponent * log_size_S).max())
    wrong_B = [any(vertex.wrong_way for vertex in fits) for fits in fits_BS]
    cut_B = [any(vertex.at_edge for vertex in fits) and not bad for fits, bad in zip(fits_BS, wrong_B, strict=True)]
    wrong, cut_off = (float(np.mean(found_B)) if found_B else 0.0 for found_B in (wrong_B, cut_B))
    optima = tuple(
        SizeOptimum(
            size.parameters,
            size.trials,
            size.diverged,
            math.exp(vertex.log_best),
            *_interval(np.exp(drawn_B)),
            *size.tried[axis],
            vertex.at_edge or size.best_is_an_end(axis),
        )
        for size, vertex, drawn_B in zip(sizes, whole_S, drawn_BS.T, strict=True)
    )
    doubts = _doubts(optima, wrong, cut_off, degenerate)
    name = "lr" if axis == "lr" else "λ"
    smallest, largest = short_count(sizes[0].parameters), short_count(sizes[-1].parameters)
    line = (
        f"the line through {len(sizes)} sizes from {smallest} to {largest}, which are off it by a factor of "
        f"{math.exp(off):.2f} at most, continues"
    )
    extrapolations = tuple(
        _extrapolation(name, line, float(target), math.exp(log_best), _interval(np.exp(drawn_B)), doubts)
        for target, log_best, drawn_B in zip(
            targets,
            intercept + exponent * log_target_G,
            (intercept_B[:, None] + exponent_B[:, None] * log_target_G).T,
            strict=True,
        )
    )
    exponents = _interval(exponent_B)
    return Law(
        axis, float(intercept), float(exponent), *exponents, math.exp(off), wrong, cut_off, optima, extrapolations
    )


def _line(log_size_S: np.ndarray, log_best_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intercept and slope by least squares; for log_best [B, S], B of each."""
    centred_S = log_size_S - log_size_S.mean()
    slope = log_best_S @ centred_S / (centred_S @ centred_S)
    return log_best_S.mean(-1) - slope * log_size_S.mean(), slope


def _interval(drawn_B: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval; NaN where no resample could be fitted."""
    if not len(drawn_B):
        return math.nan, math.nan
    low, high = np.quantile(drawn_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def _doubts(optima: tuple[SizeOptimum, ...], wrong: float, cut_off: float, degenerate: float) -> list[str]:
    """Reasons why no extrapolation means anything, whatever the size."""
    doubts = []
    if len(optima) < _MIN_SIZES:
        doubts.append(f"there are {len(optima)} sizes, and fewer than {_MIN_SIZES} are no evidence of a line")
    if at_edge := [short_count(optimum.parameters) for optimum in optima if optimum.at_edge]:
        doubts.append(f"the best is at the edge of the range tried at {', '.join(at_edge)}")
    elif cut_off > _MAX_WRONG:
        doubts.append(f"in {cut_off:.0%} of the resamples a size's best is at the edge of the range tried")
    if wrong > _MAX_WRONG:
        doubts.append(f"in {wrong:.0%} of the resamples a size has no best between its ends")
    if degenerate > _MAX_DEGENERATE:
        doubts.append(f"{degenerate:.0%} of the resamples had too few different settings")
    return doubts


def _extrapolation(
    name: str, line: str, target: float, best: float, interval: tuple[float, float], doubts: list[str]
) -> Extrapolation:
    low, high = interval
    doubts = list(doubts)
    if high > _MAX_FACTOR * low:  # False where both are NaN, which `doubts` covers already
        doubts.append(f"its 95 % interval, {low:.2g} to {high:.2g}, spans more than a factor of {_MAX_FACTOR:g}")
    if doubts:
        statement = f"About {name} at {short_count(target)} parameters this says nothing: {'; '.join(doubts)}."
    else:
        statement = (
            f"At {short_count(target)} parameters the best {name} is {best:.2g} (95 % interval {low:.2g} to "
            f"{high:.2g}), if {line}."
        )
    return Extrapolation(target, best, low, high, tuple(doubts), statement)


def _frame(trials: pd.DataFrame | Sequence[Tried]) -> pd.DataFrame:
    columns = [field.name for field in fields(Tried)]
    if not isinstance(trials, pd.DataFrame):
        trials = pd.DataFrame([astuple(trial) for trial in trials], columns=columns)
    if missing := [column for column in columns if column not in trials]:
        raise ValueError(f"trials must have the columns {', '.join(columns)}; {', '.join(missing)} missing")
    return trials[columns].astype(float)


def _require_valid(frame: pd.DataFrame, mode: Mode, targets: Sequence[float]) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, and is {mode!r}")
    if wrong := [target for target in targets if not 0 < target < math.inf]:
        raise ValueError(f"each target must be a number of parameters above 0; {wrong[0]} is not")
    for column, law, is_right in (
        ("parameters", "above 0", frame["parameters"] > 0),
        ("lr", "above 0", frame["lr"] > 0),
        ("orpo_lambda", "0 or above", frame["orpo_lambda"] >= 0),
    ):
        is_wrong = ~(is_right & np.isfinite(frame[column]))
        if is_wrong.any():
            at = int(np.argmax(is_wrong.to_numpy()))
            raise ValueError(f"each {column} must be {law}; that of trial {at} is {frame[column].iloc[at]:g}")
