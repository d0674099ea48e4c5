"""Made-up sweeps whose truth is known: per-pair scores, results and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from orpo_ray.config import METRIC_MODES
from orpo_ray.storage.pair_scores import PAIRS_FILE, PairScores


def pair_scores(log_odds_N: np.ndarray, nll_N: np.ndarray | float = 1.0, **changes: Any) -> PairScores:
    """Pairs with these log odds and NLLs per token; two tokens, four bytes each."""
    log_odds = np.asarray(log_odds_N, dtype=float)
    num, nll = len(log_odds), np.broadcast_to(nll_N, log_odds.shape)
    arrays: dict[str, Any] = {
        "pair_ids_N": np.array([f"p:{i}".encode() for i in range(num)]),
        "chosen_logp_N": log_odds / 2,
        "rejected_logp_N": -log_odds / 2,
        "log_odds_N": log_odds,
        "odds_ratio_loss_N": np.logaddexp(0, -log_odds),
        "preference_loss_N": np.logaddexp(0, -log_odds),
        "nll_sum_N": 2 * nll,
        "nll_tokens_N": np.full(num, 2),
        "answer_nats_N": 2 * nll,
        "answer_bytes_N": np.full(num, 8),
    }
    return PairScores(**{"step": 1, "nll_reduction": "token", "loss_weights": (1.0, 0.1), **arrays, **changes})


def simulated(
    rng: np.random.Generator, quality: list[float], num_pairs: int = 200, num_seeds: int = 1, seed_sd: float = 0.0
) -> list[list[PairScores]]:
    """[settings][seeds]: log odds of setting + pair + setting × pair + seed + run × pair effects.

    The truth of a setting is its quality: all effects have mean 0.
    """
    pair_N = rng.normal(size=num_pairs)
    return [
        [
            pair_scores(setting + pair_N + own_N + seed_sd * rng.normal() + 0.5 * rng.normal(size=num_pairs))
            for _ in range(num_seeds)
        ]
        for setting, own_N in zip(quality, 0.3 * rng.normal(size=(len(quality), num_pairs)), strict=True)
    ]


def trial(
    trial_id: str, params: dict[str, Any], scores: PairScores | None, status: str = "finished", purpose: str = "search"
) -> dict[str, Any]:
    """A trial as `results.summarize` gives it, with the metrics of its pairs."""
    metrics = {} if scores is None else {metric: scores.value(metric) for metric in METRIC_MODES}
    return {
        "trial_id": trial_id,
        "bundle": "",
        "params": params,
        "purpose": purpose,
        "status": status,
        "attempts": 1,
        "steps": 1,
        "metrics": metrics,
        "checkpoint": f"/runs/{trial_id}/step-1" if metrics else None,
        "mlflow_run_id": None,
        "train_seconds": 1.0,
        "error": None,
    }


def write_pairs(run_dir: Path, trial_id: str, scores: PairScores) -> None:
    """Where a worker would have left them."""
    scores.save(run_dir / "trials" / trial_id / PAIRS_FILE)
