"""Win rate: how often a reward model prefers model A's answer to model B's (paper section 6.3 and Figure 5).

Both models sample one answer to each prompt in each round, and the reward model scores both.

Shape suffixes: R rounds, N prompts, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: the caller's matplotlib state stays as it is
from matplotlib.figure import Figure

from orpo_ray.results.bootstrap import LEVEL, RESAMPLES, draws

_BINS = 60
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_LINES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)))
"""The colours suit colour-blind readers (Okabe and Ito 2008), the line styles black-and-white print."""


@dataclass(frozen=True, slots=True, eq=False)
class WinRate:
    """Win rate of A over B, with a 95 % interval over prompts. Shares from 0 to 1, where the paper prints per cent."""

    per_round_R: np.ndarray
    """Share of the prompts that A won in each round; a tie counts half."""
    mean: float
    """Over rounds."""
    std_over_rounds: float
    """Divisor R - 1; NaN for one round. The paper prints a standard deviation over its three rounds in brackets (its
    divisor is not known here). It measures how much the sampling of answers changes the win rate on *these* prompts,
    not how other prompts would: that is the interval's purpose, which is usually much wider."""
    low: float
    high: float


def win_rate(rewards_a_RN: np.ndarray, rewards_b_RN: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> WinRate:
    """Win rate over R rounds, with a bootstrap interval over prompts (percentiles; Efron and Tibshirani 1993, ch. 13).

    A prompt is resampled together with all of its rounds: answers to one prompt resemble each other, and resampling
    rounds × prompts would treat them as independent. Where A wins every prompt, it does so in every resample, and the
    interval has no width; one can then conclude that A loses at most about 3 / N of such prompts.

    Args:
        rewards_a_RN: the reward model's scores of A's answers, in its own unit. Row r, column n is round r, prompt n.
        rewards_b_RN: the scores of B's answers to the same prompts.
        resamples: number of bootstrap resamples of the prompts, B.
        seed: seed of the bootstrap.

    Raises:
        ValueError: the shapes differ or are not [R, N], R < 1, N < 2, or a reward is not finite.
    """
    a_RN, b_RN = np.asarray(rewards_a_RN, dtype=np.float64), np.asarray(rewards_b_RN, dtype=np.float64)
    if a_RN.ndim != 2 or a_RN.shape != b_RN.shape:
        raise ValueError(f"rewards of A and B must both be [rounds, prompts], but are {a_RN.shape} and {b_RN.shape}")
    rounds, prompts = a_RN.shape
    if rounds < 1 or prompts < 2:
        raise ValueError(f"a win rate needs at least 1 round and 2 prompts, but has {rounds} and {prompts}")
    for name, rewards_RN in (("A", a_RN), ("B", b_RN)):
        _require_finite(name, rewards_RN)
    won_RN = (a_RN > b_RN) + 0.5 * (a_RN == b_RN)
    won_N = won_RN.mean(0)
    drawn_B = np.concatenate([counts_N @ won_N / prompts for counts_N in draws(prompts, resamples, seed)])
    low, high = np.quantile(drawn_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    per_round_R = won_RN.mean(1)
    std = float(per_round_R.std(ddof=1)) if rounds > 1 else math.nan
    return WinRate(per_round_R, float(won_RN.mean()), std, low, high)


def histogram(rewards: Mapping[str, np.ndarray], unit: str = "reward") -> Figure:
    """Plot the models' reward distributions in one figure (paper Figure 5), with the same bins.

    Args:
        rewards: model -> its answers' rewards, of any shape.
        unit: label of the axis, for instance the name of the reward model.

    Raises:
        ValueError: there is no model, a model has no rewards, or a reward is not finite.
    """
    flat = {name: np.asarray(values, dtype=np.float64).ravel() for name, values in rewards.items()}
    if not flat or any(not len(values_M) for values_M in flat.values()):
        counts = ", ".join(f"{name} {len(values_M)}" for name, values_M in flat.items()) or "there is no model"
        raise ValueError(f"each model must have at least one reward: {counts}")
    for name, values_M in flat.items():
        _require_finite(name, values_M)
    edges = np.histogram_bin_edges(np.concatenate([*flat.values()]), _BINS)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, (name, values_M) in enumerate(flat.items()):
        colour, line = _COLOURS[number % len(_COLOURS)], _LINES[number % len(_LINES)]
        density = np.histogram(values_M, edges, density=True)[0]
        axis.stairs(density, edges, fill=True, color=colour, alpha=0.15)
        label = f"{name}, mean {values_M.mean():.3g}"
        axis.stairs(density, edges, color=colour, linestyle=line, linewidth=1.6, label=label)
    axis.set_xlabel(unit)
    axis.set_ylabel("density")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=min(len(flat), 2), frameon=False)
    return figure


def _require_finite(name: str, rewards: np.ndarray) -> None:
    wrong = ~np.isfinite(rewards)
    if wrong.any():
        at = tuple(int(index) for index in np.argwhere(wrong)[0])
        raise ValueError(
            f"each reward must be finite; {int(wrong.sum())} of {name}'s {rewards.size} rewards are not, the first at "
            f"{at}: {rewards[at]}"
        )
