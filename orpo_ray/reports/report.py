"""A sweep's outcome as a table for the terminal and as report files: HTML, Markdown, PNG and CSV."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from orpo_ray import provenance
from orpo_ray.config import ExperimentConfig
from orpo_ray.config.space import describe
from orpo_ray.formatting import number, status_text
from orpo_ray.reports.experiment_file import write_best, write_experiment
from orpo_ray.reports.page_tables import PROVENANCE_FILE
from orpo_ray.reports.report_data import ReportData, best_trial, ranked, reason
from orpo_ray.reports.sections import Texts, ends_section, trials_section
from orpo_ray.storage.events import Status

Format = Literal["html", "md", "png", "csv"]


def results_table(results: dict[str, Any]) -> Table:
    """The trials, best first: those that finished, then those unfinished, stopped early, diverged and failed.

    Args:
        results: from `results.current` or `results.summarize`.
    """
    metric, best = results["metric"], best_trial(results)
    trials = ranked(results)
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
            status_text(trial["status"]),
        ]
        style = (
            "bold green"
            if is_best
            else {Status.FINISHED: "", Status.UNFINISHED: "", Status.STOPPED_EARLY: "dim"}.get(trial["status"], "red")
        )
        table.add_row(*cells, *([escape(reason(trial))] if has_reasons else []), style=style)
    return table


def write_report(
    run_dir: str | Path, config: ExperimentConfig | None = None, formats: Collection[Format] = ("html", "md")
) -> list[Path]:
    """Write a sweep's report, with `experiment.yaml` and, given the config, `best.yaml`: the best setting alone.

    Args:
        run_dir: of a sweep that has ended, or of one that is running: the report then shows the journal so far.
        config: the experiment. Without it, a `best.yaml` written earlier is kept and referred to.
        formats: `html`: one self-contained page; `md`: `report.md`, which shows `plots/*.png`; `png`: the plots alone;
            `csv`: `trials.csv` and `evaluations.csv`.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: no sweep has run in run_dir.
    """
    data = ReportData.load(Path(run_dir))
    best, written = best_trial(data.results), []
    if config is not None:
        found = provenance.without_password(json.dumps(provenance.collect(), indent=2))
        (data.run_dir / PROVENANCE_FILE).write_text(found + "\n", encoding="utf-8")
        if best is not None:
            written.append(write_best(data.run_dir, config, best["params"]))
    if (experiment := write_experiment(data.run_dir)) is not None:
        written.append(experiment)
    return [*_write_pages(data, Texts.of(data, config), formats), *written]


def _write_pages(data: ReportData, texts: Texts, formats: Collection[Format]) -> list[Path]:
    # A sweep imports this module at its start; plotly and matplotlib are slow to import.
    from orpo_ray.reports.charts import draw_panels

    pages: list[Path] = []
    panels = draw_panels(data) if {"html", "md", "png"} & {*formats} else {}
    if "html" in formats:
        from orpo_ray.reports.html import write_page

        pages.append(write_page(data, panels, texts))
    if "md" in formats or "png" in formats:
        from orpo_ray.reports.png import write_pngs

        pictures = write_pngs(data.run_dir / "plots", panels, data.results["metric"])
        if "md" in formats:
            pages.append(_write_markdown(data, texts, pictures))
        pages += [path for path, _ in pictures]
    if "csv" in formats:
        for name, table in (("trials.csv", data.frame), ("evaluations.csv", data.evaluations)):
            table.to_csv(data.run_dir / name, index=False)
            pages.append(data.run_dir / name)
    return pages


def _write_markdown(data: ReportData, texts: Texts, pictures: list[tuple[Path, str]]) -> Path:
    shown = [f"![{path.stem}]({path.relative_to(data.run_dir).as_posix()})\n\n{text}" for path, text in pictures]
    sections = [
        f"# {data.results['name']}",
        texts.unfinished,
        texts.answer,
        texts.certainty,
        texts.bias,
        texts.expectations,
        texts.cost,
        texts.pareto,
        texts.divergence,
        trials_section(data.results),
        texts.seeds,
        ends_section(data.results),
        "\n\n".join(["## Pictures", *shown]) if shown else "",
    ]
    path = data.run_dir / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return path
