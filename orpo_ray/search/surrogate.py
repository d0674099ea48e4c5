"""Gaussian process over settings, model sizes and steps, and the information that a further trial would give.

Rasmussen and Williams 2006, chapter 2 (posterior) and 5 (marginal likelihood). With u = x + a·size + b·step, so that
the best setting may drift with size and over training, the covariance of two evaluations is

    base² · M(size, step) + effect² · exp(κ·step + κ·step') · M(u, size, step) + trial² · [same trial] + noise² · [same]

M is Matérn 5/2 with a length scale per coordinate. The first term is the general level of models of this size at this
step; the second is the effect of the setting, and its length scale over size measures how similar sizes are. The
hyperparameters are the most probable ones under broad log-normal priors. No Ray, no torch.

Shape suffixes: N and M evaluations, D axes, H hyperparameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

Array = np.ndarray[Any, np.dtype[np.float64]]

_SIZE_UNIT = math.log(4.0)
"""Sizes of a ladder are often a factor of four apart: that is one unit of the size coordinate."""
_MAX_FIT = 110
"""Number of evaluations used to fit the hyperparameters; the posterior uses all."""
_MAX_ITERATIONS = 25
_BASE_SCALES = (6.0, 4.0)
"""Length scales of the first term, over size and step: the general level changes slowly."""
_JITTER = 1e-6
_SQRT5 = math.sqrt(5.0)


@dataclass(frozen=True, slots=True)
class Places:
    """Points at which evaluations were, or could be, made."""

    x_ND: Array
    """Axes, each scaled to [0, 1]."""
    size_N: Array
    """See `size_coordinate`."""
    step_N: Array
    """See `step_coordinate`."""
    trial_N: np.ndarray[Any, np.dtype[np.int64]]
    """Number of the trial; evaluations of a trial share a deviation."""

    def __len__(self) -> int:
        return len(self.size_N)

    def __getitem__(self, index: Any) -> Places:
        return Places(self.x_ND[index], self.size_N[index], self.step_N[index], self.trial_N[index])

    def joined(self, other: Places) -> Places:
        """These, then the others."""
        return Places(
            np.concatenate([self.x_ND, other.x_ND]),
            np.concatenate([self.size_N, other.size_N]),
            np.concatenate([self.step_N, other.step_N]),
            np.concatenate([self.trial_N, other.trial_N]),
        )


def size_coordinate(parameters: float, largest: float) -> float:
    """log4 of the parameters over those of the largest size: 0 for that, -1 for a quarter of it."""
    return math.log(parameters / largest) / _SIZE_UNIT


def step_coordinate(step: int, max_steps: int) -> float:
    """log2 of the share of the steps done: 0 at the end, -1 at half."""
    return math.log2(step / max_steps)


@dataclass(frozen=True, slots=True)
class _Prior:
    """Prior and bounds of one hyperparameter, on a log scale for positive ones."""

    mean: float
    std: float
    low: float
    high: float


def _priors(num_axes: int) -> list[_Prior]:
    length = [_Prior(math.log(0.35), 0.6, math.log(0.05), math.log(4.0))] * num_axes
    drift = [_Prior(0.0, 0.1, -0.35, 0.35)] * num_axes
    early = [_Prior(0.0, 0.05, -0.2, 0.2)] * num_axes
    return [
        *length,
        *drift,
        *early,
        _Prior(math.log(3.0), 0.8, math.log(0.2), math.log(30.0)),  # length scale over size
        _Prior(math.log(4.0), 0.6, math.log(0.5), math.log(30.0)),  # over step
        _Prior(0.15, 0.15, -0.2, 0.8),  # κ
        _Prior(math.log(1.0), 0.7, math.log(0.05), math.log(6.0)),  # effect
        _Prior(math.log(1.0), 0.7, math.log(0.05), math.log(6.0)),  # base
        _Prior(math.log(0.15), 0.7, math.log(0.01), math.log(1.5)),  # trial
        _Prior(math.log(0.08), 0.7, math.log(0.01), math.log(1.5)),  # noise
    ]


@dataclass(frozen=True, slots=True)
class _Hyper:
    """Named parts of the hyperparameter vector θ_H."""

    length_D: Array
    drift_D: Array
    early_D: Array
    size: float
    step: float
    kappa: float
    effect: float
    base: float
    trial: float
    noise: float

    @classmethod
    def of(cls, theta_H: Array) -> _Hyper:
        d = (len(theta_H) - 7) // 3
        size, step = np.exp(theta_H[3 * d : 3 * d + 2])
        effect, base, trial, noise = np.exp(theta_H[3 * d + 3 :])
        return cls(
            np.exp(theta_H[:d]),
            theta_H[d : 2 * d],
            theta_H[2 * d : 3 * d],
            size,
            step,
            theta_H[3 * d + 2],
            effect,
            base,
            trial,
            noise,
        )


def _matern(r2: Array) -> tuple[Array, Array]:
    """Matérn 5/2 of squared scaled distances, and its derivative with respect to them."""
    root = _SQRT5 * np.sqrt(r2)
    decay = np.exp(-root)
    return (1.0 + root + root * root / 3.0) * decay, (-5.0 / 6.0) * (1.0 + root) * decay


def _effect_coordinates(hyper: _Hyper, places: Places) -> Array:
    """Axes shifted by size and step, then size and step, each divided by its length scale."""
    moved = places.x_ND + np.outer(places.size_N, hyper.drift_D) + np.outer(places.step_N, hyper.early_D)
    size_and_step = np.column_stack([places.size_N / hyper.size, places.step_N / hyper.step])
    return np.concatenate([moved / hyper.length_D, size_and_step], axis=1)


def _base_coordinates(places: Places) -> Array:
    return np.column_stack([places.size_N / _BASE_SCALES[0], places.step_N / _BASE_SCALES[1]])


def _squared(left_NC: Array, right_MC: Array) -> Array:
    """Squared distances [N, M]."""
    sums = (left_NC**2).sum(1)[:, None] + (right_MC**2).sum(1)[None, :]
    return np.maximum(sums - 2.0 * left_NC @ right_MC.T, 0.0)


def _covariance(hyper: _Hyper, left: Places, right: Places) -> Array:
    """Covariance [N, M] of the expectations over seeds: the first two terms."""
    effect = _matern(_squared(_effect_coordinates(hyper, left), _effect_coordinates(hyper, right)))[0]
    growth = np.outer(np.exp(hyper.kappa * left.step_N), np.exp(hyper.kappa * right.step_N))
    base = _matern(_squared(_base_coordinates(left), _base_coordinates(right)))[0]
    return hyper.effect**2 * growth * effect + hyper.base**2 * base


class _Evidence:
    """Negative log posterior of the hyperparameters and its gradient, for one set of evaluations."""

    def __init__(self, places: Places, y_N: Array, priors: list[_Prior]) -> None:
        self._places, self._y, self._priors = places, y_N, priors
        self._mean, self._std = np.array([p.mean for p in priors]), np.array([p.std for p in priors])
        x, size, step = places.x_ND, places.size_N, places.step_N
        self._dx = [x[:, None, d] - x[None, :, d] for d in range(x.shape[1])]
        self._dsize, self._dstep = size[:, None] - size[None, :], step[:, None] - step[None, :]
        self._steps = step[:, None] + step[None, :]
        self._same = (places.trial_N[:, None] == places.trial_N[None, :]).astype(float)
        r2 = (self._dsize / _BASE_SCALES[0]) ** 2 + (self._dstep / _BASE_SCALES[1]) ** 2
        self._base = _matern(r2)[0]

    def __call__(self, theta_H: Array) -> tuple[float, Array]:
        h, d = _Hyper.of(theta_H), len(self._dx)
        du = [(self._dx[k] + h.drift_D[k] * self._dsize + h.early_D[k] * self._dstep) / h.length_D[k] for k in range(d)]
        size2, step2 = (self._dsize / h.size) ** 2, (self._dstep / h.step) ** 2
        value, slope = _matern(sum((one * one for one in du), size2 + step2))
        scale = h.effect**2 * np.exp(h.kappa * self._steps)
        effect, slope = scale * value, 2.0 * scale * slope
        base = h.base**2 * self._base
        trial = h.trial**2 * self._same
        n = len(self._y)
        total = effect + base + trial
        total[np.diag_indices(n)] += h.noise**2 + _JITTER
        try:
            factor = cho_factor(total, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(theta_H)
        alpha = cho_solve(factor, self._y, check_finite=False)
        inverse = cho_solve(factor, np.eye(n), check_finite=False)
        weight = np.outer(alpha, alpha) - inverse  # dL/dθ = ½ tr(weight · dK/dθ)
        sloped = weight * slope

        def trace(matrix: Array) -> float:
            return 0.5 * float(np.vdot(weight, matrix))

        gradient = [-0.5 * float(np.vdot(sloped, one * one)) for one in du]
        gradient += [0.5 * float(np.vdot(sloped, du[k] * self._dsize)) / h.length_D[k] for k in range(d)]
        gradient += [0.5 * float(np.vdot(sloped, du[k] * self._dstep)) / h.length_D[k] for k in range(d)]
        gradient += [-0.5 * float(np.vdot(sloped, size2)), -0.5 * float(np.vdot(sloped, step2))]
        gradient += [trace(effect * self._steps), 2 * trace(effect), 2 * trace(base), 2 * trace(trial)]
        gradient += [h.noise**2 * float(np.trace(weight))]
        loss = 0.5 * float(self._y @ alpha) + float(np.log(np.diag(factor[0])).sum())
        off = (theta_H - self._mean) / self._std
        return loss + 0.5 * float(off @ off), -np.array(gradient) + off / self._std


@dataclass(frozen=True, slots=True)
class Expected:
    """Posterior of the expectations over seeds at M places."""

    mean_M: Array
    std_M: Array
    places: Places
    solved: Array
    """The evaluations' Cholesky factor, inverted, times their covariance with these places."""


@dataclass(frozen=True, slots=True)
class Surrogate:
    """A fitted Gaussian process, in the units of the given values; higher is better."""

    _hyper: _Hyper
    _places: Places
    _factor: Array
    """Lower Cholesky factor of the covariance of the evaluations."""
    _alpha: Array
    _shift: float
    _scale: float

    @classmethod
    def fit(cls, places: Places, value_N: Array) -> Surrogate:
        """Fit the hyperparameters to at most the last 110 evaluations, and condition on all of them.

        Args:
            places: of the evaluations.
            value_N: measured values; higher is better. Extremes should have been cut (see `winsorised`).

        Raises:
            ValueError: no evaluations.
        """
        if not len(places):
            raise ValueError("a surrogate needs at least one evaluation, and got none")
        shift = float(np.mean(value_N))
        scale = max(float(np.std(value_N)), 1e-9)
        y_N = (value_N - shift) / scale
        priors = _priors(places.x_ND.shape[1])
        evidence = _Evidence(places[slice(-_MAX_FIT, None)], y_N[-_MAX_FIT:], priors)
        start = np.array([prior.mean for prior in priors])
        bounds = [(prior.low, prior.high) for prior in priors]
        options = {"maxiter": _MAX_ITERATIONS, "maxfun": 2 * _MAX_ITERATIONS}
        best = minimize(evidence, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return cls._conditioned(_Hyper.of(best.x), places, y_N, shift, scale)

    def on(self, places: Places, value_N: Array) -> Surrogate:
        """The same hyperparameters, conditioned on these evaluations instead."""
        return self._conditioned(self._hyper, places, (value_N - self._shift) / self._scale, self._shift, self._scale)

    @classmethod
    def _conditioned(cls, hyper: _Hyper, places: Places, y_N: Array, shift: float, scale: float) -> Surrogate:
        total = _covariance(hyper, places, places)
        total += hyper.trial**2 * (places.trial_N[:, None] == places.trial_N[None, :])
        total[np.diag_indices(len(places))] += hyper.noise**2 + _JITTER
        factor: Array = np.asarray(np.linalg.cholesky(total), dtype=np.float64)
        alpha = cho_solve((factor, True), y_N)
        return cls(hyper, places, factor, alpha, shift, scale)

    def with_pending(self, places: Places) -> Surrogate:
        """The process as if the expected values had been measured there: expectations stay, uncertainty shrinks.

        A place with a known trial's number counts as another evaluation of that trial. (Kriging believer, Ginsbourger
        et al. 2010.)
        """
        if not len(places):
            return self
        cross = _covariance(self._hyper, places, self._places)
        cross += self._hyper.trial**2 * (places.trial_N[:, None] == self._places.trial_N[None, :])
        y_N = np.concatenate([self._measured(), cross @ self._alpha])
        return self._conditioned(self._hyper, self._places.joined(places), y_N, self._shift, self._scale)

    def _measured(self) -> Array:
        return self._factor @ (self._factor.T @ self._alpha)

    def at(self, places: Places) -> Expected:
        """The posterior of the expectations over seeds at these places."""
        cross = _covariance(self._hyper, self._places, places)
        solved = solve_triangular(self._factor, cross, lower=True, check_finite=False)
        prior = self._hyper.effect**2 * np.exp(2 * self._hyper.kappa * places.step_N) + self._hyper.base**2
        variance = np.maximum(prior - (solved**2).sum(0), 1e-12)
        return Expected(
            self._shift + self._scale * (cross.T @ self._alpha), self._scale * np.sqrt(variance), places, solved
        )

    def covariance(self, left: Expected, right: Expected) -> Array:
        """Posterior covariance [N, M] of the expectations over seeds."""
        prior = _covariance(self._hyper, left.places, right.places)
        return self._scale**2 * (prior - left.solved.T @ right.solved)

    def paired(self, left: Expected, right: Expected) -> Array:
        """Posterior covariance [N] of left[i] and right[i]."""
        hyper, a, b = self._hyper, left.places, right.places
        effect = _matern(((_effect_coordinates(hyper, a) - _effect_coordinates(hyper, b)) ** 2).sum(1))[0]
        base = _matern(((_base_coordinates(a) - _base_coordinates(b)) ** 2).sum(1))[0]
        growth = np.exp(hyper.kappa * (a.step_N + b.step_N))
        prior = hyper.effect**2 * growth * effect + hyper.base**2 * base
        return self._scale**2 * (prior - (left.solved * right.solved).sum(0))

    def prior_covariance(self, places: Places) -> Array:
        """Covariance [N, N] before any evaluation, by the fitted hyperparameters."""
        return self._scale**2 * _covariance(self._hyper, places, places)

    @property
    def noise_std(self) -> float:
        """Standard deviation of one trial's last value around the expectation over seeds."""
        return self._scale * math.hypot(self._hyper.trial, self._hyper.noise)

    def correlation_over_size(self, units: float) -> float:
        """Correlation of a setting's effect at two sizes that are `units` factors of four apart."""
        return float(_matern(np.array([(units / self._hyper.size) ** 2]))[0][0])


def winsorised(value_N: Array) -> Array:
    """Values with the low tail cut, so that a few collapsed settings do not set the scale. Higher is better.

    No value lies further below the median than three times the distance of the best above it.
    """
    median, best = float(np.median(value_N)), float(np.max(value_N))
    return np.maximum(value_N, median - 3.0 * max(best - median, 1e-12))


def _information_table() -> tuple[Array, Array, Array]:
    """Table [R, G] of the mutual information in nats of y and f <= γ, for standard normal y, f with correlation ρ."""
    from scipy.stats import norm

    rho_R, gamma_G = np.linspace(0.0, 0.995, 50), np.linspace(-4.0, 8.0, 61)
    u_U = np.linspace(-7.0, 7.0, 141)
    rho, gamma, u = rho_R[:, None, None], gamma_G[None, :, None], u_U[None, None, :]
    log_tail = norm.logcdf((gamma - rho * u) / np.sqrt(1 - rho**2)) - norm.logcdf(gamma)
    density = norm.pdf(u) * np.exp(log_tail)
    # H(y) - H(y | f <= γ), the latter relative to the normal density: -log p = -log_tail + u²/2 + log √2π.
    cross = (density * (log_tail - 0.5 * u**2)).sum(-1) * (u_U[1] - u_U[0])
    return rho_R, gamma_G, np.maximum(cross + 0.5, 0.0)


_TABLE: tuple[Array, Array, Array] | None = None


def information(rho_M: Array, gamma_M: Array) -> Array:
    """Mutual information, in nats, of an observation y and the event f <= best.

    As in multi-fidelity max-value entropy search (Takeno et al. 2020, arXiv 1901.08275): f is the value at the highest
    fidelity, y what would be observed, at any fidelity.

    Args:
        rho_M: correlation of y and f.
        gamma_M: (best - mean of f) / standard deviation of f.
    """
    global _TABLE
    if _TABLE is None:
        _TABLE = _information_table()
    rho_R, gamma_G, table_RG = _TABLE
    r = np.clip(np.abs(rho_M), 0.0, rho_R[-1]) / (rho_R[1] - rho_R[0])
    g = (np.clip(gamma_M, gamma_G[0], gamma_G[-1]) - gamma_G[0]) / (gamma_G[1] - gamma_G[0])
    r0, g0 = np.minimum(r.astype(int), len(rho_R) - 2), np.minimum(g.astype(int), len(gamma_G) - 2)
    fr, fg = r - r0, g - g0
    low = table_RG[r0, g0] * (1 - fg) + table_RG[r0, g0 + 1] * fg
    high = table_RG[r0 + 1, g0] * (1 - fg) + table_RG[r0 + 1, g0 + 1] * fg
    return np.asarray(low * (1 - fr) + high * fr)
