"""The HTML page's own tables and lists: tiles, trials with their commands, failures, generations, provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orpo_ray.config.space import describe
from orpo_ray.formatting import duration, status_text
from orpo_ray.reports.experiment_file import EXPERIMENT_FILE, command_of
from orpo_ray.reports.report_data import ReportData, best_trial, count_statuses, ranked
from orpo_ray.results.frames import LAMBDA, LR, varied_axes
from orpo_ray.storage.events import Status

PROVENANCE_FILE = "provenance.json"
GENERATIONS_FILE = "generations.jsonl"

_SHOWN_METRICS = ("eval/preference_accuracy", "eval/nll", "eval/log_odds")
_MAX_GENERATIONS = 8
_MAX_ERROR_CHARS = 4000


def headline_tiles(data: ReportData, sizes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Headline tiles as (value, label)."""
    trials, winners, state = data.results["trials"], data.results["winners"], data.state
    others = count_statuses(trials, but=Status.FINISHED)
    finished = sum(trial["status"] == Status.FINISHED for trial in trials)
    tiles = [(f"{finished} of {len(trials)}", "trials finished" + (f"; {others}" if others else ""))]
    if winners["no_intervals"] is None and winners["settings"]:
        tiles.append((f"{len(winners['tied'])} of {len(winners['settings'])}", "settings tied for the best"))
    if seconds := sum(size["device_seconds"] for size in sizes):
        tiles.append((duration(seconds), "device time of training"))
    if state.began_ms is not None:
        tiles.append((duration((state.last_ms - state.began_ms) / 1000), "from first event to last"))
    return tiles


def trial_table(data: ReportData, config: dict[str, Any] | None) -> dict[str, Any]:
    """Titles and rows of all trials, the best first; a cell is (text, sort key).

    Args:
        data: the sweep.
        config: from `experiment_file.read_config`.
    """
    results = data.results
    metrics = list(dict.fromkeys([results["metric"], *_SHOWN_METRICS]))
    metrics = [name for name in metrics if any(trial["metrics"].get(name) is not None for trial in results["trials"])]
    axes = varied_axes(results)
    with_bundle = len({trial["bundle"] for trial in results["trials"]}) > 1
    best = (best_trial(results) or {}).get("trial_id")
    file = data.run_dir / EXPERIMENT_FILE
    rows = []
    for trial in ranked(results):
        cells = [_cell(trial["bundle"])] if with_bundle else []
        cells += [_cell(trial["params"].get(axis)) for axis in axes]
        cells += [_cell(trial["metrics"].get(name), ".4f") for name in metrics]
        cells += [_cell(trial["steps"]), _cell(trial["train_seconds"], ".1f")]
        rows.append(
            {
                "trial_id": trial["trial_id"],
                "status": trial["status"],
                "best": trial["trial_id"] == best,
                "cells": cells,
                "command": command_of(trial, results["name"], str(file) if file.exists() else "FILE", config),
            }
        )
    short = {LAMBDA: "λ", LR: "lr"} | {axis: axis.rsplit(".", 1)[-1] for axis in axes if axis not in (LAMBDA, LR)}
    heads = [short[axis] for axis in axes] if len({*short.values()}) == len(short) else axes
    titles = ["size"] if with_bundle else []
    titles += [*heads, *(name.removeprefix("eval/") for name in metrics), "steps", "seconds"]
    statuses = list(dict.fromkeys(row["status"] for row in rows))
    return {"titles": titles, "rows": rows, "statuses": statuses}


def unfinished_ends(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Trials that failed, diverged or were stopped early, grouped by status."""
    groups = []
    for status in (Status.FAILED, Status.DIVERGED, Status.STOPPED_EARLY):
        rows = [
            {
                "name": describe(trial["params"]),
                "trial_id": trial["trial_id"],
                "step": trial["steps"],
                "error": (trial["error"] or "")[-_MAX_ERROR_CHARS:].strip(),
            }
            for trial in results["trials"]
            if trial["status"] == status
        ]
        if rows:
            groups.append({"status": status_text(status), "rows": rows})
    return groups


def generations(data: ReportData) -> dict[str, Any]:
    """Answers of the best trial and of the best λ = 0 trial to the same prompts, or the reason for showing none."""
    results = data.results
    params = {trial["trial_id"]: trial["params"] for trial in results["trials"]}
    best = (best_trial(results) or {}).get("trial_id")
    without = [
        t["trial_id"] for t in ranked(results) if t["status"] == Status.FINISHED and t["params"].get(LAMBDA) == 0
    ]
    control = None if best in without else next(iter(without), None)
    texts = {trial_id: _last_generations(data.run_dir, trial_id) for trial_id in (best, control) if trial_id}
    shown = [trial_id for trial_id, rows in texts.items() if rows]
    if not shown:
        return {"reason": "No generations were recorded for the best trial or the best trial with λ = 0."}
    note = ""
    if best not in shown:
        note = "The best trial has no generations."
    elif best in without:
        note = "The best trial itself has λ = 0."
    elif control is None:
        note = "There is no finished trial with λ = 0 to compare with."
    elif control not in shown:
        note = "The best trial with λ = 0 has no generations."
    titles = [("Best" if t == best else "Best with λ = 0") + f": {describe(params[t])}" for t in shown]
    pair_ids = [p for p in texts[shown[0]] if all(p in texts[t] for t in shown)][:_MAX_GENERATIONS]
    pairs = [
        texts[shown[0]][pair_id]
        | {"answers": [(title, texts[t][pair_id]["generated"]) for title, t in zip(titles, shown, strict=True)]}
        for pair_id in pair_ids
    ]
    return {"pairs": pairs, "note": note, "reason": ""}


def _last_generations(run_dir: Path, trial_id: str) -> dict[str, dict[str, Any]]:
    """Generations of the trial's last evaluation, by pair id; an incomplete last line is ignored."""
    path = run_dir / "trials" / trial_id / GENERATIONS_FILE
    if not path.is_file():
        return {}
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    last = max((row["step"] for row in rows), default=None)
    return {row["pair_id"]: row for row in rows if row["step"] == last}


def read_provenance(run_dir: Path) -> dict[str, Any] | None:
    """Command, commit, packages and machine of the sweep; None where `provenance.json` was not written yet."""
    path = run_dir / PROVENANCE_FILE
    if not path.is_file():
        return None
    collected: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    git = collected.get("git") or {}
    return {
        "command": collected["command"],
        "collected": collected["collected_at"],
        "commit": f"{git['commit']}{', with local changes' if git.get('dirty') else ''}" if git.get("commit") else None,
        "packages": {name: version for name, version in collected["packages"].items() if version},
        "machine": f"{collected['cpu']}, {collected['cpu_count']} CPUs, {collected['memory_gib']} GiB",
        "python": collected["python"],
    }


def _cell(value: Any, spec: str = "") -> tuple[str, str]:
    if value is None:
        return "–", ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value), str(value)
    return format(value, spec or (".3g" if isinstance(value, float) else "d")), repr(value)
