"""How far held-out metrics may differ: as far as moved log-probabilities move them, and not much further."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from orpo_ray.results.verify import Check, Comparison, allowed
from tests.support.sweeps import pair_scores

NATS = 1e-3


def log_odds(chosen_N: np.ndarray, rejected_N: np.ndarray) -> np.ndarray:
    return (chosen_N - np.log(-np.expm1(chosen_N))) - (rejected_N - np.log(-np.expm1(rejected_N)))


@pytest.mark.parametrize("level", [-0.02, -0.5, -6.0])
def test_log_odds_may_move_by_what_they_amplify(level: float) -> None:
    chosen_N, rejected_N = np.full(8, level), np.full(8, 1.5 * level)
    scores = pair_scores(np.zeros(8), chosen_logp_N=chosen_N, rejected_logp_N=rejected_N)
    step = NATS * np.maximum(1.0, np.abs(chosen_N)), NATS * np.maximum(1.0, np.abs(rejected_N))
    moved = np.mean(log_odds(chosen_N + step[0], rejected_N - step[1]) - log_odds(chosen_N, rejected_N))
    assert moved == pytest.approx(allowed("eval/log_odds", scores, NATS), rel=0.05)


def test_accuracy_may_move_by_the_pairs_that_are_nearly_tied() -> None:
    chosen_N = np.array([-1.0, -1.0, -1.0, -1.0])
    rejected_N = np.array([-1.0, -1.0015, -1.003, -2.0])  # the first two are within twice 1e-3
    scores = pair_scores(np.zeros(4), chosen_logp_N=chosen_N, rejected_logp_N=rejected_N)
    assert allowed("eval/preference_accuracy", scores, NATS) == 0.5


def test_log_probabilities_may_move_by_their_size() -> None:
    scores = pair_scores(np.zeros(2), chosen_logp_N=np.array([-0.5, -4.0]), rejected_logp_N=np.array([-3.0, -3.0]))
    assert allowed("eval/chosen_logp", scores, NATS) == pytest.approx(2.5 * NATS)
    assert allowed("eval/rejected_logp", scores, NATS) == pytest.approx(3 * NATS)
    assert allowed("eval/nll", replace(scores, nll_sum_N=np.full(2, 10.0)), NATS) == pytest.approx(5 * NATS)


def test_a_check_passes_only_with_numbers_that_all_agree() -> None:
    same, other = Comparison("eval/nll", 1.0, 1.00001, 1e-4), Comparison("eval/nll", 1.0, 1.1, 1e-4)
    lost = Comparison("eval/nll", float("nan"), 1.0, 1e-4)
    assert Check((same,)).passed
    assert not Check((same, other)).passed
    assert not Check((same, lost)).passed
    assert not Check(()).passed
    assert not Check((same,), "other tokens").passed
