"""A sweep's report as one self-contained HTML page: the answer, interactive figures, every trial with its command."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import plotly.io
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from orpo_ray.formatting import duration, number, status_text
from orpo_ray.reports.chart_style import Panel
from orpo_ray.reports.charts import HEADINGS
from orpo_ray.reports.experiment_file import EXPERIMENT_FILE, as_yaml, read_config
from orpo_ray.reports.page_tables import generations, headline_tiles, read_provenance, trial_table, unfinished_ends
from orpo_ray.reports.report_data import ReportData, model_sizes
from orpo_ray.reports.sections import Texts

PAGE_FILE = "report.html"
_MAX_TIED = 8


def write_page(data: ReportData, panels: Mapping[str, Panel], texts: Texts) -> Path:
    """Write `report.html`: self-contained, so that it can be mailed, archived or attached to an MLflow run.

    `sweep.json`, `provenance.json` and the trials' generations are read from the run directory where they exist.

    Args:
        data: the sweep.
        panels: from `charts.draw_panels`.
        texts: from `Texts.of`.

    Returns:
        Path of the page.
    """
    results, run_dir = data.results, data.run_dir
    config, winners, sizes = read_config(run_dir), results["winners"], model_sizes(data)
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=results["name"],
            last_event=_time_text(data.state.last_ms) if data.state.last_ms else None,
            next_id=count(1).__next__,
            texts=texts,
            tiles=headline_tiles(data, sizes),
            tied=winners["tied"][:_MAX_TIED],
            more_tied=max(0, len(winners["tied"]) - _MAX_TIED),
            best_name=(winners["best"] or {}).get("name"),
            panels=panels,
            headings={name: heading.format(metric=results["metric"]) for name, heading in HEADINGS.items()},
            sizes=sizes,
            table=trial_table(data, config),
            file_known=(run_dir / EXPERIMENT_FILE).exists(),
            ends=unfinished_ends(results),
            generations=generations(data),
            provenance=read_provenance(run_dir),
            config=None if config is None else as_yaml(config),
            css=_asset("report.css"),
            script=_asset("report.js"),
            plotly=Markup(get_plotlyjs()) if any(panel.charts for panel in panels.values()) else "",
        )
    )
    path = run_dir / PAGE_FILE
    path.write_text(page, encoding="utf-8")
    return path


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
        "figure": lambda chart: script_json(plotly.io.to_json(chart.figure, validate=False)),
        "number": number,
        "thousands": lambda value: "–" if value is None else f"{value:,.0f}",
        "duration": duration,
        "status": status_text,
    }
    return environment


@cache
def _markdown() -> MarkdownIt:
    # The texts contain names that users chose: no HTML or links of theirs, and nothing loaded from elsewhere.
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink"])

    def open_table(*_: Any) -> str:
        return '<div class="scroll long" tabindex="0" role="region" aria-label="table"><table>'

    reader.add_render_rule("table_open", open_table)
    reader.add_render_rule("table_close", lambda *_: "</table></div>")
    return reader


def _to_html(text: str) -> Markup:
    """Render Markdown without its leading heading: the page has its own headings."""
    if text.startswith("## "):
        text = text.partition("\n")[2]
    return Markup(_markdown().render(text))


def script_json(text: str) -> Markup:
    """Escape JSON so that it can neither end the script element around it nor open a comment."""
    for char, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(char, code)
    return Markup(text)


def _asset(name: str) -> Markup:
    return Markup(files("orpo_ray.reports").joinpath("templates", name).read_text(encoding="utf-8"))


def _time_text(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
