"""Two sweeps or two runs side by side: what differs in their settings, and how surely in their held-out metrics."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import ttest_ind

from orpo_ray.config import MEANING_MOVED_BY, METRIC_MODES
from orpo_ray.config.flatten import SPEED_ONLY, as_text
from orpo_ray.config.space import describe
from orpo_ray.errors import UserError
from orpo_ray.results.bootstrap import LEVEL, compare_with_best, resample, setting_replicates
from orpo_ray.results.frames import SEED, mean_interval, setting_key, setting_of
from orpo_ray.results.runs import read_sweep
from orpo_ray.storage.pair_scores import PAIRS_FILE, PairScores, on_shared_pairs
from orpo_ray.storage.records import SweepRecord, TrialRecord
from orpo_ray.tracking.read_runs import compare_page
from orpo_ray.tracking.uri import TrackingError

_COUNTS_TOKENS = ("eval/nll", "eval/loss")
"""Metrics over the tokens of whatever tokenizer the model has."""


class CompareError(UserError, ValueError):
    """The two cannot be compared; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two."""

    name: str
    """`SWEEP` or `SWEEP/TRIAL_ID`."""
    is_sweep: bool
    """Whether it was asked for its best setting; else it is a single run."""
    setting: str
    """In short, of the runs that are compared."""
    trial_ids: tuple[str, ...]
    """Runs that are compared: one, or the seeds of a setting; the best first."""
    mlflow_run_id: str | None
    """Of the first of them."""
    checkpoint: str | None
    steps: int
    status: str
    """These three of the first, too."""
    candidates: int
    """Settings that it was chosen from by the score it is compared with; 1 where nothing was chosen."""
    trials: int
    statuses: dict[str, int]
    """Status -> trials that ended so."""
    device_hours: float
    """Training time × workers of all trials; of a single run, its own."""
    wall_hours: float | None
    """From the first submission to the last end; None where a trial has not ended."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs."""

    path: str
    a: str | None
    """As MLflow shows it; None where it has none."""
    b: str | None
    swept: str
    """`A`, `B`, `both`: by whose axes it is set; ""."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A held-out metric of both."""

    metric: str
    mode: Literal["max", "min"] | None
    """Which direction is better; None: neither."""
    a: float | None
    """As logged, the mean over seeds; None where missing or not finite."""
    b: float | None
    difference: float | None
    """b - a, on the pairs that both evaluated."""
    low: float | None
    high: float | None
    """Of the 95 % interval of the difference."""
    covers: str | None
    """What the interval is over."""
    no_interval: str | None
    """Why there is none."""

    @property
    def better(self) -> Literal["A", "B"] | None:
        """The one that is better; None where they cannot be told apart, or nobody can say."""
        if self.low is None or self.high is None or self.difference is None or self.mode is None:
            return None
        if self.low <= 0 <= self.high:
            return None
        return "B" if (self.difference > 0) == (self.mode == "max") else "A"

    @property
    def verdict(self) -> str:
        """In a word, for a table."""
        if self.low is None or self.mode is None:
            return "–"
        return self.better or "tied"


@dataclass(frozen=True, slots=True)
class Matched:
    """A setting that both sweeps ran to its end."""

    setting: str
    a_trial_ids: tuple[str, ...]
    b_trial_ids: tuple[str, ...]
    difference: Difference


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare_runs` found."""

    a: Side
    b: Side
    metric: str
    sentence: str
    """The answer in a line."""
    settings: tuple[Change, ...]
    """Of the runs compared, only what differs."""
    search: tuple[Change, ...]
    """Of the sweep section."""
    metrics: tuple[Difference, ...]
    """The metric asked for first."""
    matched: tuple[Matched, ...]
    """The best first; empty unless both are sweeps."""
    notes: tuple[str, ...]
    """What to know before relying on it."""
    compare_page: str | None
    """Of the MLflow server, where there is one. Not in what rich shows, which would break it over lines."""

    def to_json(self) -> str:
        """All of it, for programs. Where nothing is known there is null."""
        tree = asdict(self)
        for row, difference in zip(tree["metrics"], self.metrics, strict=True):
            row["better"] = difference.better
        for row, match in zip(tree["matched"], self.matched, strict=True):
            row["difference"]["better"] = match.difference.better
        return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False)


def compare_runs(
    a: str | Path,
    b: str | Path,
    metric: str | None = None,
    *,
    output_dir: str | Path = "runs",
    tracking_uri: str | None = None,
    experiment: str | None = None,
) -> Comparison:
    """Compare two sweeps (best against best, and every setting that both ran) or two runs.

    Differences have intervals from a paired bootstrap over the held-out pairs that both evaluated, and over seeds where
    a setting was trained with several (`bootstrap.setting_replicates`). Where the per-pair files are not at hand (a
    sweep known from MLflow alone), they are over seeds: a paired t-interval over the seeds in common, else Welch's.

    Args:
        a: what `runs.load_runs` takes: run directory, name, `NAME/TRIAL_ID`, id of an MLflow run.
        b: the same.
        metric: of `config.METRIC_MODES`; by default the one that both sweeps are judged by.
        output_dir: where sweeps were run.
        tracking_uri: of MLflow; then both are read from it.
        experiment: of MLflow to look in.

    Raises:
        CompareError: they are the same, are judged by different metrics and none was given, were evaluated on different
            held-out pairs, the metric means something else in each, or a side has no value of it.
        FileNotFoundError: there is no such sweep or run.
        TrackingError: MLflow cannot be asked.
    """
    if metric is not None and metric not in METRIC_MODES:
        raise CompareError(f"metric {metric!r} is not a held-out metric; use one of {', '.join(METRIC_MODES)}")
    where: dict[str, Any] = {"tracking_uri": tracking_uri, "experiment": experiment, "output_dir": output_dir}
    records = (read_sweep(a, **where), read_sweep(b, **where))
    metric = metric or _common_metric(*records)
    left, right = groups = (_Runs.best(records[0], metric, "A"), _Runs.best(records[1], metric, "B"))
    if left.same_as(right):
        raise CompareError(f"A and B are the same: {left.name}; name two")
    scores = _Scores()
    main = _difference(metric, left, right, scores)
    _require_comparable(main, left, right, scores)
    others = dict.fromkeys([*METRIC_MODES, *sorted({k for g in groups for k in g.runs[0].metrics})])
    metrics = (main, *(_difference(other, left, right, scores) for other in others if other != metric))
    a_side, b_side = left.side(), right.side()
    page, unreachable = _page(*records, a_side, b_side)
    return Comparison(
        a=a_side,
        b=b_side,
        metric=metric,
        sentence=_sentence(main, left.name, right.name),
        settings=tuple(
            change
            for change in _changes(left.settings, right.settings, left.swept, right.swept)
            if change.path != SEED or len(left.runs) == len(right.runs) == 1
        ),
        search=_changes(records[0].search, records[1].search, set(), set()),
        metrics=tuple(d for d in metrics if d.a is not None or d.b is not None),
        matched=_matched(metric, *records, scores) if all(group.is_sweep for group in groups) else (),
        notes=(*_notes(main, a_side, b_side), *unreachable),
        compare_page=page,
    )


# ---- the runs of each side ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Runs:
    """The runs of a sweep that are compared: one, or the seeds of a setting."""

    record: SweepRecord
    runs: tuple[TrialRecord, ...]
    """The best first."""
    is_sweep: bool
    candidates: int

    @classmethod
    def best(cls, record: SweepRecord, metric: str, label: str) -> _Runs:
        """The run that was asked for, or the seeds of the best setting.

        As in `winners`: finalists are judged by their fresh seeds alone, and without finalists all that finished are.

        Raises:
            CompareError: none has a value of the metric.
        """
        is_sweep = record.chosen is None and len(record.trials) > 1
        valued = [t for t in record.chosen_trials if not math.isnan(t.metrics.get(metric, math.nan))]
        if not valued:
            known = sorted({key for t in record.chosen_trials for key in t.metrics})
            counts = Counter(t.status for t in record.chosen_trials)
            raise CompareError(
                f"{label} ({_name(record)}) has no value of {metric}: "
                + ", ".join(f"{number} {status.replace('_', ' ')}" for status, number in counts.items())
                + f"; it has {', '.join(known) if known else 'no evaluation at all'}"
            )
        if not is_sweep:
            return cls(record, tuple(valued), is_sweep, candidates=1)
        finished = _distinct([t for t in valued if t.status == "finished"])
        confirmed = [t for t in finished if t.purpose == "confirm"]
        judged = confirmed or finished or [t for t in valued if t.status == "stopped_early"] or valued
        settings = _by_key([(setting_key(t.params), t) for t in judged])
        sign = 1 if METRIC_MODES[metric] == "max" else -1
        groups = [sorted(group, key=lambda t: sign * t.metrics[metric], reverse=True) for group in settings.values()]
        chosen = max(groups, key=lambda group: sign * float(np.mean([t.metrics[metric] for t in group])))
        return cls(record, tuple(chosen), is_sweep, candidates=1 if confirmed else len(settings))

    @property
    def name(self) -> str:
        return _name(self.record)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the best run, without a bundle's label."""
        return {path: value for path, value in self.runs[0].settings.items() if path != self.record.bundle_axis}

    @property
    def swept(self) -> set[str]:
        """Config paths that the axes set."""
        return _paths(self.record) if self.is_sweep else set()

    def same_as(self, other: _Runs) -> bool:
        """Whether both are the same runs of the same sweep."""
        mine, theirs = ([(t.trial_id, t.mlflow_run_id, t.submitted_ms) for t in g.runs] for g in (self, other))
        return self.record.name == other.record.name and mine == theirs and self.is_sweep == other.is_sweep

    def side(self) -> Side:
        trials, first = self.record.chosen_trials, self.runs[0]
        begun = [t.submitted_ms for t in trials if t.submitted_ms is not None]
        ended = [t.ended_ms for t in trials if t.ended_ms is not None]
        return Side(
            name=self.name,
            is_sweep=self.is_sweep,
            setting=describe(setting_of(first.params) if len(self.runs) > 1 else first.params),
            trial_ids=tuple(t.trial_id for t in self.runs),
            mlflow_run_id=first.mlflow_run_id,
            checkpoint=first.checkpoint,
            steps=first.steps,
            status=first.status,
            candidates=self.candidates,
            trials=len(trials),
            statuses=dict(Counter(t.status for t in trials)),
            device_hours=sum(t.device_seconds for t in trials) / 3600,
            wall_hours=(max(ended) - min(begun)) / 3.6e6 if len(ended) == len(begun) == len(trials) else None,
        )


def _name(record: SweepRecord) -> str:
    return record.name if record.chosen is None else f"{record.name}/{record.chosen}"


def _common_metric(a: SweepRecord, b: SweepRecord) -> str:
    if a.metric != b.metric:
        (first, one), (second, other) = (
            (r.metric, f"{_name(r)} is judged by {r.metric} ({_better_when(r.mode)} is better)") for r in (a, b)
        )
        raise CompareError(f"{one}, {other}: say which to compare by, --metric {first} or --metric {second}")
    return a.metric


def _better_when(mode: str) -> str:
    return "higher" if mode == "max" else "lower"


def _distinct(trials: list[TrialRecord]) -> list[TrialRecord]:
    """Without a setting proposed again with the same seed: that is the same run, no further seed."""
    return list({repr(sorted(t.params.items())): t for t in reversed(trials)}.values())[::-1]


def _by_key(keyed: Sequence[tuple[str, TrialRecord]]) -> dict[str, list[TrialRecord]]:
    ordered = sorted(keyed, key=lambda item: item[0])
    return {key: [trial for _, trial in group] for key, group in groupby(ordered, key=lambda item: item[0])}


def _paths(record: SweepRecord) -> set[str]:
    """Config paths that the axes set, a bundle's among them."""
    if record.bundle_axis is None:
        return set(record.axes)
    bundle = record.search[f"sweep.space.{record.bundle_axis}"]
    inside = {path for settings in bundle["values"].values() for path in settings}
    return (set(record.axes) - {record.bundle_axis}) | inside


# ---- differences --------------------------------------------------------------------------------------------------


class _Scores:
    """Per-pair scores of runs, each read once."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], PairScores | str] = {}

    def of(self, record: SweepRecord, trial: TrialRecord) -> PairScores | str:
        """The scores, or why there are none."""
        key = (id(record), trial.trial_id)
        if key not in self._found:
            self._found[key] = _load(record, trial)
        return self._found[key]


def _load(record: SweepRecord, trial: TrialRecord) -> PairScores | str:
    name = f"trial {trial.trial_id} of {record.name}"
    folder = record.run_dir / "trials" / trial.trial_id if record.run_dir else None
    if folder is None and trial.checkpoint:
        folder = Path(trial.checkpoint).parent
    if folder is None:
        return f"the run directory of {record.name}, with its per-pair files, is not here"
    try:
        scores = PairScores.load(folder / PAIRS_FILE)
    except FileNotFoundError:
        why = " (its result was taken over from an earlier run)" if trial.reused_from else ""
        return f"per-pair file of {name} missing{why}"
    except (OSError, ValueError) as error:
        return f"per-pair file of {name} unreadable ({error})"
    for metric in METRIC_MODES:
        logged = trial.metrics.get(metric, math.nan)
        if not math.isnan(logged) and not math.isclose(scores.value(metric), logged, rel_tol=1e-4, abs_tol=1e-6):
            return (
                f"per-pair file of {name} is of another evaluation: its {metric} is {scores.value(metric):.6g}, the "
                f"trial's last one {logged:.6g}"
            )
    return scores


def _difference(metric: str, a: _Runs, b: _Runs, scores: _Scores) -> Difference:
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
        return replace(plain, difference=None, no_interval=_NO_PAIRS)
    if not all(np.array_equal(one.answer_bytes_N, first.answer_bytes_N) for one in shared):
        return replace(plain, difference=None, no_interval=_OTHER_PAIRS)
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


def _over_seeds(plain: Difference, a: _Runs, b: _Runs, why: str) -> Difference:
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
    if all(np.ptp(of_side) == 0 for of_side in values):  # no seed moved it, and there is no variance to divide by
        return replace(plain, low=plain.difference, high=plain.difference, covers=covers)
    low, high = ttest_ind(*values, equal_var=False).confidence_interval(LEVEL)
    return replace(plain, low=float(low), high=float(high), covers=covers)


_NO_PAIRS = "fewer than two held-out pairs were evaluated by both"
_OTHER_PAIRS = "the held-out pairs have the same names but other answers"
_OTHER_TOKENS = "it counts other tokens in each (tokenizer, length limits)"


def _moved_meaning(metric: str, a: _Runs, b: _Runs) -> str:
    """Settings, by value, that let the metric mean something else in each; "" where there are none."""
    ones, others = a.runs[0].settings, b.runs[0].settings
    # A preset is but a name for other settings, which are compared by themselves.
    moved = sorted(p for p in MEANING_MOVED_BY[metric] - {"loss.preset"} if ones.get(p) != others.get(p))
    return ", ".join(f"{path} is {as_text(ones.get(path))} and {as_text(others.get(path))}" for path in moved)


def _require_comparable(main: Difference, a: _Runs, b: _Runs, scores: _Scores) -> None:
    """Refuse where the figures are no common measure."""
    if main.difference is not None:
        return
    found = [scores.of(group.record, group.runs[0]) for group in (a, b)]
    if main.no_interval in (_NO_PAIRS, _OTHER_PAIRS):
        counts = [len(one.pair_ids_N) for one in found if isinstance(one, PairScores)]
        data = [c for c in _changes(a.settings, b.settings, set(), set()) if c.path.startswith("data.")]
        differ = "; ".join(f"{c.path} is {c.a} and {c.b}" for c in data if c.path != "data.cache_dir")
        raise CompareError(
            f"A ({a.name}, {counts[0]} pairs) and B ({b.name}, {counts[1]} pairs) were evaluated on different held-out "
            f"pairs: {main.no_interval}{f' ({differ})' if differ else ''}. Their metrics have no common measure: run "
            "one of them again with the other's data settings"
        )
    could = [m for m in METRIC_MODES if _difference(m, a, b, scores).difference is not None]
    raise CompareError(
        f"{main.metric} is no common measure of A ({a.name}) and B ({b.name}): {main.no_interval}; "
        + (f"use --metric {' or '.join(could)}" if could else "and neither is any other metric")
    )


def _matched(metric: str, a: SweepRecord, b: SweepRecord, scores: _Scores) -> tuple[Matched, ...]:
    """Settings that both ran to their end, alike in all that either sweep varies and that can move a metric."""
    paths = sorted(p for p in _paths(a) | _paths(b) if p != SEED and not p.startswith(SPEED_ONLY))
    found = [_settings_run(record, paths, metric) for record in (a, b)]
    rows = []
    for key in found[0].keys() & found[1].keys():
        one, other = (_Runs(r, tuple(f[key]), True, 1) for r, f in zip((a, b), found, strict=True))
        difference = _difference(metric, one, other, scores)
        name = describe({path: one.runs[0].settings.get(path) for path in paths})
        ids = [tuple(t.trial_id for t in group.runs) for group in (one, other)]
        rows.append(Matched(name, ids[0], ids[1], difference))
    sign = -1 if METRIC_MODES[metric] == "max" else 1

    def rank(row: Matched) -> tuple[float, str]:
        assert row.difference.a is not None
        assert row.difference.b is not None
        return sign * (row.difference.a + row.difference.b), row.setting

    return tuple(sorted(rows, key=rank))


def _settings_run(record: SweepRecord, paths: list[str], metric: str) -> dict[str, list[TrialRecord]]:
    """Setting by value -> its finished trials; of a finalist, those with fresh seeds."""
    finished = [t for t in record.trials if t.status == "finished" and not math.isnan(t.metrics.get(metric, math.nan))]
    keyed = [(as_text([t.settings.get(path) for path in paths]), t) for t in _distinct(finished)]
    return {key: [t for t in g if t.purpose == "confirm"] or g for key, g in _by_key(keyed).items()}


# ---- words --------------------------------------------------------------------------------------------------------


def _changes(a: dict[str, Any], b: dict[str, Any], swept_a: set[str], swept_b: set[str]) -> tuple[Change, ...]:
    texts = [{path: as_text(value) for path, value in settings.items()} for settings in (a, b)]
    by = {(True, True): "both", (True, False): "A", (False, True): "B", (False, False): ""}
    return tuple(
        Change(path, texts[0].get(path), texts[1].get(path), by[path in swept_a, path in swept_b])
        for path in sorted(texts[0].keys() | texts[1].keys())
        if texts[0].get(path, "null") != texts[1].get(path, "null")
    )


def _sentence(main: Difference, a: str, b: str) -> str:
    assert main.difference is not None
    assert main.mode is not None
    names = {"A": f"A ({a})", "B": f"B ({b})"}
    both = f"{names['A']} and {names['B']}"
    direction = f"({_better_when(main.mode)} is better)"
    if main.low is None or main.high is None:
        ahead = "B" if (main.difference > 0) == (main.mode == "max") else "A"
        found = (
            f"{names[ahead]} is ahead by {abs(main.difference):.4f} on {main.metric} {direction}"
            if main.difference
            else f"{both} have the same {main.metric}"
        )
        return f"{found}, but how sure that is cannot be said: {main.no_interval}."
    if main.low == main.high == 0:
        return f"{both} are the same on {main.metric}: no pair moves the difference from 0."
    if main.better is None:
        return (
            f"{both} cannot be told apart on {main.metric}: B − A is {main.difference:+.4f} "
            f"[{main.low:+.4f}, {main.high:+.4f}] {direction}."
        )
    low, high = sorted((abs(main.low), abs(main.high)))
    better_by = f"{abs(main.difference):.4f} [{low:.4f}, {high:.4f}]"
    return f"{names[main.better]} is better by {better_by} on {main.metric} {direction}."


def _notes(main: Difference, a: Side, b: Side) -> list[str]:
    notes = []
    if main.covers and "seeds" not in main.covers:
        notes.append(
            "One seed each: the interval covers the choice of the held-out pairs, not what another seed would change."
        )
    chosen = [(label, s.candidates) for label, s in (("A", a), ("B", b)) if s.candidates > 1]
    if chosen:
        text = " and ".join(f"{label}'s from {count} settings" for label, count in chosen)
        notes.append(
            f"The best was chosen by the score compared here, {text}, which flatters it, the more the more there were."
            + (" Settings that both ran are free of this." if len(chosen) == 2 else "")
        )
    if a.steps != b.steps:
        notes.append(f"A trained {a.steps} steps, B {b.steps}.")
    return notes


def _page(a: SweepRecord, b: SweepRecord, left: Side, right: Side) -> tuple[str | None, list[str]]:
    """MLflow's page of both, if one server has both, and what stood in the way."""
    uri, ids = a.tracking_uri, [side.mlflow_run_id for side in (left, right)]
    known = [run_id for run_id in ids if run_id is not None]
    if uri is None or uri != b.tracking_uri or not uri.startswith(("http://", "https://")) or len(known) < 2:
        return None, []
    try:
        return compare_page(uri, known), []
    except TrackingError as error:
        return None, [f"No link to MLflow's compare page: {str(error).splitlines()[0]}"]
