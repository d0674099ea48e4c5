"""What a sweep found, as a table for the terminal and as a page: from its results, its journal and its plots."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import yaml
from rich.markup import escape
from rich.table import Table

from orpo_ray import provenance
from orpo_ray.config.experiment import ExperimentConfig
from orpo_ray.config.space import describe
from orpo_ray.formatting import markdown_table, number
from orpo_ray.reports.sections import bias_section, certainty_section, divergence_section, pareto_section
from orpo_ray.results.frames import (
    SEED,
    by_setting,
    finished_rows,
    load_evaluations_frame,
    load_runs_frame,
    mean_interval,
    varied_axes,
)
from orpo_ray.results.winners import summarize_winners
from orpo_ray.storage.results import EVENTS_FILE, current, read_events

if TYPE_CHECKING:
    from orpo_ray.reports.html import Texts

Format = Literal["html", "md", "png", "csv"]

_STATUS_ORDER = ("finished", "unfinished", "stopped_early", "diverged", "failed")
_SUMMARISED = ("eval/preference_accuracy", "eval/nll", "eval/log_odds", "eval/chosen_logp", "eval/rejected_logp")


def results_table(results: dict[str, Any]) -> Table:
    """The trials, best first: those that finished, then those unfinished, stopped early, diverged and failed.

    Args:
        results: from `results.current` or `results.summarize`.
    """
    metric, best = results["metric"], _best_trial(results)
    trials = _ranked(results)
    has_reasons = any(trial["error"] for trial in trials)
    table = Table(title=f"{results['name']}: {len(trials)} trials", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("trial", overflow="fold")
    for heading in (metric, "eval/log_odds", "steps", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("status")
    if has_reasons:
        table.add_column("why", overflow="fold")
    for trial in trials:
        is_best = best is not None and trial["trial_id"] == best["trial_id"]
        cells = [
            "★" if is_best else "",
            escape(describe(trial["params"])),
            number(trial["metrics"].get(metric)),
            number(trial["metrics"].get("eval/log_odds"), "+.3f"),
            str(trial["steps"]),
            number(trial["train_seconds"], ".1f"),
            trial["status"].replace("_", " "),
        ]
        style = (
            "bold green"
            if is_best
            else {"finished": "", "unfinished": "", "stopped_early": "dim"}.get(trial["status"], "red")
        )
        table.add_row(*cells, *([escape(_reason(trial))] if has_reasons else []), style=style)
    return table


def write_report(
    run_dir: str | Path, config: ExperimentConfig | None = None, formats: Collection[Format] = ("html", "md")
) -> list[Path]:
    """Write a sweep's report, with `experiment.yaml` and, given the config, `best.yaml`: the best setting alone.

    Args:
        run_dir: of a sweep that has ended, or of one under way: then the page says what its journal tells so far.
        config: the experiment. Without it a `best.yaml` written earlier is kept and referred to.
        formats: `html`: one page that needs nothing else; `md`: `report.md`, which shows `plots/*.png`; `png`: the
            plots alone; `csv`: `trials.csv` and `evaluations.csv`.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: no sweep has run in run_dir.
    """
    # A sweep imports this module at its start, and plotly takes its time to import.
    from orpo_ray.reports.html import PROVENANCE_FILE, Texts, write_experiment, write_page

    run_dir = Path(run_dir)
    results = current(run_dir)
    if "winners" not in results:  # of a sweep under way, or of before there were any
        results["winners"] = summarize_winners(results, run_dir)
    events = read_events(run_dir / EVENTS_FILE)
    frame, curves = load_runs_frame(results), load_evaluations_frame(events)
    best_file, best, written = run_dir / "best.yaml", _best_trial(results), []
    if config is not None:
        found = provenance.without_password(json.dumps(provenance.collect(), indent=2))
        (run_dir / PROVENANCE_FILE).write_text(found + "\n", encoding="utf-8")
    if config is not None and best is not None:
        best_file.write_text(_best_yaml(config, best["params"]), encoding="utf-8")
        written.append(best_file)
    if (experiment := write_experiment(run_dir)) is not None:
        written.append(experiment)
    texts = Texts(
        unfinished=_unfinished_section(results),
        answer=_best_section(results, best_file),
        certainty=certainty_section(results, frame),
        bias=bias_section(results["winners"]),
        expectations=_expectations_section(results),
        cost=_cost_section(results, events, config),
        pareto=pareto_section(results["winners"]["pareto"]),
        divergence=divergence_section(results["winners"]["divergence"]),
        seeds=_seeds_section(results, frame, curves),
    )
    pages: list[Path] = []
    if "html" in formats:
        pages.append(write_page(run_dir, results, frame, curves, events, texts))
    if "md" in formats or "png" in formats:
        from orpo_ray.reports.plots import write_plots  # matplotlib takes its time to import

        pictures = write_plots(run_dir / "plots", results, frame, curves)
        if "md" in formats:
            pages.append(_write_markdown(run_dir, results, texts, pictures))
        pages += [path for path, _ in pictures]
    if "csv" in formats:
        for name, table in (("trials.csv", frame), ("evaluations.csv", curves)):
            table.to_csv(run_dir / name, index=False)
            pages.append(run_dir / name)
    return [*pages, *written]


def _write_markdown(run_dir: Path, results: dict[str, Any], texts: Texts, pictures: list[tuple[Path, str]]) -> Path:
    sections = [
        f"# {results['name']}",
        texts.unfinished,
        texts.answer,
        texts.certainty,
        texts.bias,
        texts.expectations,
        texts.cost,
        texts.pareto,
        texts.divergence,
        _trials_section(results),
        texts.seeds,
        _ends_section(results),
        _plots_section(pictures, run_dir),
    ]
    path = run_dir / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return path


# Sections of the page


def _unfinished_section(results: dict[str, Any]) -> str:
    submitted, unfinished = len(results["trials"]), _num_unfinished(results)
    if submitted and not unfinished:
        return ""
    return (
        f"Not the end: {unfinished} of {submitted} trials submitted so far have not ended. When this page was written "
        "the sweep was under way, or interrupted; the command that started it continues it."
    )


def _best_section(results: dict[str, Any], best_file: Path) -> str:
    best, setting, metric = _best_trial(results), results["winners"]["best"], results["metric"]
    if best is None:
        return f"No trial has a value of `{metric}` to be judged by."
    best_of = "Best so far" if _num_unfinished(results) else "Best"
    better = "higher" if results["mode"] == "max" else "lower"
    if setting is None:
        name, value, of = describe(best["params"]), number(best["metrics"][metric]), f"trial {best['trial_id']}"
    else:
        name, value = setting["name"], number(setting["mean"])
        if setting["low"] is not None:
            value += f" [{number(setting['low'])}, {number(setting['high'])}]"
        of = f"mean of {setting['seeds']} seeds" if setting["seeds"] > 1 else f"trial {setting['trial_ids'][0]}"
    name = f"{best_of}: {name}" if best["params"] else "Result"
    lines = [f"**{name}.** `{metric}` = {value} ({better} is better) after {best['steps']} steps, {of}."]
    if best["status"] != "finished":
        lines.append("It was stopped early; no trial ran to its end.")
    if best["checkpoint"]:
        which = " of its best run" if setting is not None and setting["seeds"] > 1 else ""
        lines.append(f"Checkpoint{which}: `{best['checkpoint']}`.")
    if best_file.exists():
        lines.append(f"Train it alone:\n\n    orpo-ray train {best_file}")
    elif best["params"]:
        overrides = " ".join(f"{name}={value}" for name, value in best["params"].items() if "." in name)
        bundle = f" and the settings of bundle {best['bundle']}" if best["bundle"] else ""
        lines.append(f"Train it alone with `{overrides}`{bundle} as overrides of `orpo-ray train`.")
    return "\n\n".join(lines)


def _expectations_section(results: dict[str, Any]) -> str:
    """What searcher ladder says of each size, in its own words."""
    said = [f"- {expected['says']}" for expected in results.get("expectations", [])]
    return "## What to expect of each size\n\n" + "\n".join(said) if said else ""


def _trials_section(results: dict[str, Any]) -> str:
    best, columns = _best_trial(results), _summarised(results)
    rows = []
    for trial in _ranked(results):
        name = describe(trial["params"])
        is_best = best is not None and trial["trial_id"] == best["trial_id"]
        values = [number(trial["metrics"].get(column)) for column in columns]
        rest = [str(trial["steps"]), number(trial["train_seconds"], ".1f"), trial["status"].replace("_", " ")]
        rows.append([f"**{name}**" if is_best else name, *values, *rest])
    return "## Trials\n\nMetrics are those of the last evaluation.\n\n" + markdown_table(
        ["trial", *columns, "steps", "seconds", "status"], rows
    )


def _summarised(results: dict[str, Any]) -> list[str]:
    """The sweep's metric, and of the usual ones those that its trials have: a reward model predicts no token."""
    usual = [name for name in _SUMMARISED if any(t["metrics"].get(name) is not None for t in results["trials"])]
    return list(dict.fromkeys([results["metric"], *usual]))


def _seeds_section(results: dict[str, Any], frame: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Mean ± half-width over seeds, per setting."""
    metric = results["metric"]
    finished = finished_rows(frame, metric)
    if SEED not in varied_axes(results) or finished.empty:
        return ""
    evaluations = curves.sort_values("step").groupby("trial_id")
    change = evaluations.last() - evaluations.first()
    columns = _summarised(results)
    sides = [side for side in ("eval/chosen_logp", "eval/rejected_logp") if side in change]
    rows = []
    for key, group in by_setting(results, finished):
        cells = [_mean_cell(group[c]) if c in group else "–" for c in columns]
        cells += [_mean_cell(change[side].reindex(group["trial_id"]), sign="+") for side in sides]
        rows.append([key, str(len(group)), *cells])
    titles = ["setting", "seeds", *columns, *(f"change of {side.removeprefix('eval/')}" for side in sides)]
    return (
        "## Over seeds\n\nMean ± half-width of the 95 % t-interval over the seeds that finished; changes are from the "
        "first evaluation to the last.\n\n" + markdown_table(titles, rows)
    )


def _ends_section(results: dict[str, Any]) -> str:
    titles = {"stopped_early": "Stopped early", "diverged": "Diverged", "failed": "Failed"}
    parts = []
    for status, title in titles.items():
        trials = [trial for trial in _ranked(results) if trial["status"] == status]
        if trials:
            lines = [f"- {describe(t['params'])}: step {t['steps']}{_colon(_reason(t))}" for t in trials]
            parts.append(f"**{title}** ({len(trials)})\n\n" + "\n".join(lines))
    return "## Trials that did not run to their end\n\n" + "\n\n".join(parts) if parts else ""


def _plots_section(pictures: list[tuple[Path, str]], run_dir: Path) -> str:
    shown = [f"![{path.stem}]({path.relative_to(run_dir).as_posix()})\n\n{text}" for path, text in pictures]
    return "## Pictures\n\n" + "\n\n".join(shown) if shown else ""


def _cost_section(results: dict[str, Any], events: list[dict[str, Any]], config: ExperimentConfig | None) -> str:
    trials = results["trials"]
    counts = Counter(trial["status"] for trial in trials)
    ended = ", ".join(f"{counts[status]} {status.replace('_', ' ')}" for status in _STATUS_ORDER if counts[status])
    seconds = {t["trial_id"]: t["train_seconds"] for t in trials if t["train_seconds"] is not None}
    lines = [
        f"- {len(trials)} {'trial' if len(trials) == 1 else 'trials'}{_colon(ended)}.",
        f"- {_duration(sum(seconds.values()))} of training, added up.",
    ]
    if config is not None:
        workers = {t["trial_id"]: config.trial(t["params"]).scaling.num_workers for t in trials}
        lines[1] = lines[1][:-1] + f" ({_duration(sum(s * workers[t] for t, s in seconds.items()))} of worker time)."
    if events:
        lines.append(
            f"- {_duration((events[-1]['time'] - events[0]['time']) / 1000)} from the first event to the last."
        )
    planned = {e["trial_id"]: e["max_steps"] for e in events if e["event"] == "started"}
    saved = sum(planned.get(t["trial_id"], t["steps"]) - t["steps"] for t in trials if t["status"] == "stopped_early")
    if saved:
        lines.append(f"- Early stopping saved {saved} of {sum(planned.values())} steps.")
    return "## Cost\n\n" + "\n".join(lines)


def _best_yaml(config: ExperimentConfig, params: dict[str, Any]) -> str:
    tree = config.trial(params).model_dump(mode="json", exclude_unset=True)
    tree["name"] = f"{config.name[:95]}-best"
    command = f"# The best trial of {config.name}: {describe(params)}. Run it with: orpo-ray train <this file>\n"
    return command + provenance.without_password(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


# Pieces


def _best_trial(results: dict[str, Any]) -> dict[str, Any] | None:
    """The best setting's best run; where no setting is judged, the best trial there is."""
    if (setting := results.get("winners", {}).get("best")) is None:
        return results["best"]
    best: dict[str, Any] = next(t for t in results["trials"] if t["trial_id"] == setting["trial_id"])
    return best


def _ranked(results: dict[str, Any]) -> list[dict[str, Any]]:
    sign = -1.0 if results["mode"] == "max" else 1.0

    def key(trial: dict[str, Any]) -> tuple[int, float]:
        value = trial["metrics"].get(results["metric"])
        return _STATUS_ORDER.index(trial["status"]), math.inf if value is None else sign * value

    return sorted(results["trials"], key=key)


def _num_unfinished(results: dict[str, Any]) -> int:
    return sum(trial["status"] == "unfinished" for trial in results["trials"])


def _mean_cell(values: pd.Series, sign: str = "") -> str:
    known = values.dropna().tolist()
    if not known:
        return "–"
    mean, half = mean_interval(known)
    return f"{mean:{sign}.4f}" + (f" ± {half:.4f}" if half is not None else "")


def _reason(trial: dict[str, Any]) -> str:
    """The error in a line: the last of a traceback says most."""
    lines = (trial["error"] or "").strip().splitlines()
    text = lines[-1] if lines and lines[0].startswith("Traceback") else lines[0] if lines else ""
    return text if len(text) <= 160 else text[:157] + "..."


def _colon(text: str) -> str:
    return f": {text}" if text else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
