"""A sweep as one HTML page that needs nothing else: the answer, figures to explore, every trial with its command."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import plotly.io
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from orpo_ray.config import as_given
from orpo_ray.config.space import describe
from orpo_ray.formatting import number
from orpo_ray.provenance import without_password
from orpo_ray.reports import charts
from orpo_ray.results.frames import LAMBDA, LR, varied_axes
from orpo_ray.results.winners import optima
from orpo_ray.storage.run_dir import SWEEP_FILE
from orpo_ray.storage.sweep_state import SweepState

PAGE_FILE = "report.html"
EXPERIMENT_FILE = "experiment.yaml"
"""The sweep's config as it ran: what the commands on the page refer to."""
PROVENANCE_FILE = "provenance.json"
GENERATIONS_FILE = "generations.jsonl"

_STATUS_ORDER = ("finished", "unfinished", "stopped_early", "diverged", "failed")
_SHOWN_METRICS = ("eval/preference_accuracy", "eval/nll", "eval/log_odds")
_MAX_GENERATIONS = 8
_MAX_ERROR_CHARS = 4000
_MAX_TIED = 8


@dataclass(frozen=True, slots=True)
class Texts:
    """What the report says in words, as Markdown; empty where it has nothing to say."""

    unfinished: str
    answer: str
    certainty: str
    bias: str
    expectations: str
    cost: str
    pareto: str
    divergence: str
    seeds: str


def write_page(
    run_dir: Path,
    results: dict[str, Any],
    frame: pd.DataFrame,
    evaluations: pd.DataFrame,
    state: SweepState,
    texts: Texts,
) -> Path:
    """Write `report.html`: self-contained, so that it can be mailed, archived or attached to an MLflow run.

    Args:
        run_dir: of the sweep; `sweep.json`, `provenance.json` and the trials' generations are read where they exist.
        results: as `results.current` gives them, with `winners`.
        frame: of `frames.load_runs_frame`.
        evaluations: of `frames.load_evaluations_frame`.
        state: the sweep, folded from its journal.
        texts: the report's words.

    Returns:
        The file.
    """
    config = _config_of(run_dir)
    sizes = _sizes(results, state)
    winners, metric = results["winners"], results["metric"]
    parameters = {size["bundle"]: size["parameters"] for size in sizes if size["parameters"]}
    panels = {
        "intervals": charts.intervals(winners),
        "heat_maps": charts.heat_maps(results, frame),
        "curves": charts.curves(results, frame, evaluations),
        "pareto": charts.pareto(winners["pareto"]),
        "parallel": charts.parallel(results, frame),
        "importance": charts.importance(results, frame),
        "scaling": charts.scaling(optima(results, run_dir, parameters), metric),
        "divergence": charts.divergence(results, frame, winners["divergence"]),
    }
    template = _environment().get_template("report.html.j2")
    page = template.render(
        name=results["name"],
        metric=metric,
        last_event=_time_text(state.last_ms) if state.last_ms else None,
        next_id=count(1).__next__,
        texts=texts,
        tiles=_tiles(results, sizes, state),
        tied=winners["tied"][:_MAX_TIED],
        more_tied=max(0, len(winners["tied"]) - _MAX_TIED),
        best_name=(winners["best"] or {}).get("name"),
        panels=panels,
        sizes=sizes,
        table=_table(results, run_dir, config),
        file_known=(run_dir / EXPERIMENT_FILE).exists(),
        ends=_ends(results),
        generations=_generations(results, run_dir),
        provenance=_provenance(run_dir),
        config=None if config is None else yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        css=_asset("report.css"),
        script=_asset("report.js"),
        plotly=Markup(get_plotlyjs()) if any(panel.charts for panel in panels.values()) else "",
    )
    path = run_dir / PAGE_FILE
    path.write_text(page, encoding="utf-8")
    return path


def write_experiment(run_dir: Path) -> Path | None:
    """Write `experiment.yaml`, the config of `sweep.json` as a file that `orpo-ray train` reads; None without that."""
    if (config := _config_of(run_dir)) is None:
        return None
    path = run_dir / EXPERIMENT_FILE
    text = "# The experiment as it ran, every setting said.\n"
    path.write_text(text + yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def train_command(trial: Mapping[str, Any], name: str, file: str, config: Mapping[str, Any] | None) -> str | None:
    """The command that trains one trial again, under a name of its own.

    Args:
        trial: of `results.summarize`.
        name: of the sweep.
        file: the experiment's.
        config: of `sweep.json`; without it a bundle's settings are not known and are left out.

    Returns:
        None for a trial that took over another's weights (population-based training): no single run gives it.
    """
    if trial.get("forks"):
        return None
    space = ((config or {}).get("sweep") or {}).get("space") or {}
    settings: dict[str, Any] = {}
    for axis, value in trial["params"].items():
        if space.get(axis, {}).get("type") == "bundle":
            settings |= space[axis]["values"][value]
        elif "." in axis:
            settings[axis] = value
    settings["name"] = f"{name[:80]}-{trial['trial_id']}"
    return "orpo-ray train " + shlex.join([file, *(f"{key}={_scalar(value)}" for key, value in settings.items())])


# ---- parts of the page --------------------------------------------------------------------------------------------


def _tiles(results: dict[str, Any], sizes: list[dict[str, Any]], state: SweepState) -> list[tuple[str, str]]:
    """(figure, what it counts), for the eye that has a second."""
    trials, winners = results["trials"], results["winners"]
    counts = Counter(trial["status"] for trial in trials)
    ended = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in counts.most_common() if status != "finished")
    tiles = [(f"{counts['finished']} of {len(trials)}", "trials finished" + (f"; {ended}" if ended else ""))]
    if winners["no_intervals"] is None and winners["settings"]:
        tiles.append((f"{len(winners['tied'])} of {len(winners['settings'])}", "settings tied for the best"))
    if hours := sum(size["device_hours"] for size in sizes):
        tiles.append((_hours(hours), "device time of training"))
    if state.began_ms is not None:
        tiles.append((_hours((state.last_ms - state.began_ms) / 3.6e6), "first event to last"))
    return tiles


def _sizes(results: dict[str, Any], state: SweepState) -> list[dict[str, Any]]:
    """Throughput and cost of each model size, in the order of submission."""
    rows = []
    for bundle in dict.fromkeys(trial["bundle"] for trial in results["trials"]):
        own = [trial for trial in state.trials.values() if trial.bundle == bundle]
        speeds = [speed for trial in own for speed in trial.tokens_per_second]
        rows.append(
            {
                "bundle": bundle,
                "parameters": state.parameters.get(bundle),
                "trials": sum(trial["bundle"] == bundle for trial in results["trials"]),
                "devices": max((trial.devices for trial in own), default=None),
                "tokens_per_second": median(speeds) if speeds else None,
                "peak_memory_gib": max((t.peak_memory_gib for t in own if t.peak_memory_gib is not None), default=None),
                "steps": sum(trial["steps"] for trial in results["trials"] if trial["bundle"] == bundle),
                "device_hours": sum(trial.device_seconds for trial in own) / 3600,
            }
        )
    return rows


def _table(results: dict[str, Any], run_dir: Path, config: dict[str, Any] | None) -> dict[str, Any]:
    """Columns and rows of all trials, the best first; a cell is (text, what it is sorted by)."""
    metrics = list(dict.fromkeys([results["metric"], *_SHOWN_METRICS]))
    metrics = [name for name in metrics if any(trial["metrics"].get(name) is not None for trial in results["trials"])]
    axes = varied_axes(results)
    with_bundle = len({trial["bundle"] for trial in results["trials"]}) > 1
    best = results["winners"]["best"] or results["best"] or {}
    file = run_dir / EXPERIMENT_FILE
    rows = []
    for trial in _ranked(results):
        cells = [_cell(trial["bundle"])] if with_bundle else []
        cells += [_cell(trial["params"].get(axis)) for axis in axes]
        cells += [_cell(trial["metrics"].get(name), ".4f") for name in metrics]
        cells += [_cell(trial["steps"]), _cell(trial["train_seconds"], ".1f")]
        rows.append(
            {
                "trial_id": trial["trial_id"],
                "status": trial["status"],
                "best": trial["trial_id"] == best.get("trial_id"),
                "cells": cells,
                "command": train_command(trial, results["name"], str(file) if file.exists() else "FILE", config),
            }
        )
    short = {LAMBDA: "λ", LR: "lr"} | {axis: axis.rsplit(".", 1)[-1] for axis in axes if axis not in (LAMBDA, LR)}
    heads = [short[axis] for axis in axes] if len({*short.values()}) == len(short) else axes
    titles = ["size"] if with_bundle else []
    titles += [*heads, *(name.removeprefix("eval/") for name in metrics), "steps", "seconds"]
    statuses = list(dict.fromkeys(row["status"] for row in rows))
    return {"titles": titles, "rows": rows, "statuses": statuses}


def _ends(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Trials that were lost or stopped, by how they ended."""
    groups = []
    for status in ("failed", "diverged", "stopped_early"):
        trials = [t for t in results["trials"] if t["status"] == status]
        rows = [
            {
                "name": describe(trial["params"]),
                "trial_id": trial["trial_id"],
                "step": trial["steps"],
                "error": (trial["error"] or "")[-_MAX_ERROR_CHARS:].strip(),
            }
            for trial in trials
        ]
        if rows:
            groups.append({"status": status.replace("_", " "), "rows": rows})
    return groups


def _generations(results: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """What the best trial and the best λ = 0 trial write for the same prompts, or why that is not shown."""
    params = {trial["trial_id"]: trial["params"] for trial in results["trials"]}
    best = (results["winners"]["best"] or results["best"] or {}).get("trial_id")
    without = [t["trial_id"] for t in _ranked(results) if t["status"] == "finished" and t["params"].get(LAMBDA) == 0]
    control = None if best in without else next(iter(without), None)
    texts = {trial_id: _last_generations(run_dir, trial_id) for trial_id in (best, control) if trial_id is not None}
    shown = [trial_id for trial_id, rows in texts.items() if rows]
    if not shown:
        return {"reason": "No generations were recorded of the best trial, nor of the best with λ = 0."}
    note = ""
    if best not in shown:
        note = "The best trial has no generations."
    elif best in without:
        note = "The best trial is one with λ = 0 itself."
    elif control is None:
        note = "There is no finished trial with λ = 0 to compare with."
    elif control not in shown:
        note = "The best trial with λ = 0 has no generations."
    titles = [("Best" if t == best else "Best of λ = 0") + f": {describe(params[t])}" for t in shown]
    pair_ids = [p for p in texts[shown[0]] if all(p in texts[t] for t in shown)][:_MAX_GENERATIONS]
    pairs = [
        texts[shown[0]][pair_id]
        | {"answers": [(title, texts[t][pair_id]["generated"]) for title, t in zip(titles, shown, strict=True)]}
        for pair_id in pair_ids
    ]
    return {"pairs": pairs, "note": note, "reason": ""}


def _last_generations(run_dir: Path, trial_id: str) -> dict[str, dict[str, Any]]:
    """Of the trial's last evaluation, by pair; a torn last line is left out."""
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


def _provenance(run_dir: Path) -> dict[str, Any] | None:
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


def _ranked(results: dict[str, Any]) -> list[dict[str, Any]]:
    sign = -1 if results["mode"] == "max" else 1

    def place(trial: dict[str, Any]) -> tuple[int, bool, float]:
        value = trial["metrics"].get(results["metric"])
        return _STATUS_ORDER.index(trial["status"]), value is None, sign * (value or 0.0)

    return sorted(results["trials"], key=place)


# ---- pieces -------------------------------------------------------------------------------------------------------


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("orpo_ray.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "markdown": _to_html,
        "figure": lambda chart: _script_json(plotly.io.to_json(chart.figure, validate=False)),
        "number": number,
        "thousands": lambda value: "–" if value is None else f"{value:,.0f}",
        "hours": _hours,
    }
    return environment


@cache
def _markdown() -> MarkdownIt:
    # The words hold names that users gave: no markup of theirs, no links, nothing to be loaded from elsewhere.
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink"])

    def open_table(*_: Any) -> str:
        return '<div class="scroll long" tabindex="0" role="region" aria-label="table"><table>'

    reader.add_render_rule("table_open", open_table)
    reader.add_render_rule("table_close", lambda *_: "</table></div>")
    return reader


def _to_html(text: str) -> Markup:
    """Without a leading heading: the page has its own."""
    if text.startswith("## "):
        text = text.partition("\n")[2]
    return Markup(_markdown().render(text))


def _script_json(text: str) -> Markup:
    """JSON that cannot end the script element it stands in, nor open a comment."""
    for char, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(char, code)
    return Markup(text)


def _asset(name: str) -> Markup:
    return Markup(files("orpo_ray.reports").joinpath("templates", name).read_text(encoding="utf-8"))


def _config_of(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / SWEEP_FILE
    if not path.is_file():
        return None
    # The page and its files go to other people: without a password of the tracking server.
    known = json.loads(without_password(path.read_text(encoding="utf-8")))
    return as_given(known["config"])


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cell(value: Any, spec: str = "") -> tuple[str, str]:
    if value is None:
        return "–", ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value), str(value)
    return format(value, spec or (".3g" if isinstance(value, float) else "d")), repr(value)


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} s"
    return f"{hours * 60:.1f} min" if hours < 2 else f"{hours:.1f} h"


def _time_text(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
