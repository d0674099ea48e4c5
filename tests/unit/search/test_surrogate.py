"""The Gaussian process over axes, size and step, and what a trial would tell."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from orpo_ray.search.surrogate import Places, Surrogate, information, size_coordinate, step_coordinate, winsorised


def places(x: np.ndarray, size: float | np.ndarray, step: float | np.ndarray = 0.0, first: int = 0) -> Places:
    """One evaluation per trial."""
    n = len(x)
    return Places(x, np.broadcast_to(size, n) * 1.0, np.broadcast_to(step, n) * 1.0, first + np.arange(n))


def bump(where: Places, drift: float = 0.0) -> np.ndarray:
    """Best at 0.5 of the second axis for the largest size, elsewhere moved by `drift` per factor of four."""
    return 0.1 * where.size_N - 4.0 * (where.x_ND[:, 1] - 0.5 + drift * where.size_N) ** 2


def test_it_learns_a_surface_and_is_right_about_how_sure_it_is() -> None:
    rng = np.random.default_rng(0)
    seen = places(rng.random((40, 2)), 0.0)
    surrogate = Surrogate.fit(seen, bump(seen) + 0.02 * rng.standard_normal(40))
    new = places(rng.random((200, 2)), 0.0, first=100)
    expected = surrogate.at(new)
    error = expected.mean_M - bump(new)
    assert np.abs(error).mean() < 0.02
    assert 0.4 < np.std(error / expected.std_M) < 1.6
    assert surrogate.noise_std == pytest.approx(0.02, rel=0.6)


def test_the_drift_of_the_best_setting_is_carried_on_to_a_size_that_has_not_run() -> None:
    """A narrow ridge, at 0.95, 0.8 and 0.65 for the smaller sizes."""

    def ridge(where: Places) -> np.ndarray:
        return np.exp(-0.5 * ((where.x_ND[:, 1] - 0.5 + 0.15 * where.size_N) / 0.08) ** 2)

    rng = np.random.default_rng(1)
    small = [places(rng.random((25, 2)), size, first=25 * i) for i, size in enumerate((-3.0, -2.0, -1.0))]
    seen = small[0].joined(small[1]).joined(small[2])
    surrogate = Surrogate.fit(seen, ridge(seen) + 0.01 * rng.standard_normal(75))
    line = np.column_stack([np.full(201, 0.5), np.linspace(0, 1, 201)])
    expected = surrogate.at(places(line, 0.0, first=100))
    assert line[np.argmax(expected.mean_M), 1] == pytest.approx(0.5, abs=0.03)
    assert expected.mean_M.max() == pytest.approx(1.0, abs=0.15)


def test_sizes_with_nothing_in_common_are_told_from_sizes_that_agree() -> None:
    rng = np.random.default_rng(2)
    small, large = places(rng.random((40, 2)), -1.0), places(rng.random((40, 2)), 0.0, first=40)
    seen = small.joined(large)
    noise = 0.01 * rng.standard_normal(80)
    alike = Surrogate.fit(seen, bump(seen) + noise)
    waves = np.concatenate([np.sin(9 * small.x_ND[:, 0]), np.cos(7 * large.x_ND[:, 1] + 2 * large.x_ND[:, 0])])
    unlike = Surrogate.fit(seen, waves + noise)
    assert alike.correlation_over_size(1.0) > 0.9
    assert unlike.correlation_over_size(1.0) < 0.5


def test_a_pending_trial_narrows_and_moves_nothing() -> None:
    rng = np.random.default_rng(3)
    seen = places(rng.random((20, 2)), 0.0)
    surrogate = Surrogate.fit(seen, bump(seen) + 0.02 * rng.standard_normal(20))
    corner = places(np.array([[0.02, 0.98]]), 0.0, first=50)
    before, after = surrogate.at(corner), surrogate.with_pending(corner).at(corner)
    assert after.mean_M == pytest.approx(before.mean_M, abs=1e-6)
    assert after.std_M[0] < 0.8 * before.std_M[0]


def test_covariances_agree_with_standard_deviations() -> None:
    rng = np.random.default_rng(4)
    seen = places(rng.random((15, 2)), rng.choice([-1.0, 0.0], 15), rng.choice([-3.0, 0.0], 15))
    surrogate = Surrogate.fit(seen, bump(seen))
    there = surrogate.at(places(rng.random((6, 2)), 0.0, first=30))
    full = surrogate.covariance(there, there)
    assert np.sqrt(np.diag(full)) == pytest.approx(there.std_M, rel=1e-6)
    assert surrogate.paired(there, there) == pytest.approx(there.std_M**2, rel=1e-6)
    assert np.all(np.diag(surrogate.prior_covariance(there.places)) >= np.diag(full))


def test_evaluations_of_one_trial_share_its_luck() -> None:
    """Twenty of one lucky trial say less about its setting than twenty trials do."""
    rng = np.random.default_rng(5)
    others = places(rng.random((30, 2)), 0.0, first=100)
    repeats = np.concatenate([others.x_ND, others.x_ND]), np.concatenate([others.trial_N, others.trial_N + 100])
    luck = 0.3 * rng.standard_normal(60)
    base = Places(repeats[0], np.zeros(60), np.zeros(60), repeats[1])
    x = np.full((20, 2), 0.5)
    steps = np.linspace(-0.4, 0.0, 20)
    one = base.joined(Places(x, np.zeros(20), steps, np.zeros(20, dtype=int)))
    many = base.joined(Places(x, np.zeros(20), steps, np.arange(20)))
    value = np.concatenate([bump(base) + luck, np.full(20, 0.3)])
    there = places(x[:1], 0.0, first=500)
    of_one = Surrogate.fit(one, value).at(there).std_M[0]
    assert of_one > 1.5 * Surrogate.fit(many, value).at(there).std_M[0]


def test_information_of_a_perfect_observation_is_what_the_bound_says() -> None:
    """For y = f the mutual information is γφ(γ) / 2Φ(γ) - log Φ(γ) (Wang and Jegelka 2017, eq. 6)."""
    gamma = np.array([-1.0, 0.0, 1.0, 3.0])
    exact = gamma * norm.pdf(gamma) / (2 * norm.cdf(gamma)) - norm.logcdf(gamma)
    told = information(np.full(4, 0.995), gamma)
    assert told == pytest.approx(exact, rel=0.15, abs=2e-3)
    assert np.all(told <= exact)


def test_information_grows_with_correlation_and_is_none_without() -> None:
    told = information(np.array([0.0, 0.3, 0.6, 0.9, -0.9]), np.full(5, 0.5))
    assert told[0] == pytest.approx(0.0, abs=1e-9)
    assert np.all(np.diff(told[:4]) > 0)
    assert told[4] == told[3]


def test_a_collapsed_setting_does_not_decide_the_scale() -> None:
    values = np.array([0.5, 0.6, 0.7, -1e6])
    assert winsorised(values) == pytest.approx([0.5, 0.6, 0.7, 0.55 - 3 * 0.15])
    assert winsorised(np.array([0.5, 0.6])) == pytest.approx([0.5, 0.6])


def test_coordinates() -> None:
    assert size_coordinate(4_000_000, 64_000_000) == pytest.approx(-2.0)
    assert step_coordinate(10, 80) == pytest.approx(-3.0)
    assert math.isclose(step_coordinate(80, 80), 0.0)


def test_no_evaluations_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one evaluation"):
        Surrogate.fit(places(np.zeros((0, 2)), 0.0), np.zeros(0))
