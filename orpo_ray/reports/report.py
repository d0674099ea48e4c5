"""What a sweep found, as a table for the terminal and as a page: from its results, its journal and its plots."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from rich.markup import escape
from rich.table import Table

from orpo_ray import provenance
from orpo_ray.config import ExperimentConfig
from orpo_ray.config.space import describe
from orpo_ray.formatting import number
from orpo_ray.reports.sections import (
    best_section,
    best_trial,
    bias_section,
    certainty_section,
    cost_section,
    divergence_section,
    ends_section,
    expectations_section,
    pareto_section,
    ranked,
    reason,
    seeds_section,
    trials_section,
    unfinished_section,
)
from orpo_ray.results.frames import (
    load_evaluations_frame,
    load_runs_frame,
)
from orpo_ray.results.winners import summarize_winners
from orpo_ray.storage.results import current
from orpo_ray.storage.sweep_state import read_state

if TYPE_CHECKING:
    from orpo_ray.reports.html import Texts

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
            trial["status"].replace("_", " "),
        ]
        style = (
            "bold green"
            if is_best
            else {"finished": "", "unfinished": "", "stopped_early": "dim"}.get(trial["status"], "red")
        )
        table.add_row(*cells, *([escape(reason(trial))] if has_reasons else []), style=style)
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
    state = read_state(run_dir)
    frame, curves = load_runs_frame(results), load_evaluations_frame(state)
    best_file, best, written = run_dir / "best.yaml", best_trial(results), []
    if config is not None:
        found = provenance.without_password(json.dumps(provenance.collect(), indent=2))
        (run_dir / PROVENANCE_FILE).write_text(found + "\n", encoding="utf-8")
    if config is not None and best is not None:
        best_file.write_text(_best_yaml(config, best["params"]), encoding="utf-8")
        written.append(best_file)
    if (experiment := write_experiment(run_dir)) is not None:
        written.append(experiment)
    texts = Texts(
        unfinished=unfinished_section(results),
        answer=best_section(results, best_file),
        certainty=certainty_section(results, frame),
        bias=bias_section(results["winners"]),
        expectations=expectations_section(results),
        cost=cost_section(results, state, config),
        pareto=pareto_section(results["winners"]["pareto"]),
        divergence=divergence_section(results["winners"]["divergence"]),
        seeds=seeds_section(results, frame, curves),
    )
    pages: list[Path] = []
    if "html" in formats:
        pages.append(write_page(run_dir, results, frame, curves, state, texts))
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
        trials_section(results),
        texts.seeds,
        ends_section(results),
        _plots_section(pictures, run_dir),
    ]
    path = run_dir / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return path


# Sections of the page


def _plots_section(pictures: list[tuple[Path, str]], run_dir: Path) -> str:
    shown = [f"![{path.stem}]({path.relative_to(run_dir).as_posix()})\n\n{text}" for path, text in pictures]
    return "## Pictures\n\n" + "\n\n".join(shown) if shown else ""


def _best_yaml(config: ExperimentConfig, params: dict[str, Any]) -> str:
    tree = config.trial(params).model_dump(mode="json", exclude_unset=True)
    tree["name"] = f"{config.name[:95]}-best"
    command = f"# The best trial of {config.name}: {describe(params)}. Run it with: orpo-ray train <this file>\n"
    return command + provenance.without_password(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


# Pieces
