"""The simulation of the paper's Figure 6, against what is exact and against what seed 0 drew."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import kstest

from orpo_ray.reproduction import ratio_simulation
from orpo_ray.reproduction.ratio_simulation import (
    BETAS,
    LOG_ODDS_DISTRIBUTION,
    QUANTILES,
    draw,
    log_probability_distribution,
    simulate,
    summary,
)

# name -> std, share beyond 1, share beyond 4, mean of -log σ(z), std of δ, share settled, settles at
GOLDEN = {
    "log probability ratio, β = 0.2": (0.2821178768, 0.00632, 0.0, 0.7026016726, 0.0681132562, 0.00002, 59049.0),
    "log probability ratio, β = 1": (1.4105893838, 0.3708, 0.0174, 0.8846175296, 0.2389293298, 0.055, 9.0),
    "log odds ratio": (2.5676536346, 0.67656, 0.11462, 1.2305768232, 0.3417392051, 0.18464, 9.0),
}


@pytest.fixture(scope="module")
def simulated():
    return simulate()


def test_seed_0_draws_what_it_drew(simulated) -> None:
    curves = summary(simulated)
    assert [curve.name for curve in curves] == list(GOLDEN)
    for curve in curves:
        drawn = curve.sample
        found = (drawn.std, drawn.beyond_1, drawn.beyond_4, drawn.mean_loss, drawn.delta_std, drawn.settled)
        assert (*found, curve.settles_at) == pytest.approx(GOLDEN[curve.name], abs=1e-9)
    assert [curve.sample.mean for curve in curves] == pytest.approx([0.0006283994, 0.003141997, 0.0074709129], abs=1e-9)
    assert curves[2].sample.quantiles[0] == pytest.approx(-6.3156170477, abs=1e-9)


def test_ratios_are_those_of_the_paper(simulated) -> None:
    x1_N, x2_N = simulated.x1_N, simulated.x2_N
    assert x1_N.shape == (50_000,)
    assert min(x1_N.min(), x2_N.min()) > 0
    assert max(x1_N.max(), x2_N.max()) < 1
    for beta, z_N in zip(BETAS, simulated.log_probability_ratio_BN, strict=True):
        assert np.exp(z_N) == pytest.approx((x1_N / x2_N) ** beta, rel=1e-9)
    odds_N = (x1_N / (1 - x1_N)) / (x2_N / (1 - x2_N))
    assert np.exp(simulated.log_odds_ratio_N) == pytest.approx(odds_N, rel=1e-9)


def test_samples_follow_their_exact_distributions(simulated) -> None:
    """Kolmogorov-Smirnov at 1 %: of 50,000 samples, the largest distance may be 0.0073."""
    exact = [*map(log_probability_distribution, BETAS), LOG_ODDS_DISTRIBUTION]
    drawn = [*simulated.log_probability_ratio_BN, simulated.log_odds_ratio_N]
    for z_N, distribution in zip(drawn, exact, strict=True):
        assert kstest(z_N, distribution.cdf).pvalue > 0.01
    # A distance that small tells these curves apart.
    assert kstest(drawn[1], exact[2].cdf).pvalue < 1e-9
    assert kstest(1.02 * drawn[2], exact[2].cdf).pvalue < 0.05


def test_drawn_moments_are_near_the_exact_ones(simulated) -> None:
    distributions = [*map(log_probability_distribution, BETAS), LOG_ODDS_DISTRIBUTION]
    for curve, distribution in zip(summary(simulated), distributions, strict=True):
        drawn, exact = curve.sample, curve.exact
        assert drawn.mean == pytest.approx(0, abs=4 * exact.std / math.sqrt(50_000))
        assert drawn.std == pytest.approx(exact.std, rel=0.02)
        for share, found, at in zip(QUANTILES, drawn.quantiles, exact.quantiles, strict=True):
            error = math.sqrt(share * (1 - share) / 50_000) / distribution.pdf(at)
            assert found == pytest.approx(at, abs=4 * error)
        assert drawn.mean_loss == pytest.approx(exact.mean_loss, abs=0.02)
        assert drawn.delta_std == pytest.approx(exact.delta_std, rel=0.02)
        for name in ("beyond_1", "beyond_4", "settled"):
            share = getattr(exact, name)
            error = math.sqrt(share * (1 - share) / 50_000)
            assert getattr(drawn, name) == pytest.approx(share, abs=4 * error + 1e-9), name


def test_exact_values_are_those_of_the_theory(simulated) -> None:
    narrow, wide, odds = (curve.exact for curve in summary(simulated))
    assert (narrow.std, wide.std) == pytest.approx((0.2 * math.sqrt(2), math.sqrt(2)), rel=1e-12)
    assert odds.std == pytest.approx(math.pi * math.sqrt(2 / 3), rel=1e-12)
    assert (narrow.beyond_1, wide.beyond_4) == pytest.approx((math.exp(-5), math.exp(-4)), rel=1e-12)
    assert odds.beyond_1 == pytest.approx(2 / (math.e - 1) ** 2, rel=1e-12)
    assert (wide.settled, narrow.settled) == pytest.approx((1 / 18, 0.5 * 9**-5), rel=1e-12)
    assert (wide.mean_loss, odds.mean_loss) == pytest.approx((2 * math.log(2) - 0.5, math.pi**2 / 8), rel=1e-9)


def test_density_and_distribution_of_log_odds_agree_also_where_the_series_takes_over() -> None:
    density, cdf = LOG_ODDS_DISTRIBUTION.pdf, LOG_ODDS_DISTRIBUTION.cdf
    assert quad(density, -np.inf, np.inf)[0] == pytest.approx(1, abs=1e-9)
    assert density(0) == pytest.approx(1 / 6)
    for z in (-40.0, -3.0, -0.0101, -0.0099, -1e-9, 0.0, 0.0099, 0.0101, 0.5, 3.0, 40.0, 800.0):
        h = 1e-3
        slope = (cdf(z + h) - cdf(z - h)) / (2 * h)
        assert slope == pytest.approx(density(z), rel=1e-4, abs=1e-12)
        assert cdf(z) + cdf(-z) == pytest.approx(1, abs=1e-15)
    assert density(1e-2 - 1e-12) == pytest.approx(density(1e-2 + 1e-12), rel=1e-8)
    assert cdf(1e-2 - 1e-12) == pytest.approx(cdf(1e-2 + 1e-12), rel=1e-10)


def test_odds_settle_pairs_that_a_small_beta_never_does(simulated) -> None:
    """What section 7.1 argues from: the same pairs, the same loss."""
    narrow, wide, odds = summary(simulated)
    assert narrow.sample.delta_std < 0.1 < wide.sample.delta_std < odds.sample.delta_std
    assert narrow.sample.settled < 1e-4 < wide.sample.settled < odds.sample.settled
    assert narrow.settles_at > 1000 * odds.settles_at


def test_the_figure_shows_every_curve_drawn_and_exact(simulated) -> None:
    figure = draw(simulated)
    for axis in figure.axes:
        assert [line.get_label() for line in axis.lines] == list(GOLDEN)
        assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 3
        assert axis.get_xlabel() == "log ratio, nats"
        assert "density" in axis.get_ylabel()
        stairs = axis.patches
        assert len(stairs) == 3
        for line, patch in zip(axis.lines, stairs, strict=True):
            density, edges, _ = patch.get_data()
            middle = (edges[1:] + edges[:-1]) / 2
            at = np.interp(middle, *line.get_data())
            # Of all samples, not of those within the axis.
            assert density @ np.diff(edges) <= 1
            assert np.abs(density - at).max() < 0.12 * at.max()
    assert [axis.get_yscale() for axis in figure.axes] == ["linear", "log"]
    figure.canvas.draw()


def test_few_samples_and_a_zero_draw(monkeypatch) -> None:
    with pytest.raises(ValueError, match="at least 2, but is 1"):
        simulate(samples=1)

    class Zeros:
        def random(self, shape):
            return np.zeros(shape)

    monkeypatch.setattr(ratio_simulation.np.random, "default_rng", lambda seed: Zeros())
    assert np.isfinite(simulate(samples=3).log_odds_ratio_N).all()
