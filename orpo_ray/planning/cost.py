"""Cost of trials in device-seconds, measured while the sweep runs. Imports neither Ray nor torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from orpo_ray.storage.sweep_state import SweepState, TrialState

_ASSUMED_EXPONENT = 1.0
"""Power of the parameter count to which step time is proportional, assumed until two sizes have run (Kaplan et al.
2020, arXiv 2001.08361: 6 N operations a token)."""
_EXPONENTS = (0.3, 1.3)
"""Limits of the fitted exponent: overheads that do not grow with the model dominate small models' time."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one trial."""

    seconds: float
    """Device-seconds: training time × workers."""
    wall_seconds: float
    measured: bool
    """Whether trials of this bundle have run; otherwise the cost is an estimate from other bundles."""
    num_sizes: int
    """Number of bundles that have been measured."""


@dataclass(frozen=True, slots=True)
class Remaining:
    """State of a budget, in device-hours."""

    spent: float
    committed: float
    """Expected remaining cost of the trials in training, if each runs to its end."""
    free: float
    """The rest; negative where more is committed than is left."""


class CostModel:
    """Device-seconds of trials, per bundle."""

    def __init__(self, parameters: dict[str, int], devices: dict[str, int]) -> None:
        """
        Args:
            parameters: the model's parameter count, by bundle label.
            devices: workers of a trial, by bundle label.

        Raises:
            ValueError: labels differ, or a number is not positive.
        """
        if parameters.keys() != devices.keys():
            raise ValueError(
                f"parameters are given for {', '.join(parameters)}, devices for {', '.join(devices)}: "
                "both need every bundle"
            )
        for what, numbers in (("parameters", parameters), ("devices", devices)):
            wrong = [label for label, number in numbers.items() if number < 1]
            if wrong:
                raise ValueError(f"{what} of bundle {wrong[0]} must be at least 1, but are {numbers[wrong[0]]}")
        self._parameters = dict(parameters)
        self._devices = dict(devices)

    def device_seconds(self, bundle: str, steps: int, history: SweepState) -> Cost | None:
        """Cost of a trial of `steps` steps; None before any trial of any bundle has reported.

        A bundle that has run costs the median of its trials' device-seconds per step. Any other bundle is scaled from
        the one nearest in size by the ratio of parameters to a power, which is fitted if two sizes have run, else 1.
        """
        rates = self.rates(history)
        if not rates:
            return None
        measured = bundle in rates
        rate = rates[bundle] if measured else self._scaled(bundle, rates)
        return Cost(rate * steps, rate * steps / self._devices[bundle], measured, len(rates))

    def rates(self, history: SweepState) -> dict[str, float]:
        """Device-seconds per step of every bundle that has run, in the order of the bundles."""
        return {
            bundle: median(found)
            for bundle in self._parameters
            if (found := [r for t in history.trials.values() if t.bundle == bundle and (r := _rate(t)) is not None])
        }

    def remaining(self, history: SweepState, budget_device_hours: float) -> Remaining:
        """Parts of a budget that are spent, committed to trials in training, and free. Paused trials commit nothing."""
        rates = self.rates(history)
        committed = 0.0
        for trial in history.trials.values():
            if not trial.status.has_ended and not trial.paused and trial.max_steps is not None and rates:
                rate = rates.get(trial.bundle) or self._scaled(trial.bundle, rates)
                committed += rate * (trial.max_steps - trial.evaluated_step) / 3600.0
        spent = history.device_hours
        return Remaining(spent, committed, budget_device_hours - spent - committed)

    def _scaled(self, bundle: str, rates: dict[str, float]) -> float:
        log_size = {label: math.log(self._parameters[label]) for label in self._parameters}
        nearest = min(rates, key=lambda label: abs(log_size[label] - log_size[bundle]))
        exponent = _ASSUMED_EXPONENT
        if len({log_size[label] for label in rates}) > 1:
            mean_size = sum(log_size[label] for label in rates) / len(rates)
            mean_rate = sum(math.log(rate) for rate in rates.values()) / len(rates)
            covariance = sum((log_size[b] - mean_size) * (math.log(rate) - mean_rate) for b, rate in rates.items())
            fitted = covariance / sum((log_size[label] - mean_size) ** 2 for label in rates)
            exponent = min(max(fitted, _EXPONENTS[0]), _EXPONENTS[1])
        return rates[nearest] * math.exp(exponent * (log_size[bundle] - log_size[nearest]))


def _rate(trial: TrialState) -> float | None:
    """Device-seconds per step; None before the first report, and for a reused result."""
    if trial.reused_from or not trial.seconds:
        return None
    step = max(trial.seconds)
    return trial.device_seconds / step if step and trial.device_seconds > 0 else None
