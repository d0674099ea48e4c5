"""What trials cost in device-seconds, measured while the sweep runs. No Ray, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from orpo_ray.storage.sweep_state import SweepState, TrialState

_ASSUMED_EXPONENT = 1.0
"""Of the time per step over parameters, while one size alone has run (Kaplan et al. 2020, arXiv 2001.08361: 6 N
operations a token)."""
_EXPONENTS = (0.3, 1.3)
"""What two measured sizes may say about a third: small models are held up by what does not grow with them."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one trial."""

    seconds: float
    """Device-seconds: training time × workers."""
    wall_seconds: float
    """On the clock."""
    measured: bool
    """Whether trials of this bundle have run; otherwise it is an estimate from other sizes."""
    num_sizes: int
    """Bundles that have been measured."""


@dataclass(frozen=True, slots=True)
class Remaining:
    """A budget's state, in device-hours."""

    spent: float
    committed: float
    """What the trials in training are expected to take still, if each goes on to its end."""
    free: float
    """The rest; below 0 where more was promised than there is."""


class CostModel:
    """Device-seconds of trials, per bundle."""

    def __init__(self, parameters: dict[str, int], devices: dict[str, int]) -> None:
        """Nothing is known about time yet.

        Args:
            parameters: of the model, by bundle label.
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
        """Of a trial of so many steps; None before any trial of any bundle has reported.

        A bundle that has run costs the median of its trials' device-seconds a step. Another costs what the bundle
        nearest in size does, times the ratio of parameters to a power: fitted where two sizes have run, else 1.
        """
        rates = self.rates(history)
        if not rates:
            return None
        measured = bundle in rates
        rate = rates[bundle] if measured else self._scaled(bundle, rates)
        return Cost(rate * steps, rate * steps / self._devices[bundle], measured, len(rates))

    def rates(self, history: SweepState) -> dict[str, float]:
        """Device-seconds a step of every bundle that has run, in the order of the bundles."""
        return {
            bundle: median(found)
            for bundle in self._parameters
            if (found := [r for t in history.trials.values() if t.bundle == bundle and (r := _rate(t)) is not None])
        }

    def remaining(self, history: SweepState, budget_device_hours: float) -> Remaining:
        """What of a budget is spent, promised to trials in training, and free. Paused trials are promised nothing."""
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
    """Device-seconds a step; None before the first report, and for a result that was taken over."""
    if trial.reused_from or not trial.seconds:
        return None
    step = max(trial.seconds)
    return trial.device_seconds / step if step and trial.device_seconds > 0 else None
