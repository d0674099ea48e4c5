"""Probability ratio against odds ratio on 50,000 random pairs: the simulation of the paper's Figure 6 and section 7.1.

X1 and X2, uniform on (0, 1), stand for P(y_w|x) and P(y_l|x). Each curve is the distribution of a z in the loss
-log σ(z): the log probability ratio β · (log X1 - log X2), or the log odds ratio log[X1 / (1 - X1)] -
log[X2 / (1 - X2)], in nats.

A pair's weight in the gradient is δ = σ(-z) (paper eq. 9). At β = 0.2 nearly every z lies within ±1, so that δ stays
near 1/2 and hardly any pair is settled: the loss keeps separating chosen from rejected until their probabilities are
59,000 to 1. Log odds ratios spread so wide that 18 % of random pairs are settled from the start. δ is not the whole
gradient: z itself changes by β per nat of log X under the probability ratio, by 1 / (1 - X) under the odds ratio.

Shape suffixes: N samples, B values of β.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: the caller's matplotlib state stays as it is
from matplotlib.figure import Figure
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import laplace, rv_continuous

BETAS = (0.2, 1.0)
"""β of the probability ratio, as in Figure 6."""
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SETTLED = 0.1
"""A pair with δ below this hardly contributes to the gradient: z is above log 9."""

_LOG_ODDS = "log odds ratio"
_STYLES = (("#0072B2", "-"), ("#E69F00", "--"), ("#009E73", "-."))
"""Colour and line style of each curve; the colours suit colour-blind readers (Okabe and Ito 2008)."""
_SHOWN = 10.0
"""Largest |z| in the figures: beyond it are 5 of 100,000 probability ratios at β = 1, and 8 of 10,000 odds ratios."""
_SERIES_BELOW = 1e-2
"""Below this |z|, the closed forms lose digits, and their series are used."""


@dataclass(frozen=True, slots=True, eq=False)
class Simulated:
    """N pairs of probabilities, and their two kinds of log ratio."""

    x1_N: np.ndarray
    """Probability of the preferred answer, in (0, 1)."""
    x2_N: np.ndarray
    """Probability of the other answer."""
    log_probability_ratio_BN: np.ndarray
    """β · (log X1 - log X2) in nats, for `BETAS`."""
    log_odds_ratio_N: np.ndarray
    """log[X1 / (1 - X1)] - log[X2 / (1 - X2)] in nats."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of one curve's z, in nats."""

    mean: float
    std: float
    quantiles: tuple[float, ...]
    """At `QUANTILES`."""
    beyond_1: float
    """Share of the pairs with |z| > 1, 0 to 1."""
    beyond_4: float
    """Share of the pairs with |z| > 4, 0 to 1."""
    mean_loss: float
    """Mean of -log σ(z), nats. With X1 = X2 it would be log 2."""
    delta_std: float
    """Standard deviation of δ = σ(-z); its mean is 1/2, because each curve is symmetric."""
    settled: float
    """Share of the pairs with δ < `SETTLED`, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve of Figure 6: sampled moments next to exact ones."""

    name: str
    sample: Moments
    exact: Moments
    settles_at: float
    """Smallest X1 / X2, or ratio of their odds, at which a pair is settled."""


class _LogisticDifference(rv_continuous):
    """Difference of two independent standard logistic variables.

    With u = e^-|z|, the density is u · [|z| - 2 + (|z| + 2) · u] / (1 - u)³ and the tail beyond |z| is
    u · (|z| - 1 + u) / (1 - u)². The variance is twice π² / 3.
    """

    def _pdf(self, z: np.ndarray) -> np.ndarray:
        size = np.maximum(np.abs(z), _SERIES_BELOW)
        u = np.exp(-size)
        far = u * (size - 2 + (size + 2) * u) / (1 - u) ** 3
        return np.where(np.abs(z) < _SERIES_BELOW, 1 / 6 - z**2 / 60, far)

    def _sf(self, z: np.ndarray) -> np.ndarray:
        size = np.maximum(np.abs(z), _SERIES_BELOW)
        u = np.exp(-size)
        tail = u * (size - 1 + u) / (1 - u) ** 2
        return np.where(np.abs(z) < _SERIES_BELOW, 0.5 - z / 6 + z**3 / 180, np.where(z > 0, tail, 1 - tail))

    def _cdf(self, z: np.ndarray) -> np.ndarray:
        return self._sf(-z)

    def _stats(self) -> tuple[float, float, float, float]:
        return 0.0, 2 * math.pi**2 / 3, 0.0, 0.6


LOG_ODDS_DISTRIBUTION: Any = _LogisticDifference(name="logistic_difference")
"""Distribution of the log odds ratio (scipy.stats: `pdf`, `cdf`, `ppf`, ...)."""


def log_probability_distribution(beta: float) -> Any:
    """Distribution of β · (log X1 - log X2): -log X is exponential, so it is Laplace(0, β), standard deviation β√2.

    Args:
        beta: β > 0.

    Returns:
        A scipy.stats distribution.
    """
    return laplace(scale=beta)


def simulate(samples: int = 50_000, seed: int = 0) -> Simulated:
    """Draw X1 and X2 (paper section 7.1, Figure 6). Equal seeds give equal draws.

    Args:
        samples: N; the paper has 50,000.
        seed: seed of the random generator.

    Raises:
        ValueError: samples < 2.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, but is {samples}")
    # `random` draws from [0, 1) in steps of 2^-53; the log of 0 would be infinite.
    x1_N, x2_N = np.maximum(np.random.default_rng(seed).random((2, samples)), 2.0**-54)
    log_ratio_N = np.log(x1_N) - np.log(x2_N)
    log_odds_N = log_ratio_N - (np.log1p(-x1_N) - np.log1p(-x2_N))
    return Simulated(x1_N, x2_N, np.array(BETAS)[:, None] * log_ratio_N, log_odds_N)


def summary(simulated: Simulated) -> tuple[Curve, ...]:
    """Moments of each curve, sampled and exact: the probability ratios in the order of `BETAS`, then the odds ratio."""
    settles_at = [math.exp(_z_settled() / beta) for beta in BETAS] + [math.exp(_z_settled())]
    return tuple(
        Curve(name, _drawn(z_N), _exact(distribution), ratio)
        for (name, z_N, distribution), ratio in zip(_curves(simulated), settles_at, strict=True)
    )


def draw(simulated: Simulated) -> Figure:
    """Histograms with the exact densities as lines (Figure 6), on a linear and on a log scale, which shows the tails.

    Densities are per nat, normalised by all samples, including those beyond the axis.
    """
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    edges = np.linspace(-_SHOWN, _SHOWN, 201)
    at = np.linspace(-_SHOWN, _SHOWN, 2001)
    for axis, scale in zip(figure.subplots(1, 2), ("linear", "log"), strict=True):
        for (name, z_N, distribution), (colour, line) in zip(_curves(simulated), _STYLES, strict=True):
            density = np.histogram(z_N, edges)[0] / (len(z_N) * np.diff(edges))
            axis.stairs(density, edges, fill=True, color=colour, alpha=0.35)
            axis.plot(at, distribution.pdf(at), color=colour, linestyle=line, linewidth=1.6, label=name)
        axis.set_yscale(scale)
        axis.set_xlabel("log ratio, nats")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    linear, logarithmic = figure.axes
    linear.set_xlim(-5, 5)
    linear.set_ylabel("density per nat")
    logarithmic.set_xlim(-_SHOWN, _SHOWN)
    logarithmic.set_ylim(1e-4, 4)
    logarithmic.set_ylabel("density per nat, log scale")
    handles, names = linear.get_legend_handles_labels()
    title = f"areas: {len(simulated.x1_N):,} samples; lines: exact"
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, title=title)
    return figure


def _curves(simulated: Simulated) -> list[tuple[str, np.ndarray, Any]]:
    """(name, z_N, exact distribution)."""
    by_beta = zip(BETAS, simulated.log_probability_ratio_BN, strict=True)
    of_probability = [(f"log probability ratio, β = {b:g}", z_N, log_probability_distribution(b)) for b, z_N in by_beta]
    return [*of_probability, (_LOG_ODDS, simulated.log_odds_ratio_N, LOG_ODDS_DISTRIBUTION)]


def _z_settled() -> float:
    """The z at which σ(-z) = `SETTLED`."""
    return math.log(1 / SETTLED - 1)


def _drawn(z_N: np.ndarray) -> Moments:
    delta_N = expit(-z_N)
    return Moments(
        mean=float(z_N.mean()),
        std=float(z_N.std(ddof=1)),
        quantiles=tuple(np.quantile(z_N, QUANTILES).tolist()),
        beyond_1=float((np.abs(z_N) > 1).mean()),
        beyond_4=float((np.abs(z_N) > 4).mean()),
        mean_loss=float(np.logaddexp(0, -z_N).mean()),
        delta_std=float(delta_N.std(ddof=1)),
        settled=float((delta_N < SETTLED).mean()),
    )


def _exact(distribution: Any) -> Moments:
    """Exact moments. z is symmetric around 0: means are integrals over z > 0 of the value at z plus that at -z."""
    pdf = distribution.pdf
    return Moments(
        mean=0.0,
        std=float(distribution.std()),
        quantiles=tuple(distribution.ppf(QUANTILES).tolist()),
        beyond_1=float(2 * distribution.sf(1)),
        beyond_4=float(2 * distribution.sf(4)),
        mean_loss=quad(lambda z: (z + 2 * math.log1p(math.exp(-z))) * pdf(z), 0, math.inf)[0],
        delta_std=math.sqrt(quad(lambda z: 2 * (expit(z) - 0.5) ** 2 * pdf(z), 0, math.inf)[0]),
        settled=float(distribution.sf(_z_settled())),
    )
