"""How often a reward model prefers model A's answer to model B's (paper section 6.3 and Figure 5).

For each prompt both models answer once in each round, sampled anew, and the reward model scores both answers.

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
"""The colour-blind tell the colours apart (Okabe and Ito 2008), black-and-white printers the lines."""


@dataclass(frozen=True, slots=True, eq=False)
class WinRate:
    """Of A over B. Shares from 0 to 1, where the paper prints per cent."""

    per_round_R: np.ndarray
    """Of the prompts, those that A won; a tie counts half."""
    mean: float
    """Over rounds."""
    std_over_rounds: float
    """With R - 1 below the fraction line; NaN of one round. The paper prints a standard deviation over its three rounds
    in brackets (by which divisor is not known here). It tells how far the sampling of answers moves the win rate on
    *these* prompts, and nothing of other prompts: that is what the interval is for, usually much wider."""
    low: float
    """The 95 % interval over prompts, from here"""
    high: float
    """to here."""


def win_rate(rewards_a_RN: np.ndarray, rewards_b_RN: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> WinRate:
    """Win rate over R rounds, with a bootstrap interval over prompts (percentiles; Efron and Tibshirani 1993, ch. 13).

    A prompt is drawn together with all of its rounds: answers to one prompt are alike, and rounds × prompts would count
    them as so many independent ones. Where A wins every prompt, so does it on every resample, and the interval has no
    width: what can then be said is that A loses at most about 3 / N of such prompts.

    Args:
        rewards_a_RN: what the reward model gives A's answers, in its own unit. Row r, column n is round r, prompt n.
        rewards_b_RN: the same of B's answers to the same prompts.
        resamples: of the prompts, B.
        seed: of the draws.

    Raises:
        ValueError: the shapes differ or are not [R, N], R < 1, N < 2, or a reward is not finite.
    """
    a_RN, b_RN = np.asarray(rewards_a_RN, dtype=np.float64), np.asarray(rewards_b_RN, dtype=np.float64)
    if a_RN.ndim != 2 or a_RN.shape != b_RN.shape:
        raise ValueError(f"rewards of A and B must both be [rounds, prompts], and are {a_RN.shape} and {b_RN.shape}")
    rounds, prompts = a_RN.shape
    if rounds < 1 or prompts < 2:
        raise ValueError(f"a win rate needs at least 1 round and 2 prompts, and has {rounds} and {prompts}")
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
    """The models' reward distributions in one picture (paper Figure 5), in the same bins.

    Args:
        rewards: model -> its answers' rewards, of any shape.
        unit: what the axis says; which reward model it was, for instance.

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
            f"each reward must be finite; of {name}'s {rewards.size} rewards {int(wrong.sum())} are not, the first at "
            f"{at}: {rewards[at]}"
        )
