"""The difference of a held-out metric between two sides, with its interval over held-out pairs and seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.stats import ttest_ind

from orpo_ray.config import MEANING_MOVED_BY, METRIC_MODES
from orpo_ray.config.flatten import as_text
from orpo_ray.results.bootstrap import LEVEL, compare_with_best, resample, setting_replicates
from orpo_ray.results.frames import SEED, mean_interval
from orpo_ray.results.pair_files import load_pair_scores
from orpo_ray.results.sides import Runs
from orpo_ray.storage.pair_scores import PairScores, on_shared_pairs
from orpo_ray.storage.records import SweepRecord, TrialRecord

NO_PAIRS = "fewer than two held-out pairs were evaluated by both"
OTHER_PAIRS = "the held-out pairs have the same names but other answers"
_OTHER_TOKENS = "it counts other tokens in each (tokenizer, length limits)"
_COUNTS_TOKENS = ("eval/nll", "eval/loss")
"""Metrics over tokens, which depend on the model's tokenizer."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A held-out metric of both sides."""

    metric: str
    mode: Literal["max", "min"] | None
    """Which direction is better; None for neither."""
    a: float | None
    """Logged value of A, the mean over seeds; None where missing or not finite."""
    b: float | None
    """The same for B."""
    difference: float | None
    """b - a, on the pairs that both sides evaluated."""
    low: float | None
    """Lower end of the 95 % interval of the difference."""
    high: float | None
    """Upper end."""
    covers: str | None
    """What the interval is over."""
    no_interval: str | None
    """Why there is no interval."""

    @property
    def better(self) -> Literal["A", "B"] | None:
        """The better side; None where they are tied or the answer is unknown."""
        if self.low is None or self.high is None or self.difference is None or self.mode is None:
            return None
        if self.low <= 0 <= self.high:
            return None
        return "B" if (self.difference > 0) == (self.mode == "max") else "A"

    @property
    def verdict(self) -> str:
        """One word for a table: `A`, `B`, `tied` or a dash."""
        if self.low is None or self.mode is None:
            return "–"
        return self.better or "tied"


class Scores:
    """Per-pair scores of runs, each file read once."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], PairScores | str] = {}

    def of(self, record: SweepRecord, trial: TrialRecord) -> PairScores | str:
        """The scores of a trial, or the reason why there are none."""
        key = (id(record), trial.trial_id)
        if key not in self._found:
            self._found[key] = self._load(record, trial)
        return self._found[key]

    @staticmethod
    def _load(record: SweepRecord, trial: TrialRecord) -> PairScores | str:
        folder = record.run_dir / "trials" / trial.trial_id if record.run_dir else None
        if folder is None and trial.checkpoint:
            folder = Path(trial.checkpoint).parent
        if folder is None:
            return f"the run directory of {record.name}, with its per-pair files, is not here"
        logged = {m: trial.metrics[m] for m in METRIC_MODES if not math.isnan(trial.metrics.get(m, math.nan))}
        name = f"trial {trial.trial_id} of {record.name}"
        return load_pair_scores(folder, name, logged, trial.reused_from is not None)


def difference_of(metric: str, a: Runs, b: Runs, scores: Scores) -> Difference:
    """The metric of both sides with the interval of its difference, or the reason why there is none.

    The interval is over pairs (and seeds) where all per-pair files are at hand, else over seeds.
    """
    means = [float(np.mean([t.metrics.get(metric, math.nan) for t in group.runs])) for group in (a, b)]
    known = [None if math.isnan(mean) else mean for mean in means]
    difference = None if None in known else means[1] - means[0]
    plain = Difference(metric, METRIC_MODES.get(metric), known[0], known[1], difference, None, None, None, None)

    def without(why: str, difference: float | None = difference) -> Difference:
        return replace(plain, difference=difference, no_interval=why)

    if difference is None:
        return without("not both have a finite value")
    if metric not in METRIC_MODES:
        return without("no metric to judge by: neither direction is better")
    if moved := _moved_meaning(metric, a, b):
        return without(f"it measures something else in each: {moved}", None)
    found = [scores.of(group.record, trial) for group in (a, b) for trial in group.runs]
    if all(isinstance(one, PairScores) for one in found):
        return _over_pairs(plain, [one for one in found if isinstance(one, PairScores)], len(a.runs))
    why = next(one for one in found if isinstance(one, str))
    return _over_seeds(plain, a, b, why)


def _over_pairs(plain: Difference, everyone: list[PairScores], num_a: int) -> Difference:
    shared = on_shared_pairs(everyone)
    first, num = shared[0], len(shared[0].pair_ids_N)
    if num < 2:
        return replace(plain, difference=None, no_interval=NO_PAIRS)
    if not all(np.array_equal(one.answer_bytes_N, first.answer_bytes_N) for one in shared):
        return replace(plain, difference=None, no_interval=OTHER_PAIRS)
    if plain.metric in _COUNTS_TOKENS and not all(
        one.nll_reduction == first.nll_reduction and np.array_equal(one.nll_tokens_N, first.nll_tokens_N)
        for one in shared
    ):
        return replace(plain, difference=None, no_interval=_OTHER_TOKENS)
    assert plain.mode is not None
    trials = resample(shared, plain.metric)
    value_S, replicate_BS = setting_replicates(trials, [0] * num_a + [1] * (len(shared) - num_a))
    against = compare_with_best(value_S, replicate_BS, plain.mode)
    difference, half = float(value_S[1] - value_S[0]), float(against.half_S[1 - against.best])
    left_out = max(len(one.pair_ids_N) for one in everyone) - num
    covers = f"{num} held-out pairs"
    covers += f" that both evaluated ({left_out} more of one are not counted)" if left_out else ""
    covers += " and over seeds" if len(shared) > 2 else ""
    return replace(plain, difference=difference, low=difference - half, high=difference + half, covers=covers)


def _over_seeds(plain: Difference, a: Runs, b: Runs, why: str) -> Difference:
    by_seed = [{int(t.settings[SEED]): t.metrics[plain.metric] for t in g.runs if SEED in t.settings} for g in (a, b)]
    both = sorted(by_seed[0].keys() & by_seed[1].keys())
    if len(both) > 1:
        # The same seed means the same pairs in the same order.
        mean, half = mean_interval([by_seed[1][seed] - by_seed[0][seed] for seed in both])
        assert half is not None
        covers = f"{len(both)} seeds in common (paired t-interval)"
        return replace(plain, difference=mean, low=mean - half, high=mean + half, covers=covers)
    if min(len(a.runs), len(b.runs)) < 2:
        return replace(plain, no_interval=f"{why}, and not both have several seeds")
    values = [[t.metrics[plain.metric] for t in group.runs] for group in (b, a)]
    covers = f"{len(values[1])} and {len(values[0])} seeds (Welch)"
    if all(np.ptp(of_side) == 0 for of_side in values):  # the seeds agree, so there is no variance to divide by
        return replace(plain, low=plain.difference, high=plain.difference, covers=covers)
    low, high = ttest_ind(*values, equal_var=False).confidence_interval(LEVEL)
    return replace(plain, low=float(low), high=float(high), covers=covers)


def _moved_meaning(metric: str, a: Runs, b: Runs) -> str:
    """The settings that give the metric a different meaning on each side, with their values; "" without any."""
    ones, others = a.runs[0].settings, b.runs[0].settings
    # A preset is only a name for other settings, which are compared one by one.
    moved = sorted(p for p in MEANING_MOVED_BY[metric] - {"loss.preset"} if ones.get(p) != others.get(p))
    return ", ".join(f"{path} is {as_text(ones.get(path))} and {as_text(others.get(path))}" for path in moved)
