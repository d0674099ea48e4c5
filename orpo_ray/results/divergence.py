"""The highest learning rate at which training stays stable, for each λ, estimated from how trials ended."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from orpo_ray.results.frames import LAMBDA, LR
from orpo_ray.storage.events import Status

_HELD = (Status.FINISHED, Status.STOPPED_EARLY)
_MAX_BINS = 8
_MIN_EACH = 3
"""Smallest number of trials that held, and of trials that diverged, for a fit."""


def divergence_boundaries(trials: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The boundary over (lr, λ) of each bundle.

    A trial that was stopped early counts as held. A trial that failed (a crash, not a divergence) is ignored.

    Args:
        trials: the trials from `results.summarize`.

    Returns:
        bundle -> a dict with these keys:

        - `held` and `diverged`: numbers of trials;
        - `rows`, one per λ (none where lr is not an axis), each with `lambda_low` and `lambda_high` (equal where λ has
          at most eight values, null where λ is not an axis), `held` and `diverged` (counts), `largest_lr_held`,
          `smallest_lr_diverged`, and `lr_50`: where a logistic curve over log lr and λ predicts divergence with a
          probability of 50 %; null where it was not fitted or lies outside the learning rates tried;
        - `no_fit`: why there is no curve, or null.
    """
    bundles: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if trial["status"] in (*_HELD, Status.DIVERGED):
            bundles.setdefault(trial["bundle"], []).append(trial)
    return {bundle: _boundary(of_bundle) for bundle, of_bundle in bundles.items()}


def _boundary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    diverged_T = np.array([t["status"] == Status.DIVERGED for t in trials])
    counts = {"held": int((~diverged_T).sum()), "diverged": int(diverged_T.sum())}
    if any(LR not in t["params"] for t in trials):
        return {**counts, "rows": [], "no_fit": f"{LR} is not an axis of this sweep"}
    lr_T = np.array([float(t["params"][LR]) for t in trials])
    has_lambda = all(LAMBDA in t["params"] for t in trials)
    lambda_T = np.array([float(t["params"][LAMBDA]) if has_lambda else math.nan for t in trials])
    fit = _fit(lr_T, lambda_T, diverged_T)
    rows = []
    for low, high in _bins(lambda_T) if has_lambda else [(None, None)]:
        here_T = (lambda_T >= low) & (lambda_T <= high) if low is not None else np.ones(len(lr_T), dtype=bool)
        held, lost = lr_T[here_T & ~diverged_T], lr_T[here_T & diverged_T]
        middle = math.nan if low is None or high is None else (low + high) / 2
        rows.append(
            {
                "lambda_low": low,
                "lambda_high": high,
                "held": len(held),
                "diverged": len(lost),
                "largest_lr_held": float(held.max()) if len(held) else None,
                "smallest_lr_diverged": float(lost.min()) if len(lost) else None,
                "lr_50": _lr_50(fit, middle, lr_T) if not isinstance(fit, str) else None,
            }
        )
    return {**counts, "rows": rows, "no_fit": fit if isinstance(fit, str) else None}


def _bins(lambda_T: np.ndarray) -> list[tuple[float, float]]:
    """Each λ, or intervals with similar numbers of values where λ was drawn from a range; from low to high."""
    values = np.unique(lambda_T)
    if len(values) <= _MAX_BINS:
        return [(float(value), float(value)) for value in values]
    return [(float(part[0]), float(part[-1])) for part in np.array_split(values, _MAX_BINS // 2)]


def _fit(lr_T: np.ndarray, lambda_T: np.ndarray, diverged_T: np.ndarray) -> tuple[float, float, float] | str:
    """Log-odds of divergence as (constant, per decade of lr, per unit of λ), or the reason for having no fit."""
    rare = min(int(diverged_T.sum()), int((~diverged_T).sum()))
    if rare < _MIN_EACH:
        return (
            f"a curve needs at least {_MIN_EACH} trials that diverged and {_MIN_EACH} that held; here "
            f"{int(diverged_T.sum())} diverged and {int((~diverged_T).sum())} held"
        )
    features_TF = np.stack([np.log10(lr_T), np.nan_to_num(lambda_T)], axis=1)
    spread_F = features_TF.std(0)
    if spread_F[0] == 0:
        return "all trials have the same learning rate"
    from sklearn.linear_model import LogisticRegression  # slow to import

    used_F = spread_F > 0
    centre_F = features_TF.mean(0)
    scaled_TF = (features_TF - centre_F)[:, used_F] / spread_F[used_F]
    # The small penalty keeps the slope finite where a line separates the outcomes; the 50 % point is then half-way.
    model = LogisticRegression(C=100.0, max_iter=1000).fit(scaled_TF, diverged_T)
    slope_F = np.zeros(2)
    slope_F[used_F] = model.coef_[0] / spread_F[used_F]
    if slope_F[0] <= 0:
        return "in these trials divergence does not become more frequent with the learning rate"
    return float(model.intercept_[0] - slope_F @ centre_F), float(slope_F[0]), float(slope_F[1])


def _lr_50(fit: tuple[float, float, float], lam: float, lr_T: np.ndarray) -> float | None:
    constant, per_decade, per_lambda = fit
    at = -(constant + (0.0 if math.isnan(lam) else per_lambda * lam)) / per_decade
    return float(10**at) if math.log10(lr_T.min()) <= at <= math.log10(lr_T.max()) else None
