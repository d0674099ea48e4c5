"""Bootstraps over held-out pairs and seeds: intervals of settings, ties, and the optimism of choosing the best.

All trials are judged by the same pairs, so each resample draws the same pairs for every trial. Shape suffixes: N pairs,
J trials, S settings, R ratios of sums, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtri, stdtrit

from orpo_ray.storage.pair_scores import PairScores

RESAMPLES = 2000
LEVEL = 0.95
_DRAWN_AT_ONCE = 4_000_000
"""Numbers drawn at a time; bounds the memory when there are many pairs."""

Mode = Literal["max", "min"]


@dataclass(frozen=True, slots=True, eq=False)
class Resampled:
    """A metric of J trials on all pairs, and on B resamples of them."""

    value_J: np.ndarray
    drawn_BJ: np.ndarray
    """On N pairs drawn with replacement, the same for all trials."""
    left_BJ: np.ndarray
    """On the pairs that were not drawn (out of bag)."""


def resample(everyone: Sequence[PairScores], metric: str, resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """Paired bootstrap over pairs (Efron and Tibshirani 1993, ch. 8). The same seed draws the same pairs.

    Args:
        everyone: the scores of J trials on the same pairs.
        metric: one of `config.METRIC_MODES`.
        resamples: number of resamples, B.
        seed: seed of the draws.
    """
    ratios = [scores.ratios(metric) for scores in everyone]
    flat = [(trial, ratio) for trial, of_trial in enumerate(ratios) for ratio in of_trial]
    weight_R = np.array([weight for _, (weight, _, _) in flat])
    sums_N2R = np.stack([np.stack([top for _, (_, top, _) in flat], 1), np.stack([low for _, (_, _, low) in flat], 1)])
    to_trial_RJ = np.equal.outer([trial for trial, _ in flat], np.arange(len(everyone))).astype(float)

    def values(counts_BN: np.ndarray) -> np.ndarray:
        top_BR, bottom_BR = counts_BN @ sums_N2R[0], counts_BN @ sums_N2R[1]
        return np.asarray((weight_R * top_BR / bottom_BR) @ to_trial_RJ)

    num, drawn, left = len(everyone[0].pair_ids_N), [], []
    for counts_BN in draws(num, resamples, seed):
        drawn.append(values(counts_BN))
        with np.errstate(invalid="ignore"):  # with few pairs, all may be drawn and none left
            left.append(values((counts_BN == 0).astype(float)))
    return Resampled(values(np.ones((1, num)))[0], np.concatenate(drawn), np.concatenate(left))


def draws(num: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of N pairs (or prompts) is drawn with replacement.

    Args:
        num: number of pairs, N.
        resamples: number of resamples, B.
        seed: seed of the draws; the same seed gives the same draws.

    Yields:
        Blocks of counts [rows, N], B rows in total.
    """
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // num)
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        picks_BN = rng.integers(0, num, (rows, num)) + num * np.arange(rows)[:, None]
        yield np.bincount(picks_BN.ravel(), minlength=rows * num).reshape(rows, num).astype(float)


def setting_replicates(trials: Resampled, setting_J: Sequence[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Means over seeds for each setting, and replicates of them over pairs and seeds.

    The variation over pairs comes from the trials' resampled values. The variation over seeds comes from residuals
    around the settings' means, drawn for each of its runs (the residual bootstrap for clustered data, Field and Welsh
    2007; drawing K seeds with replacement would lose a K-th of the variance). Residuals are pooled, because a setting
    has few, and scaled up for a setting whose own are larger than the pool's. The part of them that is due to pairs is
    removed, because the first term covers it already, and they are widened from the normal to the t quantile of their
    degrees of freedom. Without a setting of several seeds there are no residuals: the replicates then cover pairs only.

    Args:
        trials: the metric of J trials.
        setting_J: which setting a trial belongs to, 0 to S - 1; trials of a setting differ only in the seed.
        seed: seed of the draws.

    Returns:
        Means [S], replicates [B, S].
    """
    setting = np.asarray(setting_J)
    counts_S = np.bincount(setting)
    mean_JS = np.equal.outer(setting, np.arange(len(counts_S))) / counts_S
    value_S, replicate_BS = trials.value_J @ mean_JS, trials.drawn_BJ @ mean_JS
    several_J = counts_S[setting] > 1
    if not several_J.any():
        return value_S, replicate_BS
    unbias_J = np.sqrt(counts_S[setting] / np.maximum(counts_S[setting] - 1, 1))
    residual_J = (trials.value_J - value_S[setting]) * unbias_J
    by_pairs_BJ = (trials.drawn_BJ - replicate_BS[:, setting]) * unbias_J
    variance = float(np.mean(residual_J[several_J] ** 2))
    if variance == 0:
        return value_S, replicate_BS
    by_seed = max(1 - float(by_pairs_BJ[:, several_J].var(0).mean()) / variance, 0.0)
    freedom = int((counts_S - 1)[counts_S > 1].sum())
    widened = math.sqrt(by_seed) * float(stdtrit(freedom, 0.975) / ndtri(0.975))
    erratic_S = np.sqrt(np.maximum(residual_J**2 @ mean_JS / variance, 1))
    rng = np.random.default_rng([seed, 1])
    drawn_BJ = rng.choice(residual_J[several_J], (len(replicate_BS), len(setting)))
    return value_S, replicate_BS + widened * erratic_S * (drawn_BJ @ mean_JS)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Settings compared with the best of them."""

    best: int
    difference_S: np.ndarray
    """Difference to the best; 0 for the best itself."""
    half_S: np.ndarray
    """Half-width of the simultaneous interval of the difference."""
    tied_S: np.ndarray
    """Whether that interval reaches 0."""


def compare_with_best(value_S: np.ndarray, replicate_BS: np.ndarray, mode: Mode) -> Comparison:
    """Multiple comparisons with the best (Hsu 1981), with the bootstrap's max-|t| in place of Dunnett's tables.

    For setting s, the critical value is the 95 % quantile of the largest studentised difference between s and any
    other setting, so it holds whichever setting looks best. The truly best setting is therefore in the tied set with
    at least that probability.

    Args:
        value_S: the metric of each setting.
        replicate_BS: its bootstrap replicates.
        mode: which direction is better.
    """
    best = int(np.argmax(value_S) if mode == "max" else np.argmin(value_S))
    centred_BS = replicate_BS - replicate_BS.mean(0)
    half_S = np.zeros(len(value_S))
    for s in range(len(value_S)):
        apart_BS = centred_BS - centred_BS[:, [s]]
        error_S = apart_BS.std(0)
        known_S = error_S > 0  # 0 for s itself and for a setting with the same values on every pair
        if known_S[best]:
            largest_B = np.abs(apart_BS[:, known_S] / error_S[known_S]).max(1)
            half_S[s] = np.quantile(largest_B, LEVEL) * error_S[best]
    difference_S = value_S - value_S[best]
    return Comparison(best, difference_S, half_S, np.abs(difference_S) <= half_S)


def optimism(trials: Resampled, setting_J: Sequence[int], mode: Mode) -> float:
    """How much better the best setting looks on the pairs that it was chosen on than on fresh pairs.

    On each resample the best is chosen and then scored on the pairs left out. A resample and its left-out pairs
    differ as much as two halves of the pairs do, but the choice was made on all pairs, so the gap is divided by √2.
    This is exact where the candidates are equally good, and up to √2 too large where they are far apart and the bias
    is small.

    Args:
        trials: the metric of the candidates.
        setting_J: which setting a trial belongs to; the settings' means are compared.
        mode: which direction is better.

    Returns:
        The optimism in units of the metric; above 0 where the best looks better than it is.
    """
    setting = np.asarray(setting_J)
    mean_JS = np.equal.outer(setting, np.unique(setting)) / np.bincount(setting)[setting][:, None]
    drawn_BS, left_BS = trials.drawn_BJ @ mean_JS, trials.left_BJ @ mean_JS
    chosen_B = drawn_BS.argmax(1) if mode == "max" else drawn_BS.argmin(1)
    rows_B = np.arange(len(chosen_B))
    gap = float(np.nanmean(drawn_BS[rows_B, chosen_B] - left_BS[rows_B, chosen_B])) / math.sqrt(2)
    return gap if mode == "max" else -gap


def pareto_front(cost: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Which settings are on the Pareto front: no other one is at least as good in both and better in one.

    Args:
        cost: [..., S], lower is better.
        gain: [..., S], higher is better.

    Returns:
        bool [..., S].
    """
    front = np.ones(cost.shape, dtype=bool)
    for s in range(cost.shape[-1]):
        own_cost, own_gain = cost[..., [s]], gain[..., [s]]
        as_good = (cost <= own_cost) & (gain >= own_gain)
        front[..., s] = ~(as_good & ((cost < own_cost) | (gain > own_gain))).any(-1)
    return front
