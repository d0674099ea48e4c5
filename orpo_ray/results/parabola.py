"""The parabolas of one model size: the metric over log lr and log λ, fitted by least squares, and their vertices.

Shape suffixes: T trials of the size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from orpo_ray.formatting import short_count
from orpo_ray.results.bootstrap import Mode

Axis = Literal["lr", "orpo_lambda"]

_MIN_VALUES = 3
"""Distinct values that a parabola needs."""


@dataclass(frozen=True, slots=True)
class Vertex:
    """Where a parabola is best within the range tried."""

    log_best: float
    """Natural logarithm of the best value."""
    at_edge: bool
    """Whether that is an end of the range."""
    wrong_way: bool
    """Whether the parabola opens the wrong way, so that its vertex is the worst value."""


@dataclass(frozen=True, slots=True, eq=False)
class SizeFit:
    """The trials of one size that have a value."""

    parameters: int
    lr_T: np.ndarray
    lambda_T: np.ndarray
    cost_T: np.ndarray
    """The value, negated where higher is better."""
    diverged: int
    """Number of trials without a value."""
    tried: dict[Axis, tuple[float, float]]
    """Axis -> lowest and highest value tried; λ only where it has a parabola."""

    def best_is_an_end(self, axis: Axis) -> bool:
        """Whether the lowest or the highest value tried has the best mean.

        A monotonic curve may bend as well; its parabola then has an optimum inside the range that no trial shows.
        """
        values_T = self.lr_T if axis == "lr" else self.lambda_T
        is_on = values_T > 0
        means = pd.Series(self.cost_T[is_on]).groupby(values_T[is_on]).mean()
        return bool(means.idxmin() in (means.index[0], means.index[-1]))

    @classmethod
    def of(cls, frame: pd.DataFrame, mode: Mode) -> SizeFit:
        """Collect the trials of a size.

        Raises:
            ValueError: the trials with a value are too few or too alike.
        """
        valued = frame[np.isfinite(frame["value"])]
        lr_T, lambda_T = valued["lr"].to_numpy(), valued["orpo_lambda"].to_numpy()
        parameters, positive = int(frame["parameters"].iloc[0]), lambda_T[lambda_T > 0]
        if len(np.unique(lr_T)) < _MIN_VALUES:
            raise ValueError(
                f"each size needs trials with a value at {_MIN_VALUES} or more lr; {short_count(parameters)} has "
                f"{len(valued)} such trials at {len(np.unique(lr_T))} lr"
            )
        tried: dict[Axis, tuple[float, float]] = {"lr": (float(lr_T.min()), float(lr_T.max()))}
        if len(np.unique(positive)) >= _MIN_VALUES:
            tried["orpo_lambda"] = (float(positive.min()), float(positive.max()))
        cost_T = valued["value"].to_numpy() * (1.0 if mode == "min" else -1.0)
        size = cls(parameters, lr_T, lambda_T, cost_T, len(frame) - len(valued), tried)
        if size.fit(np.arange(len(cost_T))) is None:
            raise ValueError(
                f"each size needs enough trials to tell lr and λ apart; {short_count(parameters)} has {len(valued)} "
                f"with a value, at {len(np.unique(lr_T))} lr and {len(np.unique(lambda_T))} λ"
            )
        return size

    @property
    def trials(self) -> int:
        return len(self.cost_T)

    def fit(self, rows: np.ndarray) -> dict[Axis, Vertex] | None:
        """Fit the parabolas to the trials with these row numbers; None where they are too few or too alike."""
        lr_T, lambda_T = self.lr_T[rows], self.lambda_T[rows]
        # Scaled to -1..1: columns of similar size keep the least squares well conditioned.
        x_T = _scaled(lr_T, self.tried["lr"])
        columns = [np.ones(len(rows)), x_T, x_T**2]
        apart = np.unique(lambda_T)[1:]  # each λ except the lowest gets its own constant
        if "orpo_lambda" in self.tried:
            is_on = lambda_T > 0
            z_T = np.zeros(len(rows))
            z_T[is_on] = _scaled(lambda_T[is_on], self.tried["orpo_lambda"])
            columns += [z_T, z_T**2]
            apart = np.unique(lambda_T[~is_on])  # λ = 0, if it was tried
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


def _vertex(slope: float, bend: float, tried: tuple[float, float]) -> Vertex:
    """Where slope · x + bend · x² is lowest for x from -1 to 1, the range tried."""
    middle, half = _middle_and_half(tried)
    if bend <= 0:
        return Vertex(middle - half * math.copysign(1, slope), at_edge=True, wrong_way=True)
    # Compare before dividing: a nearly flat parabola would overflow.
    if abs(slope) >= 2 * bend:
        return Vertex(middle - half * math.copysign(1, slope), at_edge=True, wrong_way=False)
    return Vertex(middle - half * slope / (2 * bend), at_edge=False, wrong_way=False)
