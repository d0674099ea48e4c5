"""Settings at several model sizes as points of the surrogate: scaled axes, coordinates of sizes and steps.

No Ray, no torch. Shape suffixes: N settings or evaluations, D axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from orpo_ray.config import SweepConfig
from orpo_ray.config.space import LogUniform, Uniform
from orpo_ray.search.surrogate import Array, Places, size_coordinate, step_coordinate, winsorised
from orpo_ray.storage.events import Status
from orpo_ray.storage.sweep_state import SweepState, TrialState

_CURVE_SHARES = (0.125, 0.25, 0.5)
"""Shares of a trial's length at which its curve is kept for the surrogate, besides its last evaluation."""


@dataclass(frozen=True, slots=True)
class Evaluations:
    """Training data of the surrogate."""

    places: Places
    value_N: Array
    """Metric values, higher is better, with the low tail cut."""
    last_N: np.ndarray[Any, Any]
    """Whether the evaluation is the last one of its trial."""
    ended_N: np.ndarray[Any, Any]
    """Whether the trial has ended."""


class SizeSpace:
    """Converts between a sweep's trials and the surrogate's points."""

    def __init__(self, sweep: SweepConfig, parameters: dict[str, int], max_steps: int) -> None:
        """Use the sweep's continuous axes and its bundle axis.

        Args:
            sweep: with a bundle axis whose labels are sizes.
            parameters: bundle label -> parameters of the model.
            max_steps: optimizer steps of a whole trial.
        """
        self._sweep, self._max_steps = sweep, max_steps
        self._sign = 1.0 if sweep.mode == "max" else -1.0
        self._axes = {name: axis for name, axis in sweep.space.items() if isinstance(axis, Uniform | LogUniform)}
        self.labels = sorted(parameters, key=lambda label: parameters[label])
        """Bundle labels, smallest size first."""
        largest = parameters[self.labels[-1]]
        self._coordinate = {label: size_coordinate(parameters[label], largest) for label in self.labels}

    @property
    def num_axes(self) -> int:
        """D, the number of continuous axes."""
        return len(self._axes)

    def params(self, x_D: Array, label: str) -> dict[str, Any]:
        """Trial params (axis -> value, the bundle axis included) of a point in [0, 1]^D."""
        values: dict[str, Any] = {n: _from_unit(a, float(x)) for (n, a), x in zip(self._axes.items(), x_D, strict=True)}
        return {name: label if name == self._sweep.bundle_axis else values[name] for name in self._sweep.space}

    def distance(self, label: str, other: str) -> float:
        """Distance of two sizes in units of the size coordinate, factors of four in parameters."""
        return abs(self._coordinate[label] - self._coordinate[other])

    def ends(self, x_ND: Array, label: str) -> Places:
        """Final evaluations of hypothetical trials at these settings and this size."""
        return Places(x_ND, np.full(len(x_ND), self._coordinate[label]), np.zeros(len(x_ND)), np.full(len(x_ND), -1))

    def pending_ends(self, history: SweepState) -> Places:
        """Final evaluations of the trials in training."""
        numbers = {trial_id: number for number, trial_id in enumerate(history.trials)}
        running = running_trials(history)
        return Places(
            np.array([self._scaled(t.params) for t in running]).reshape(len(running), self.num_axes),
            np.array([self._coordinate[t.bundle] for t in running]),
            np.zeros(len(running)),
            np.array([numbers[t.trial_id] for t in running], dtype=np.int64),
        )

    def evaluations(self, history: SweepState) -> Evaluations:
        """A few evaluations of each trial; a diverged one counts as the worst value seen, at its end."""
        metric, rows, values = self._sweep.metric, [], []
        diverged = []
        for number, trial in enumerate(history.trials.values()):
            if trial.status is Status.DIVERGED:
                diverged.append((number, trial, self._max_steps, True))
            elif trial.status is not Status.FAILED:
                found = {s: m[metric] for s, m in trial.metrics.items() if math.isfinite(m.get(metric, math.nan))}
                for step in _kept_steps(sorted(found), self._max_steps):
                    rows.append((number, trial, step, step == max(found)))
                    values.append(self._sign * found[step])
        value_N = winsorised(np.array(values)) if values else np.zeros(0)
        if values:
            rows += diverged
            value_N = np.concatenate([value_N, np.full(len(diverged), value_N.min())])
        x_ND = np.array([self._scaled(t.params) for _, t, _, _ in rows]).reshape(len(rows), self.num_axes)
        size_N = np.array([self._coordinate[t.bundle] for _, t, _, _ in rows])
        step_N = np.array([step_coordinate(min(step, self._max_steps), self._max_steps) for _, _, step, _ in rows])
        places = Places(x_ND, size_N, step_N, np.array([number for number, _, _, _ in rows], dtype=np.int64))
        last_N = np.array([last for _, _, _, last in rows], dtype=bool)
        ended_N = np.array([trial.status.has_ended for _, trial, _, _ in rows], dtype=bool)
        return Evaluations(places, value_N, last_N, ended_N)

    def _scaled(self, params: dict[str, Any]) -> list[float]:
        return [_to_unit(axis, params[name]) for name, axis in self._axes.items()]


def running_trials(history: SweepState) -> list[TrialState]:
    """Trials in training, or waiting for a worker group."""
    return [trial for trial in history.trials.values() if not trial.status.has_ended and not trial.paused]


def _kept_steps(steps: list[int], max_steps: int) -> list[int]:
    """The step of a trial's last evaluation, and the first one at or after each of `_CURVE_SHARES`."""
    kept = set(steps[-1:])
    for share in _CURVE_SHARES:
        kept.update([step for step in steps if step >= share * max_steps][:1])
    return sorted(kept)


def _to_unit(axis: Uniform | LogUniform, value: float) -> float:
    if isinstance(axis, LogUniform):
        return math.log(value / axis.low) / math.log(axis.high / axis.low)
    return (value - axis.low) / (axis.high - axis.low)


def _from_unit(axis: Uniform | LogUniform, x: float) -> float:
    if isinstance(axis, LogUniform):
        value = axis.low * math.exp(x * math.log(axis.high / axis.low))
    else:
        value = axis.low + x * (axis.high - axis.low)
    return min(max(value, axis.low), axis.high)
