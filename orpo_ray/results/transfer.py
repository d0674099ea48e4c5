"""From the trials at small model sizes: which learning rate and which λ a larger model would want, and how far to trust
it.

At each size the metric is fitted, by least squares, with a parabola over log lr plus one over log λ; its vertex is that
size's best setting. Through those, log best = a + b · log N is laid and read off at the sizes asked for. Where the data
do not carry that, the result says that it says nothing. What no resampling can show: whether the parabola is the right
shape, whether the best lr is the same at every λ (the two are fitted as a sum), and whether the line goes on.

Shape suffixes: T trials of one size, S sizes, G sizes asked for, A the two axes (lr, λ), B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Literal, get_args

import numpy as np
import pandas as pd

from orpo_ray.results.bootstrap import LEVEL, RESAMPLES, Mode

Axis = Literal["lr", "orpo_lambda"]

TARGETS = (1.3e9, 7e9)
"""Parameters of the models that are asked about, unless told otherwise: the paper's OPT-1.3B and its 7B models."""

_MIN_VALUES = 3
"""Different settings that a parabola needs."""
_MIN_SIZES = 3
"""Through two points there is always a line."""
_MAX_FACTOR = 10.0
"""An interval from low to more than this times low is no help in choosing."""
_MAX_WRONG = 0.1
"""Of the resamples: how many may bend the wrong way, and at how many may a size's best be at an edge."""
_MAX_DEGENERATE = 0.5
"""Of the resamples: how many may leave too few settings. What is left of them is no fair sample any more."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One trial."""

    parameters: int
    """Of the model, N."""
    lr: float
    orpo_lambda: float
    value: float
    """The metric. NaN or infinite where the trial diverged; such a trial is left out."""


@dataclass(frozen=True, slots=True)
class SizeOptimum:
    """Where the parabola of one size has its best."""

    parameters: int
    trials: int
    """With a value."""
    diverged: int
    """Without one."""
    best: float
    """Of the fit, within the range tried."""
    low: float
    """The 95 % interval, from here"""
    high: float
    """to here."""
    lowest_tried: float
    highest_tried: float
    at_edge: bool
    """The fit is best at an end of the range tried, or beyond it, or an end of it is the best that was tried: the true
    best may lie anywhere outside."""


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """What the line says of one size."""

    parameters: float
    best: float
    low: float
    """The 95 % interval, from here"""
    high: float
    """to here."""
    says_nothing: tuple[str, ...]
    """Why; empty where it says something."""
    statement: str
    """The above as a sentence."""


@dataclass(frozen=True, slots=True)
class Law:
    """log best = a + b · log N, of one axis; natural logarithms."""

    axis: Axis
    intercept: float
    """a."""
    exponent: float
    """b: -0.5 means that a model four times as large wants half."""
    exponent_low: float
    """The 95 % interval, from here"""
    exponent_high: float
    """to here."""
    farthest_off: float
    """The largest factor between a size's best and the line, at least 1. Not part of the intervals."""
    wrong_way: float
    """Of the resamples that could be fitted, the share with a size whose parabola has no best, but a worst."""
    cut_off: float
    """And the share of the others with a size whose fit is best at an end of the range tried. The intervals take that
    end for the best, and so are too narrow where there are many."""
    optima: tuple[SizeOptimum, ...]
    """By size."""
    extrapolations: tuple[Extrapolation, ...]
    """By size asked for, as given."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A transfer study."""

    lr: Law
    orpo_lambda: Law | None
    """None where fewer than two sizes have at least three λ > 0."""
    resamples: int
    degenerate: int
    """Of the resamples, those that drew too few different settings at some size to fit it; they are left out."""


def study(
    trials: pd.DataFrame | Sequence[Tried],
    mode: Mode,
    targets: Sequence[float] = TARGETS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Transfer:
    """Best learning rate and λ by model size, and what they would be at other sizes.

    λ = 0 has no logarithm: such trials shift the parabola over log lr by a constant of their own. At a size with fewer
    than three λ > 0, so does each λ.

    Intervals are percentiles of a bootstrap that draws each size's trials anew, with replacement. A resample whose
    parabola bends the wrong way counts with the better end of the range.

    Args:
        trials: a frame has the columns `parameters`, `lr`, `orpo_lambda` and `value`, as described in `Tried`.
        mode: whether `max` or `min` of the value is better.
        targets: sizes asked about, in parameters.
        resamples: B.
        seed: of the draws.

    Raises:
        ValueError: a column is missing; a number of parameters or an lr is not above 0, or a λ below 0; there are fewer
            than 2 sizes; or at some size the trials with a value are too few, or too alike, to fit the parabolas.
    """
    frame = _frame(trials)
    _require_valid(frame, mode, targets)
    numbers = sorted(frame["parameters"].unique())
    sizes = [_Size.of(frame[frame["parameters"] == number], mode) for number in numbers]
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


@dataclass(frozen=True, slots=True)
class _Vertex:
    """Of one parabola."""

    log_best: float
    """Within the range tried."""
    at_edge: bool
    wrong_way: bool


_Fit = dict[Axis, _Vertex]


@dataclass(frozen=True, slots=True, eq=False)
class _Size:
    """The trials of one size that have a value."""

    parameters: int
    lr_T: np.ndarray
    lambda_T: np.ndarray
    cost_T: np.ndarray
    """The value, turned so that lower is better."""
    diverged: int
    tried: dict[Axis, tuple[float, float]]
    """Axis -> lowest and highest; λ only where it has a parabola."""

    def best_is_an_end(self, axis: Axis) -> bool:
        """Whether the lowest or the highest value tried has the best mean. A curve that only falls bends too, and its
        parabola then has a best in between that nobody has seen."""
        values_T = self.lr_T if axis == "lr" else self.lambda_T
        is_on = values_T > 0
        means = pd.Series(self.cost_T[is_on]).groupby(values_T[is_on]).mean()
        return bool(means.idxmin() in (means.index[0], means.index[-1]))

    @classmethod
    def of(cls, frame: pd.DataFrame, mode: Mode) -> _Size:
        """From all trials of a size."""
        valued = frame[np.isfinite(frame["value"])]
        lr_T, lambda_T = valued["lr"].to_numpy(), valued["orpo_lambda"].to_numpy()
        parameters, positive = int(frame["parameters"].iloc[0]), lambda_T[lambda_T > 0]
        if len(np.unique(lr_T)) < _MIN_VALUES:
            raise ValueError(
                f"each size needs trials with a value at {_MIN_VALUES} or more lr; {short_size(parameters)} has "
                f"{len(valued)} such trials at {len(np.unique(lr_T))} lr"
            )
        tried: dict[Axis, tuple[float, float]] = {"lr": (float(lr_T.min()), float(lr_T.max()))}
        if len(np.unique(positive)) >= _MIN_VALUES:
            tried["orpo_lambda"] = (float(positive.min()), float(positive.max()))
        cost_T = valued["value"].to_numpy() * (1.0 if mode == "min" else -1.0)
        size = cls(parameters, lr_T, lambda_T, cost_T, len(frame) - len(valued), tried)
        if size.fit(np.arange(len(cost_T))) is None:
            raise ValueError(
                f"each size needs enough trials to tell lr and λ apart; {short_size(parameters)} has {len(valued)} "
                f"with a value, at {len(np.unique(lr_T))} lr and {len(np.unique(lambda_T))} λ"
            )
        return size

    @property
    def trials(self) -> int:
        return len(self.cost_T)

    def fit(self, rows: np.ndarray) -> _Fit | None:
        """Parabolas through these trials, or None where they are too few or too alike."""
        lr_T, lambda_T = self.lr_T[rows], self.lambda_T[rows]
        # On a range of -1 to 1: numbers of like size keep the least squares well conditioned.
        x_T = _scaled(lr_T, self.tried["lr"])
        columns = [np.ones(len(rows)), x_T, x_T**2]
        apart = np.unique(lambda_T)[1:]  # each λ but the lowest has a constant of its own
        if "orpo_lambda" in self.tried:
            is_on = lambda_T > 0
            z_T = np.zeros(len(rows))
            z_T[is_on] = _scaled(lambda_T[is_on], self.tried["orpo_lambda"])
            columns += [z_T, z_T**2]
            apart = np.unique(lambda_T[~is_on])  # λ = 0, where there is any
        columns += [lambda_T == value for value in apart]
        coefficients, _, rank, _ = np.linalg.lstsq(np.stack(columns, 1).astype(float), self.cost_T[rows])
        if rank < len(columns):
            return None
        slopes, bends = coefficients[1::2], coefficients[2::2]  # after the constant: lr's two, then λ's two
        return {
            axis: _vertex(float(slope), float(bend), tried)
            for (axis, tried), slope, bend in zip(self.tried.items(), slopes, bends, strict=False)
        }


def _scaled(values_T: np.ndarray, tried: tuple[float, float]) -> np.ndarray:
    middle, half = _middle_and_half(tried)
    return np.asarray((np.log(values_T) - middle) / half)


def _middle_and_half(tried: tuple[float, float]) -> tuple[float, float]:
    low, high = np.log(tried)
    return (low + high) / 2, (high - low) / 2


def _vertex(slope: float, bend: float, tried: tuple[float, float]) -> _Vertex:
    """Where slope · x + bend · x² is lowest for x from -1 to 1, the range tried."""
    middle, half = _middle_and_half(tried)
    if bend <= 0:
        return _Vertex(middle - half * math.copysign(1, slope), at_edge=True, wrong_way=True)
    # Compared before it is divided: a parabola that is nearly flat would overflow.
    if abs(slope) >= 2 * bend:
        return _Vertex(middle - half * math.copysign(1, slope), at_edge=True, wrong_way=False)
    return _Vertex(middle - half * slope / (2 * bend), at_edge=False, wrong_way=False)


def _law(
    axis: Axis, sizes: list[_Size], fits_BS: list[list[_Vertex]], targets: Sequence[float], degenerate: float
) -> Law:
    """The line through these sizes' vertices, on all trials and on each resample."""
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
    smallest, largest = short_size(sizes[0].parameters), short_size(sizes[-1].parameters)
    line = (
        f"the line through {len(sizes)} sizes from {smallest} to {largest}, which are off it by a factor of "
        f"{math.exp(off):.2f} at most, goes on"
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
    """(intercept, slope) by least squares; of [B, S], B of each."""
    centred_S = log_size_S - log_size_S.mean()
    slope = log_best_S @ centred_S / (centred_S @ centred_S)
    return log_best_S.mean(-1) - slope * log_size_S.mean(), slope


def _interval(drawn_B: np.ndarray) -> tuple[float, float]:
    """NaN where no resample could be fitted."""
    if not len(drawn_B):
        return math.nan, math.nan
    low, high = np.quantile(drawn_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def _doubts(optima: tuple[SizeOptimum, ...], wrong: float, cut_off: float, degenerate: float) -> list[str]:
    """Why nothing can be said of any size."""
    doubts = []
    if len(optima) < _MIN_SIZES:
        doubts.append(
            f"there are {len(optima)} sizes, and a line through fewer than {_MIN_SIZES} is no evidence of one"
        )
    if at_edge := [short_size(optimum.parameters) for optimum in optima if optimum.at_edge]:
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
    if high > _MAX_FACTOR * low:  # without a resample both are NaN, and that has been said
        doubts.append(f"its 95 % interval, {low:.2g} to {high:.2g}, spans more than a factor of {_MAX_FACTOR:g}")
    if doubts:
        statement = f"Of {name} at {short_size(target)} parameters this says nothing: {'; '.join(doubts)}."
    else:
        statement = (
            f"At {short_size(target)} parameters the best {name} is {best:.2g} (95 % interval {low:.2g} to "
            f"{high:.2g}), if {line}."
        )
    return Extrapolation(target, best, low, high, tuple(doubts), statement)


def short_size(parameters: float) -> str:
    """A number of parameters as it is spoken of: 1.3e9 is 1.3B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return f"{parameters:.3g}"


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
