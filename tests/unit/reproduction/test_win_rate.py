"""Win rates by hand and on simulated rewards whose true win rate is known."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from orpo_ray.reproduction.win_rate import histogram, win_rate
from orpo_ray.results.bootstrap import draws


def test_by_hand() -> None:
    a_RN = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 3.0, 4.0]])
    b_RN = np.array([[0.0, 2.0, 5.0, 1.0], [2.0, 1.0, 3.0, 0.0]])
    found = win_rate(a_RN, b_RN)
    assert found.per_round_R.tolist() == [2.5 / 4, 1.5 / 4]  # won, tied, lost, won; lost, lost, tied, won
    assert found.mean == 0.5
    assert found.std_over_rounds == pytest.approx(0.25 / math.sqrt(2))  # of two values, n - 1 below
    other = win_rate(b_RN, a_RN)
    assert other.per_round_R.tolist() == [1.5 / 4, 2.5 / 4]
    assert (1 - other.high, 1 - other.low) == pytest.approx((found.low, found.high))


def test_a_model_against_the_very_same_answers_is_at_50_percent_exactly() -> None:
    rewards_RN = np.random.default_rng(0).normal(size=(3, 101))
    found = win_rate(rewards_RN, rewards_RN.copy())
    assert found.per_round_R.tolist() == [0.5] * 3
    assert (found.mean, found.std_over_rounds, found.low, found.high) == (0.5, 0.0, 0.5, 0.5)


def test_a_model_against_itself_with_other_draws_is_at_50_percent_within_the_interval() -> None:
    rng = np.random.default_rng(1)
    of_prompt_N = rng.normal(size=400)
    found = win_rate(of_prompt_N + rng.normal(size=(3, 400)), of_prompt_N + rng.normal(size=(3, 400)))
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.08


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_interval_holds_the_true_win_rate_in_95_percent_of_studies(rounds: int) -> None:
    """600 studies of 80 prompts; A is better by 0.5 on average, and by how much differs from prompt to prompt."""
    rng = np.random.default_rng(2)
    # A's lead over B in one round is normal, with variance 1 from the prompt and 2 from the two answers.
    true = norm.cdf(0.5 / math.sqrt(3))
    hits = 0
    for number in range(600):
        lead_N = 0.5 + rng.normal(size=80)
        found = win_rate(lead_N + rng.normal(size=(rounds, 80)), rng.normal(size=(rounds, 80)), 300, seed=number)
        hits += found.low <= true <= found.high
    assert 0.92 <= hits / 600 <= 0.98


def test_rounds_on_the_same_prompts_are_not_as_many_prompts() -> None:
    """Answers that hardly differ between rounds: 9 rounds of 100 prompts say no more than one."""
    rng = np.random.default_rng(3)
    a_N, b_N = rng.normal(size=(2, 100))
    a_RN, b_RN = (rewards_N + 0.01 * rng.normal(size=(9, 100)) for rewards_N in (a_N, b_N))
    found = win_rate(a_RN, b_RN)
    error = math.sqrt(found.mean * (1 - found.mean))
    half = (found.high - found.low) / 2
    assert half == pytest.approx(1.96 * error / math.sqrt(100), rel=0.1)
    assert half > 2.5 * 1.96 * error / math.sqrt(900)  # what counting 900 independent answers would give
    assert half > 5 * found.std_over_rounds  # which says nothing of other prompts


@pytest.mark.filterwarnings("error")
def test_of_one_round_there_is_no_spread_over_rounds() -> None:
    assert math.isnan(win_rate(np.ones((1, 3)), np.zeros((1, 3))).std_over_rounds)


def test_the_same_seed_gives_the_same_interval() -> None:
    a_RN, b_RN = np.random.default_rng(4).normal(size=(2, 3, 50))
    first, again, other = (win_rate(a_RN, b_RN, seed=seed) for seed in (0, 0, 1))
    assert (first.low, first.high) == (again.low, again.high)
    assert (first.low, first.high) != (other.low, other.high)


def test_prompts_are_drawn_in_blocks_that_bound_the_memory() -> None:
    blocks = list(draws(1_500_000, 5, seed=0))
    assert [len(block) for block in blocks] == [2, 2, 1]
    for block in blocks:
        assert (block.sum(1) == 1_500_000).all()
    assert blocks[0].var() == pytest.approx(1, rel=0.01)  # with replacement: nearly Poisson(1)


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), r"must both be \[rounds, prompts\], but are \(3, 4\) and \(3, 5\)"),
        (np.zeros(4), np.zeros(4), r"\(4,\) and \(4,\)"),
        (np.zeros((3, 1)), np.zeros((3, 1)), "at least 1 round and 2 prompts, but has 3 and 1"),
        (np.zeros((0, 4)), np.zeros((0, 4)), "has 0 and 4"),
        (np.zeros((1, 2)), np.array([[0.0, np.nan]]), r"1 of B's 2 rewards are not, the first at \(0, 1\): nan"),
        (np.array([[np.inf, np.inf]]), np.zeros((1, 2)), r"2 of A's 2 rewards are not, the first at \(0, 0\): inf"),
    ],
)
def test_wrong_rewards_are_refused(a, b, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        win_rate(a, b)


def test_the_histogram_shows_every_model_in_the_same_bins() -> None:
    rng = np.random.default_rng(5)
    rewards = {"SFT": rng.normal(size=(3, 500)), "DPO": rng.normal(1, 0.5, 700), "ORPO": rng.normal(2, 1, (2, 300))}
    figure = histogram(rewards, unit="reward of RM-350M")
    (axis,) = figure.axes
    assert axis.get_xlabel() == "reward of RM-350M"
    assert axis.get_ylabel() == "density"
    outlines = axis.patches[1::2]
    labels = [f"{name}, mean {values.mean():.3g}" for name, values in rewards.items()]
    assert [patch.get_label() for patch in outlines] == labels
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    assert len({(patch.get_edgecolor(), patch.get_linestyle()) for patch in outlines}) == 3
    for patch, values in zip(outlines, rewards.values(), strict=True):
        density, edges, _ = patch.get_data()
        assert edges.tolist() == outlines[0].get_data()[1].tolist()
        assert density @ np.diff(edges) == pytest.approx(1)
        assert density @ np.diff(edges**2) / 2 == pytest.approx(values.mean(), abs=np.diff(edges).max())
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("rewards", "told"),
    [
        ({}, "there is no model"),
        ({"SFT": np.zeros(3), "ORPO": np.zeros(0)}, "SFT 3, ORPO 0"),
        ({"SFT": np.array([0.0, np.nan])}, "1 of SFT's 2 rewards are not"),
    ],
)
def test_a_histogram_of_nothing_is_refused(rewards, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        histogram(rewards)


def test_a_histogram_of_one_value_is_drawn() -> None:
    histogram({"SFT": np.zeros(3)}).canvas.draw()
