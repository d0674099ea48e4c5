"""Synthetic response surfaces: accuracy over λ, learning rate, model size and step, each drawn by a seed.

Shapes are taken from what is published and from what this repository has recorded; `FAMILIES` says what each varies.

- Learning rate: gentle below the optimum, steep above it, then divergence (experiments/README.md, quickstart). The
  optimum falls as a power of the parameters, with an exponent of about -0.3 or, in another fit, -0.71 (DeepSeek LLM,
  arXiv 2401.02954; Step Law, arXiv 2503.04715).
- λ: steep from 0, flat beyond an optimum (experiments/README.md, lambda_seeds: 0.717, 0.774, 0.818, 0.819 at λ = 0,
  0.1, 0.5, 1), and a larger λ wants a smaller rate.
- Steps: a saturating rise. Early on higher rates look better than they turn out to be (Wu et al. 2018,
  arXiv 1803.02021), and a larger model needs more of its steps to show what it can.
- Noise: 0.02 between seeds (lambda_seeds: standard deviations of 0.009 to 0.044 over 3 seeds), less between
  evaluations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

LAMBDA, LR, SIZE = "loss.orpo_lambda", "optim.lr", "model"
PARAMETERS = {"1m": 1_000_000, "4m": 4_000_000, "16m": 16_000_000, "64m": 64_000_000}
LARGEST = "64m"
LR_LOW, LR_HIGH = 3e-5, 1e-2
"""Wide enough for the optimum of every size in every family."""
MAX_STEPS, EVAL_EVERY = 80, 10
CHANCE = 0.5

FAMILIES = {
    "benign": "the best learning rate falls slowly with size",
    "strong shift": "it falls by more than a decade over the sizes",
    "λ moves": "small models prefer a large λ, large ones a small λ",
    "misleading": "sizes have nothing in common, and the smallest prefers the opposite of the largest",
    "flat and noisy": "little to win, much noise, divergence next to the optimum",
    "sublinear cost": "as benign, and a step costs parameters^0.7 instead of parameters",
}


@dataclass(frozen=True, slots=True)
class _Size:
    """What the response of one model size looks like."""

    log_lr: float
    """log10 of the best learning rate at λ = 0.5 and full length."""
    orpo_lambda: float
    """The best λ."""
    height: float
    """Accuracy over chance at the best setting."""
    pace: float
    """How soon the height is reached: 1 - exp(-pace · share of the steps)."""


class Surface:
    """One response surface. Noise-free values are functions of the setting, noise of (trial number, step) too."""

    def __init__(self, family: str, seed: int) -> None:
        """Draw it.

        Args:
            family: one of `FAMILIES`.
            seed: the same seed gives the same surface.
        """
        self.family, self.seed = family, seed
        self._key = [list(FAMILIES).index(family), seed]
        rng = np.random.default_rng(self._key)
        noisy, moving = family == "flat and noisy", family == "λ moves"
        self._cost_power = 0.7 if family == "sublinear cost" else 1.0
        self._noise, self._eval_noise = (0.045 if noisy else 0.02), 0.008
        self._width_low = rng.uniform(0.9, 1.3) if noisy else rng.uniform(0.45, 0.9)
        self._width_high = rng.uniform(0.35, 0.5) if noisy else rng.uniform(0.2, 0.4)
        self._diverges_at = rng.uniform(0.25, 0.35) if noisy else rng.uniform(0.45, 0.7)
        low, high = (0.05, 0.15) if noisy else (0.4, 0.6) if moving else (0.25, 0.5)
        self._loss_below = rng.uniform(low, high)
        low, high = (0.05, 0.15) if noisy else (0.4, 0.6) if moving else (0.05, 0.4)
        self._loss_above = rng.uniform(low, high)
        self._tilt = rng.uniform(0.0, 0.3)
        self._early_shift = rng.uniform(0.1, 0.4)
        first_height, growth, pace = rng.uniform(0.18, 0.26), rng.uniform(0.02, 0.04), rng.uniform(2, 4)
        first_lr = rng.uniform(-3.0, -2.5)
        exponent = rng.uniform(0.6, 0.8) if family == "strong shift" else rng.uniform(0.2, 0.4)
        first_lambda, drift = rng.uniform(0.25, 0.75), 0.0
        if moving:
            first_lambda = rng.uniform(0.7, 0.9)
            drift = rng.uniform(0.1, 0.3) - first_lambda
        octaves = math.log(PARAMETERS[LARGEST] / PARAMETERS["1m"])
        self._sizes: dict[str, _Size] = {}
        for label, parameters in PARAMETERS.items():
            ratio = parameters / PARAMETERS["1m"]
            log_lr = first_lr - exponent * math.log10(ratio)
            orpo_lambda = first_lambda + drift * math.log(ratio) / octaves
            if family == "misleading":
                log_lr, orpo_lambda = rng.uniform(-4.0, -2.5), rng.uniform(0.1, 0.9)
            height = first_height + growth * math.log(ratio, 4)
            self._sizes[label] = _Size(log_lr, orpo_lambda, height, pace * ratio**-0.1)
        if family == "misleading":
            last, first = self._sizes[LARGEST], self._sizes["1m"]
            centre = (math.log10(LR_LOW) + math.log10(LR_HIGH)) / 2
            self._sizes["1m"] = _Size(2 * centre - last.log_lr, 1 - last.orpo_lambda, first.height, first.pace)

    def value(self, params: dict[str, Any], step: int = MAX_STEPS) -> float:
        """Noise-free accuracy; chance where the setting diverges."""
        lambda_, log_lr = np.array(params[LAMBDA]), np.array(math.log10(params[LR]))
        return float(self._values(self._sizes[params[SIZE]], lambda_, log_lr, step))

    def observed(self, params: dict[str, Any], trial: int, step: int) -> float:
        """With the noise of this trial's seed and of this evaluation."""
        offset = self._noise * np.random.default_rng([*self._key, 1, trial]).standard_normal()
        jitter = self._eval_noise * np.random.default_rng([*self._key, 2, trial, step]).standard_normal()
        return float(np.clip(self.value(params, step) + offset + jitter, 0.0, 1.0))

    def diverges(self, params: dict[str, Any]) -> bool:
        """Whether training at this setting ends in NaN, within its first quarter."""
        size = self._sizes[params[SIZE]]
        return bool(self._offset(size, params[LAMBDA], math.log10(params[LR])) > self._diverges_at)

    def step_seconds(self, label: str) -> float:
        """Device-seconds of an optimizer step: a whole trial of the largest size takes one hour."""
        return 3600.0 / MAX_STEPS * (PARAMETERS[label] / PARAMETERS[LARGEST]) ** self._cost_power

    def quality(self, params: dict[str, Any]) -> float:
        """(value - median random setting) / (best - median), both of the largest size, at full length, noise-free."""
        return (self.value(params) - self._reference[0]) / (self._reference[1] - self._reference[0])

    @cached_property
    def _reference(self) -> tuple[float, float]:
        """Median and best of the largest size, on a fine grid."""
        lambda_, log_lr = np.meshgrid(np.linspace(0, 1, 401), np.linspace(math.log10(LR_LOW), math.log10(LR_HIGH), 401))
        values = self._values(self._sizes[LARGEST], lambda_, log_lr, MAX_STEPS)
        return float(np.median(values)), float(values.max())

    def _offset(self, size: _Size, lambda_: Any, log_lr: Any) -> Any:
        """Decades above the best learning rate for this λ."""
        return log_lr - size.log_lr + self._tilt * (lambda_ - 0.5)

    def _values(self, size: _Size, lambda_: np.ndarray, log_lr: np.ndarray, step: int) -> np.ndarray:
        share = step / MAX_STEPS
        offset = self._offset(size, lambda_, log_lr)
        diverged = offset > self._diverges_at
        offset = offset + self._early_shift * math.log10(share)
        of_lr = np.exp(-0.5 * (offset / np.where(offset < 0, self._width_low, self._width_high)) ** 2)
        below = self._loss_below * ((size.orpo_lambda - lambda_) / size.orpo_lambda) ** 2
        above = self._loss_above * ((lambda_ - size.orpo_lambda) / (1.2 - size.orpo_lambda)) ** 2
        of_lambda = 1 - np.where(lambda_ < size.orpo_lambda, below, above)
        of_step = -math.expm1(-size.pace * share) / -math.expm1(-size.pace)
        return np.where(diverged, CHANCE, CHANCE + size.height * of_step * of_lr * of_lambda)
