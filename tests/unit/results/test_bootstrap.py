"""Simulated sweeps whose truth is known: what 95 % is said to hold must hold about that often."""

import time

import numpy as np
import pytest
from scipy.stats import norm

from orpo_ray.results.bootstrap import compare_with_best, optimism, pareto_front, resample, setting_replicates
from tests.support.sweeps import pair_scores, simulated

METRIC = "eval/log_odds"


def flat(settings):
    """Trials, and the setting of each."""
    return [run for runs in settings for run in runs], [s for s, runs in enumerate(settings) for _ in runs]


def compared(settings, resamples=400, seed=0, mode="max"):
    trials, setting_J = flat(settings)
    value_S, replicate_BS = setting_replicates(resample(trials, METRIC, resamples, seed), setting_J, seed)
    return compare_with_best(value_S, replicate_BS, mode), value_S, replicate_BS


def test_resamples_are_of_pairs_and_the_same_for_all_trials() -> None:
    rng = np.random.default_rng(0)
    scores = pair_scores(rng.normal(size=50), nll_N=rng.uniform(1, 3, 50), nll_tokens_N=rng.integers(1, 9, 50))
    shifted = pair_scores(scores.log_odds_N + 2.0, nll_N=1.0)
    found = resample([scores, shifted], METRIC, 3000)
    assert found.value_J == pytest.approx([scores.value(METRIC), scores.value(METRIC) + 2.0], rel=1e-12)
    assert found.drawn_BJ[:, 1] - found.drawn_BJ[:, 0] == pytest.approx(2.0)  # paired
    assert found.drawn_BJ[:, 0].std() == pytest.approx(scores.log_odds_N.std() / np.sqrt(50), rel=0.05)
    # What was drawn and what was left lie on opposite sides of the mean.
    apart = np.polyfit(found.drawn_BJ[:, 0], found.left_BJ[:, 0], 1)[0]
    assert apart == pytest.approx(-1, abs=0.15)
    # A ratio of sums, not a mean of ratios: its spread by the delta method.
    ratio = resample([scores], "eval/nll", 3000)
    top, tokens = scores.nll_sum_N, scores.nll_tokens_N
    assert ratio.value_J[0] == pytest.approx(top.sum() / tokens.sum(), rel=1e-12)
    residual = (top - ratio.value_J[0] * tokens) / tokens.mean()
    assert ratio.drawn_BJ.std() == pytest.approx(residual.std() / np.sqrt(50), rel=0.1)


def test_the_truly_best_is_in_the_tied_set_and_means_are_covered() -> None:
    """95 % intervals over pairs: 300 sweeps of 6 equal settings, one seed each."""
    rng = np.random.default_rng(1)
    kept = covered = everyone = 0
    for number in range(300):
        found, _, replicate_BS = compared(simulated(rng, [0.0] * 6), seed=number)
        kept += found.tied_S[2]
        everyone += found.tied_S.all()
        low, high = np.quantile(replicate_BS[:, 2], [0.025, 0.975])
        covered += low <= 0.0 <= high
    assert kept / 300 >= 0.93
    assert 0.91 <= covered / 300 <= 0.99
    assert everyone / 300 >= 0.75  # equal settings tie, mostly all of them


@pytest.mark.parametrize(("seed_sd", "num_seeds"), [(0.1, 4), (0.03, 4), (0.1, 2)])
def test_coverage_with_seeds(seed_sd: float, num_seeds: int) -> None:
    rng = np.random.default_rng(2)
    kept = covered = 0
    for number in range(250):
        settings = simulated(rng, [0.02, 0.0, 0.0], num_seeds=num_seeds, seed_sd=seed_sd)
        found, _, replicate_BS = compared(settings, seed=number)
        kept += found.tied_S[0]
        low, high = np.quantile(replicate_BS[:, 0], [0.025, 0.975])
        covered += low <= 0.02 <= high
    assert kept / 250 >= 0.93
    assert 0.91 <= covered / 250 <= 0.995


def test_the_seed_counts_where_pairs_alone_would_be_sure() -> None:
    """One seed each, seed effects far larger than the pairs' noise: pairs alone call a chance winner clear."""
    rng = np.random.default_rng(3)
    alone = together = 0
    for number in range(40):
        settings = simulated(rng, [0.0, 0.0], num_seeds=3, seed_sd=0.5)
        alone += compared([runs[:1] for runs in settings], seed=number)[0].tied_S.all()
        together += compared(settings, seed=number)[0].tied_S.all()
    assert alone < 20
    assert together >= 35


def test_clearly_worse_settings_are_told_from_the_best() -> None:
    rng = np.random.default_rng(4)
    # Differences have a standard error of 0.58 / √200 = 0.06.
    for number, mode in enumerate(["max", "min"] * 10):
        sign = 1 if mode == "max" else -1
        settings = simulated(rng, [sign * q for q in (0.0, 0.0, -0.5, -3.0)])
        found, value_S, _ = compared(settings, seed=number, mode=mode)
        assert found.best in (0, 1)
        assert found.tied_S[2:].tolist() == [False, False]
        assert found.difference_S == pytest.approx(value_S - value_S[found.best])
    assert found.half_S[found.best] == 0
    assert 2.0 * 0.058 < found.half_S[2] < 3.2 * 0.058  # wider than a single comparison's 1.96, as it is one of three


def test_trials_that_gave_the_same_on_every_pair_are_tied() -> None:
    scores = pair_scores(np.random.default_rng(0).normal(size=30))
    found, *_ = compared([[scores], [scores], [pair_scores(scores.log_odds_N - 1.0)]])
    assert found.tied_S.tolist() == [True, True, False]
    found, *_ = compared([[scores]])
    assert found.tied_S.tolist() == [True]


@pytest.mark.parametrize("num_settings", [5, 20])
def test_optimism_of_a_choice_among_equals_is_what_the_theory_says(num_settings: int) -> None:
    """The best of k equal settings looks E[max of k normals] standard errors too good."""
    rng = np.random.default_rng(5)
    reps, sd = 150, np.sqrt(0.3**2 + 0.5**2)
    estimates = []
    for number in range(reps):
        trials, setting_J = flat(simulated(rng, [0.0] * num_settings))
        estimates.append(optimism(resample(trials, METRIC, 300, seed=number), setting_J, "max"))
    at = np.linspace(-8, 8, 4001)
    largest = np.trapezoid(at * num_settings * norm.pdf(at) * norm.cdf(at) ** (num_settings - 1), at)
    expected = largest * sd / np.sqrt(200)
    error = np.std(estimates) / np.sqrt(reps)
    assert np.mean(estimates) == pytest.approx(expected, abs=max(3 * error, 0.04 * expected))


def test_optimism_is_signed_by_what_is_better_and_small_for_a_clear_winner() -> None:
    rng = np.random.default_rng(6)
    trials, setting_J = flat(simulated(rng, [0.0] * 10))
    up, down = (optimism(resample(trials, METRIC), setting_J, mode) for mode in ("max", "min"))
    assert up > 0.03
    assert down > 0.03
    trials, setting_J = flat(simulated(rng, [3.0] + [0.0] * 9))
    assert abs(optimism(resample(trials, METRIC), setting_J, "max")) < 0.01


def test_the_front_by_hand() -> None:
    # a, b, c: beaten by b in cost, d = b, e: beaten by f in cost, f, g: beaten by a in gain
    cost = np.array([1.0, 2.0, 2.5, 2.0, 4.0, 3.0, 1.0])
    gain = np.array([0.1, 0.5, 0.5, 0.5, 0.9, 0.9, 0.0])
    first = [True, True, False, True, False, True, False]
    assert pareto_front(cost, gain).tolist() == first
    # Cost turned round: e costs least and gains most.
    stacked = pareto_front(np.stack([cost, -cost]), np.stack([gain, gain]))
    assert stacked.tolist() == [first, [False, False, False, False, True, False, False]]
    assert pareto_front(np.array([]), np.array([])).tolist() == []


def test_fifty_settings_take_less_than_two_seconds() -> None:
    trials, setting_J = flat(simulated(np.random.default_rng(0), [0.0] * 50, num_pairs=512))
    started = time.process_time()
    drawn = resample(trials, METRIC)
    value_S, replicate_BS = setting_replicates(drawn, setting_J)
    compare_with_best(value_S, replicate_BS, "max")
    optimism(drawn, setting_J, "max")
    pareto_front(replicate_BS, resample(trials, "eval/preference_accuracy").drawn_BJ)
    assert time.process_time() - started < 2
    assert replicate_BS.shape == (2000, 50)
