"""Compare two sweeps or two runs: which settings differ, and how certain the difference of held-out metrics is."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orpo_ray.config import METRIC_MODES
from orpo_ray.config.flatten import SPEED_ONLY, as_text
from orpo_ray.config.space import describe
from orpo_ray.formatting import better_when
from orpo_ray.results.differences import NO_PAIRS, OTHER_PAIRS, Difference, Scores, difference_of
from orpo_ray.results.frames import SEED
from orpo_ray.results.runs import read_sweep
from orpo_ray.results.sides import CompareError, Runs, Side, by_key, distinct, record_name, swept_paths
from orpo_ray.storage.events import Status
from orpo_ray.storage.pair_scores import PairScores
from orpo_ray.storage.records import SweepRecord, TrialRecord
from orpo_ray.tracking.read_runs import compare_page
from orpo_ray.tracking.uri import TrackingError


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs."""

    path: str
    a: str | None
    """Value in A as MLflow shows it; None where A lacks the setting."""
    b: str | None
    """The same for B."""
    swept: str
    """Whose axes set it: `A`, `B`, `both`, or "" for neither."""


@dataclass(frozen=True, slots=True)
class Matched:
    """A setting of which both sweeps have finished trials."""

    setting: str
    a_trial_ids: tuple[str, ...]
    b_trial_ids: tuple[str, ...]
    difference: Difference


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of `compare_runs`."""

    a: Side
    b: Side
    metric: str
    sentence: str
    """The answer in one line."""
    settings: tuple[Change, ...]
    """Settings that differ between the compared runs."""
    search: tuple[Change, ...]
    """Differences in the sweep section."""
    metrics: tuple[Difference, ...]
    """All metrics, the one asked for first."""
    matched: tuple[Matched, ...]
    """Settings that both sweeps ran, the best first; empty unless both sides are sweeps."""
    notes: tuple[str, ...]
    """What to know before relying on the answer."""
    compare_page: str | None
    """URL of the MLflow server's page that compares both runs, if one server has both. The terminal view leaves it out,
    because rich would break it over lines."""

    def to_json(self) -> str:
        """Everything as JSON, with null for unknown values."""
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
    a setting was trained with several (`bootstrap.setting_replicates`). Without the per-pair files (for a sweep known
    from MLflow alone) intervals are over seeds: a paired t-interval over the seeds in common, else Welch's.

    Args:
        a: anything that `runs.load_runs` accepts: run directory, name, `NAME/TRIAL_ID`, MLflow run id.
        b: the same.
        metric: one of `config.METRIC_MODES`; by default the one that both sweeps are judged by.
        output_dir: parent of the run directories.
        tracking_uri: MLflow tracking URI; if given, both sides are read from MLflow.
        experiment: MLflow experiment to search.

    Raises:
        CompareError: both sides are the same, are judged by different metrics and none was given, were evaluated on
            different held-out pairs, the metric has a different meaning on each side, or a side has no value of it.
        FileNotFoundError: there is no such sweep or run.
        TrackingError: MLflow does not answer.
    """
    if metric is not None and metric not in METRIC_MODES:
        raise CompareError(f"metric {metric!r} is not a held-out metric; use one of {', '.join(METRIC_MODES)}")
    where: dict[str, Any] = {"tracking_uri": tracking_uri, "experiment": experiment, "output_dir": output_dir}
    records = (read_sweep(a, **where), read_sweep(b, **where))
    metric = metric or _common_metric(*records)
    left, right = groups = (Runs.best(records[0], metric, "A"), Runs.best(records[1], metric, "B"))
    if left.same_as(right):
        raise CompareError(f"A and B are the same: {left.name}; name two different ones")
    scores = Scores()
    main = difference_of(metric, left, right, scores)
    _require_comparable(main, left, right, scores)
    others = dict.fromkeys([*METRIC_MODES, *sorted({k for g in groups for k in g.runs[0].metrics})])
    metrics = (main, *(difference_of(other, left, right, scores) for other in others if other != metric))
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


def _common_metric(a: SweepRecord, b: SweepRecord) -> str:
    if a.metric != b.metric:
        (first, one), (second, other) = (
            (r.metric, f"{record_name(r)} is judged by {r.metric} ({better_when(r.mode)} is better)") for r in (a, b)
        )
        raise CompareError(f"{one}, {other}: choose one with --metric {first} or --metric {second}")
    return a.metric


def _require_comparable(main: Difference, a: Runs, b: Runs, scores: Scores) -> None:
    """Raise CompareError where the metric is not a common measure of both sides."""
    if main.difference is not None:
        return
    found = [scores.of(group.record, group.runs[0]) for group in (a, b)]
    if main.no_interval in (NO_PAIRS, OTHER_PAIRS):
        counts = [len(one.pair_ids_N) for one in found if isinstance(one, PairScores)]
        data = [c for c in _changes(a.settings, b.settings, set(), set()) if c.path.startswith("data.")]
        differ = "; ".join(f"{c.path} is {c.a} and {c.b}" for c in data if c.path != "data.cache_dir")
        raise CompareError(
            f"A ({a.name}, {counts[0]} pairs) and B ({b.name}, {counts[1]} pairs) were evaluated on different held-out "
            f"pairs: {main.no_interval}{f' ({differ})' if differ else ''}. Their metrics are not comparable: run one "
            "again with the other's data settings"
        )
    could = [m for m in METRIC_MODES if difference_of(m, a, b, scores).difference is not None]
    raise CompareError(
        f"{main.metric} is no common measure of A ({a.name}) and B ({b.name}): {main.no_interval}; "
        + (f"use --metric {' or '.join(could)}" if could else "and neither is any other metric")
    )


def _matched(metric: str, a: SweepRecord, b: SweepRecord, scores: Scores) -> tuple[Matched, ...]:
    """Settings with finished trials in both sweeps: equal in every path that either sweep varies and that can change a
    metric."""
    paths = sorted(p for p in swept_paths(a) | swept_paths(b) if p != SEED and not p.startswith(SPEED_ONLY))
    found = [_settings_run(record, paths, metric) for record in (a, b)]
    rows = []
    for key in found[0].keys() & found[1].keys():
        one, other = (Runs(r, tuple(f[key]), True, 1) for r, f in zip((a, b), found, strict=True))
        difference = difference_of(metric, one, other, scores)
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
    """Setting by value -> its finished trials; for a finalist, only those with fresh seeds."""
    finished = [
        t for t in record.trials if t.status == Status.FINISHED and not math.isnan(t.metrics.get(metric, math.nan))
    ]
    keyed = [(as_text([t.settings.get(path) for path in paths]), t) for t in distinct(finished)]
    return {key: [t for t in g if t.purpose == "confirm"] or g for key, g in by_key(keyed).items()}


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
    direction = f"({better_when(main.mode)} is better)"
    if main.low is None or main.high is None:
        ahead = "B" if (main.difference > 0) == (main.mode == "max") else "A"
        found = (
            f"{names[ahead]} is ahead by {abs(main.difference):.4f} on {main.metric} {direction}"
            if main.difference
            else f"{both} have the same {main.metric}"
        )
        return f"{found}, but how certain that is is unknown: {main.no_interval}."
    if main.low == main.high == 0:
        return f"{both} are the same on {main.metric}: the difference is 0 on every resample."
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
            "One seed each: the interval covers the choice of the held-out pairs, not the effect of another seed."
        )
    chosen = [(label, s.candidates) for label, s in (("A", a), ("B", b)) if s.candidates > 1]
    if chosen:
        text = " and ".join(f"{label}'s from {count} settings" for label, count in chosen)
        notes.append(
            f"The best was chosen by the score compared here, {text}, which flatters it; more candidates flatter more."
            + (" The comparison of settings that both ran is free of this." if len(chosen) == 2 else "")
        )
    if a.steps != b.steps:
        notes.append(f"A trained for {a.steps} steps, B for {b.steps}.")
    return notes


def _page(a: SweepRecord, b: SweepRecord, left: Side, right: Side) -> tuple[str | None, list[str]]:
    """URL of MLflow's compare page if one server has both runs, and a note if it could not be found."""
    uri, ids = a.tracking_uri, [side.mlflow_run_id for side in (left, right)]
    known = [run_id for run_id in ids if run_id is not None]
    if uri is None or uri != b.tracking_uri or not uri.startswith(("http://", "https://")) or len(known) < 2:
        return None, []
    try:
        return compare_page(uri, known), []
    except TrackingError as error:
        return None, [f"No link to MLflow's compare page: {str(error).splitlines()[0]}"]
