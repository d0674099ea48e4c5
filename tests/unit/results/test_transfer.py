"""Trials made from a known law: it must be found again, and where there is none, nothing may be said."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from orpo_ray.results.transfer import Tried, study

SIZES = (2_000_000, 8_000_000, 32_000_000, 125_000_000)
LAMBDAS = (0.1, 0.3, 1.0, 3.0)


def true_lr(parameters: float) -> float:
    return float(1e-3 * (parameters / 2e6) ** -0.5)


def true_lambda(parameters: float) -> float:
    return float(0.6 * (parameters / 2e6) ** -0.1)


def made(noise=0.0, sizes=SIZES, lambdas=LAMBDAS, num_lrs=7, shift=0.0, seed=0, bend=0.1) -> list[Tried]:
    """A grid around each size's best lr (or `shift` nats above it); the larger the size, the lower all losses."""
    rng = np.random.default_rng(seed)
    trials = []
    for size in sizes:
        for lr in true_lr(size) * np.exp(shift + np.linspace(-2.1, 1.9, num_lrs)):
            for lam in lambdas:
                by_lambda = bend * math.log(lam / true_lambda(size)) ** 2 if lam else 5.0
                loss = bend * math.log(lr / true_lr(size)) ** 2 + by_lambda - 0.3 * math.log(size)
                trials.append(Tried(size, lr, lam, loss + noise * rng.normal()))
    return trials


def test_a_law_without_noise_is_found_exactly() -> None:
    found = study(made(), "min", resamples=50)
    assert found.orpo_lambda is not None
    for law, true, exponent in ((found.lr, true_lr, -0.5), (found.orpo_lambda, true_lambda, -0.1)):
        assert law.exponent == pytest.approx(exponent, abs=1e-9)
        assert (law.exponent_low, law.exponent_high) == pytest.approx((exponent, exponent), abs=1e-9)
        assert math.exp(law.intercept) * 2e6**law.exponent == pytest.approx(true(2e6))
        assert [optimum.parameters for optimum in law.optima] == list(SIZES)
        for optimum in law.optima:
            assert (optimum.best, optimum.low, optimum.high) == pytest.approx((true(optimum.parameters),) * 3)
            assert not optimum.at_edge
        assert law.farthest_off == pytest.approx(1)
        assert law.wrong_way == 0
        assert [each.parameters for each in law.extrapolations] == [1.3e9, 7e9]
        for each in law.extrapolations:
            assert (each.best, each.low, each.high) == pytest.approx((true(each.parameters),) * 3)
            assert each.says_nothing == ()
    statement = found.lr.extrapolations[1].statement
    assert statement.startswith(
        "At 7B parameters the best lr is 1.7e-05 (95 % interval 1.7e-05 to 1.7e-05), if the line"
    )
    assert "4 sizes from 2M to 125M" in statement
    assert found.lr.optima[0].lowest_tried == pytest.approx(1e-3 * math.exp(-2.1))
    assert found.orpo_lambda.optima[0].highest_tried == 3.0


def test_higher_is_better_is_the_same_upside_down() -> None:
    trials = made(0.1)
    turned = [dataclasses.replace(trial, value=-trial.value) for trial in trials]
    up, down = study(turned, "max", resamples=50), study(trials, "min", resamples=50)
    assert up == down


def test_where_there_is_only_a_worst_setting_the_better_end_counts() -> None:
    for shift, better in ((0.0, "lowest_tried"), (0.5, "highest_tried")):  # the end that is farther from the worst
        found = study(made(0.01, shift=shift), "max", resamples=50)
        assert found.lr.wrong_way == 1
        for optimum in found.lr.optima:
            assert optimum.at_edge
            assert optimum.best == pytest.approx(getattr(optimum, better))


def test_intervals_hold_the_truth_at_the_size_asked_about() -> None:
    """100 studies with noise: the 95 % interval for 1.3B parameters."""
    hits = np.zeros(2)
    for number in range(100):
        found = study(made(0.1, sizes=SIZES[:3], num_lrs=6, seed=number), "min", (1.3e9,), resamples=100, seed=number)
        assert found.orpo_lambda is not None
        for at, (law, true) in enumerate(((found.lr, true_lr), (found.orpo_lambda, true_lambda))):
            asked = law.extrapolations[0]
            hits[at] += asked.low <= true(1.3e9) <= asked.high
    assert (hits >= 87).all()
    assert (hits <= 99).all()


def test_noise_alone_says_nothing() -> None:
    for number in range(10):
        found = study(made(1.0, bend=0.0, seed=number), "min", resamples=100)
        assert found.orpo_lambda is not None
        for law in (found.lr, found.orpo_lambda):
            for each in law.extrapolations:
                assert each.says_nothing
                assert each.statement.startswith(f"About {'lr' if law.axis == 'lr' else 'λ'} at ")
                assert "says nothing" in each.statement


def test_a_parabola_that_may_bend_either_way_says_nothing() -> None:
    found = study(made(0.35, num_lrs=4, lambdas=(0.3,)), "min", resamples=300)
    assert 0.1 < found.lr.wrong_way < 1
    assert any("no best between its ends" in doubt for doubt in found.lr.extrapolations[0].says_nothing)


def test_a_best_at_the_edge_is_flagged_and_says_nothing() -> None:
    """At one size every lr tried is above the best one."""
    trials = made(sizes=(SIZES[0], SIZES[2], SIZES[3])) + made(sizes=SIZES[1:2], shift=3.0)
    found = study(trials, "min", resamples=50)
    flagged = [optimum.at_edge for optimum in found.lr.optima]
    assert flagged == [False, True, False, False]
    low = found.lr.optima[1].lowest_tried
    assert found.lr.optima[1].best == pytest.approx(low)
    assert low > true_lr(SIZES[1])
    for each in found.lr.extrapolations:
        assert each.says_nothing == ("the best is at the edge of the range tried at 8M",)
        assert each.statement == (
            f"About lr at {'1.3B' if each.parameters == 1.3e9 else '7B'} parameters this says nothing: the best is at "
            "the edge of the range tried at 8M."
        )
    below = study(made(shift=-3.0), "min", resamples=20).lr.optima
    assert all(optimum.at_edge and optimum.best == pytest.approx(optimum.highest_tried) for optimum in below)


def test_a_curve_that_only_falls_has_no_best_in_between() -> None:
    """The NLL rises with λ without end; a parabola over log λ bends all the same."""
    rng = np.random.default_rng(0)
    trials = [
        dataclasses.replace(trial, value=2 + 0.6 * trial.orpo_lambda + 0.01 * rng.normal()) for trial in made(bend=0.0)
    ]
    law = study(trials, "min", resamples=50).orpo_lambda
    assert law is not None
    assert all(optimum.at_edge and optimum.best > 0.1 for optimum in law.optima)
    assert all("says nothing: the best is at the edge" in each.statement for each in law.extrapolations)


def test_intervals_that_end_where_the_range_does_say_nothing() -> None:
    """The best lr is just within the range: the resamples' best would often lie beyond it."""
    found = study(made(0.15, sizes=SIZES[:3], shift=-0.8), "min", resamples=300)
    assert 0.1 < found.lr.cut_off < 1
    assert not any(optimum.at_edge for optimum in found.lr.optima)
    assert any(optimum.high == pytest.approx(optimum.highest_tried) for optimum in found.lr.optima)
    doubts = found.lr.extrapolations[0].says_nothing
    assert any("a size's best is at the edge of the range tried" in doubt for doubt in doubts)


def test_two_sizes_give_a_line_that_says_nothing() -> None:
    found = study(made(sizes=SIZES[:2]), "min", resamples=20)
    assert found.lr.exponent == pytest.approx(-0.5)
    assert found.lr.extrapolations[0].best == pytest.approx(true_lr(1.3e9))
    for each in found.lr.extrapolations:
        assert each.says_nothing == ("there are 2 sizes, and fewer than 3 are no evidence of a line",)


def test_an_interval_wider_than_a_factor_of_10_says_nothing_of_that_size_only() -> None:
    found = study(made(0.2, sizes=SIZES[:3], num_lrs=8), "min", (1e13, 1.3e8), resamples=300)
    far, near = found.lr.extrapolations
    assert near.high < 10 * near.low
    assert near.says_nothing == ()
    assert far.high > 10 * far.low
    assert len(far.says_nothing) == 1
    assert "spans more than a factor of 10" in far.says_nothing[0]


def test_lambda_neither_disturbs_lr_nor_is_fitted_where_it_cannot_be() -> None:
    # λ = 0 is worse by 5, and was tried at high learning rates only.
    def unbalanced(lambdas):
        return [
            trial for trial in made(lambdas=lambdas) if trial.orpo_lambda or trial.lr > 1.1 * true_lr(trial.parameters)
        ]

    for lambdas, has_lambda in (((0.0, 0.3), False), ((0.0, 0.1, 0.3), False), ((0.0, 0.1, 0.3, 1.0), True)):
        found = study(unbalanced(lambdas), "min", resamples=20)
        assert [optimum.best for optimum in found.lr.optima] == pytest.approx([true_lr(size) for size in SIZES])
        assert (found.orpo_lambda is not None) == has_lambda
    assert found.orpo_lambda is not None
    assert found.orpo_lambda.exponent == pytest.approx(-0.1)
    # At one size only: no line.
    mixed = made(sizes=SIZES[:1]) + made(sizes=SIZES[1:], lambdas=(0.1,))
    assert study(mixed, "min", resamples=20).orpo_lambda is None


def test_resamples_that_cannot_be_fitted_are_counted() -> None:
    """Of 3 trials at 3 learning rates, a resample has all three with probability 6 / 27."""
    three = made(sizes=SIZES[:3], lambdas=(0.1,), num_lrs=3)
    found = study(three, "min", resamples=2000)
    kept = (6 / 27) ** 3
    assert found.degenerate == pytest.approx(2000 * (1 - kept), abs=4 * math.sqrt(2000 * kept))
    assert any("too few different settings" in doubt for doubt in found.lr.extrapolations[0].says_nothing)
    none = study(three, "min", resamples=1, seed=0)
    assert none.degenerate == 1
    assert math.isnan(none.lr.extrapolations[0].low)
    assert none.lr.extrapolations[0].says_nothing == ("100% of the resamples had too few different settings",)
    assert none.lr.extrapolations[0].best == pytest.approx(true_lr(1.3e9))
    assert study(made(), "min", resamples=50).degenerate == 0


def test_a_size_off_the_line_shows() -> None:
    trials = [
        dataclasses.replace(trial, lr=trial.lr * 2) if trial.parameters == SIZES[0] else trial for trial in made()
    ]
    law = study(trials, "min", resamples=20).lr
    at_sizes = np.log([optimum.parameters for optimum in law.optima])
    off = np.log([optimum.best for optimum in law.optima]) - law.intercept - law.exponent * at_sizes
    assert law.farthest_off == pytest.approx(math.exp(np.abs(off).max()))
    assert law.farthest_off > 1.2
    assert f"{law.farthest_off:.2f} at most" in law.extrapolations[0].statement


def test_diverged_trials_are_left_out_and_counted() -> None:
    lost = [Tried(SIZES[0], 1.0, 0.1, math.nan), Tried(SIZES[0], 2.0, 0.1, math.inf)]
    found, plain = study(made(0.1) + lost, "min", resamples=50), study(made(0.1), "min", resamples=50)
    assert found.lr.optima[0].diverged == 2
    assert found.lr.optima[0].trials == 28
    assert found.lr.optima[0].best == plain.lr.optima[0].best
    assert found.lr.extrapolations == plain.lr.extrapolations


def test_a_frame_is_as_good_as_a_list_and_the_seed_decides() -> None:
    trials = made(0.1)
    frame = pd.DataFrame([dataclasses.asdict(trial) for trial in trials]).assign(other="not read")
    assert study(frame, "min", resamples=30) == study(trials, "min", resamples=30)
    assert study(frame, "min", resamples=30) != study(frame, "min", resamples=30, seed=1)


@pytest.mark.parametrize(
    ("trials", "told"),
    [
        ([], "at least 2 model sizes, and has 0"),
        (made(sizes=SIZES[:1]), "at least 2 model sizes, and has 1"),
        (made(num_lrs=2), "at 3 or more lr; 2M has 8 such trials at 2 lr"),
        ([*made(), Tried(7_000_000, 1e-3, 0.1, math.nan)], "7M has 0 such trials at 0 lr"),
        (
            [Tried(size, lr, lam, 1.0) for size in SIZES for lr, lam in ((1e-4, 0.1), (2e-4, 0.2), (4e-4, 0.4))],
            "to tell lr and λ apart; 2M has 3 with a value, at 3 lr and 3 λ",
        ),
        ([Tried(1, 0.0, 0.1, 1.0)], "each lr must be above 0; that of trial 0 is 0"),
        ([Tried(0, 1.0, 0.1, 1.0)], "each parameters must be above 0; that of trial 0 is 0"),
        ([Tried(1, 1.0, 0.1, 1.0), Tried(1, 1.0, -0.1, 1.0)], "each orpo_lambda must be 0 or above; that of trial 1"),
        ([Tried(1, math.nan, 0.1, 1.0)], "each lr must be above 0; that of trial 0 is nan"),
        (pd.DataFrame({"parameters": [1], "lr": [1.0]}), "orpo_lambda, value missing"),
    ],
)
def test_what_cannot_be_fitted_is_refused(trials, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        study(trials, "min", resamples=2)


def test_wrong_modes_and_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="one of max, min, and is 'best'"):
        study(made(), "best")
    with pytest.raises(ValueError, match="parameters above 0; -1 is not"):
        study(made(), "min", (7e9, -1))
