"""A comparison of two sweeps or runs, as Markdown and as terminal tables."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orpo_ray.formatting import duration, ended_as, markdown_table, number, status_text
from orpo_ray.results.compare import Comparison
from orpo_ray.results.differences import Difference
from orpo_ray.results.sides import Side

_MAX_MATCHED = 20
"""Settings shown of those that both sweeps ran; `Comparison.to_json` has all."""


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown page."""
    parts = [f"# {comparison.a.name} (A) and {comparison.b.name} (B)", f"**{comparison.sentence}**"]
    for title, titles, rows, after in _tables(comparison):
        parts.append((f"## {title}\n\n" if title else "") + markdown_table(titles, rows))
        parts += [after] if after else []
    parts += ["\n".join(f"- {note}" for note in comparison.notes)] if comparison.notes else []
    parts += [f"In MLflow: <{comparison.compare_page}>"] if comparison.compare_page else []
    return "\n\n".join(parts) + "\n"


def comparison_view(comparison: Comparison) -> RenderableType:
    """The comparison as tables for the terminal."""
    parts: list[RenderableType] = [Text(comparison.sentence, style="bold")]
    for title, titles, rows, after in _tables(comparison):
        table = Table(
            title=Text(f"\n{title}" if title else ""), title_justify="left", box=None, pad_edge=False, expand=False
        )
        for place, heading in enumerate(titles):
            figures = title in ("Metrics", "Settings that both ran") and 0 < place < len(titles) - 1
            table.add_column(
                heading,
                justify="right" if figures else "left",
                no_wrap=figures,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(Text(cell) for cell in row), style="green" if row[-1] in ("A", "B") else "")
        parts.append(table)
        parts += [Text(after, style="dim")] if after else []
    if comparison.notes:
        parts.append(Text("\n" + "\n".join(f"- {note}" for note in comparison.notes)))
    return Group(*parts)


def _tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]], str]]:
    """Title, headings, rows and note below of each table that has rows."""
    a, b = comparison.a, comparison.b
    about = [
        ["", a.name, b.name],
        ["compared", *(f"{'best: ' if s.is_sweep else ''}{s.setting}" for s in (a, b))],
        ["runs", *(_runs_of(s) for s in (a, b))],
        ["steps", *(f"{s.steps}, {status_text(s.status)}" for s in (a, b))],
        ["trials", *(f"{s.trials}: {ended_as(s.statuses)}" for s in (a, b))],
        ["device time", *(duration(3600 * s.device_hours) for s in (a, b))],
        ["wall time", *(duration(None if s.wall_hours is None else 3600 * s.wall_hours) for s in (a, b))],
    ]
    tables = [("", ["", "A", "B"], about, "")]
    covers = {d.covers for d in comparison.metrics if d.covers}
    below = f"95 %: intervals of the difference over {' or '.join(sorted(covers))}." if covers else ""
    for difference in comparison.metrics[1:]:
        if difference.mode is not None and difference.no_interval not in (None, comparison.metrics[0].no_interval):
            below += f"\n{difference.metric}: {difference.no_interval}."
    below = below.strip()
    rows = [[_with_mode(d), *_figures(d), d.verdict] for d in comparison.metrics]
    tables.append(("Metrics", ["metric", "A", "B", "B − A", "95 %", "better"], rows, below))
    if comparison.matched:
        rows = [[m.setting, *_figures(m.difference), m.difference.verdict] for m in comparison.matched[:_MAX_MATCHED]]
        rest = len(comparison.matched) - _MAX_MATCHED
        below = f"{comparison.metric}; the intervals hold one at a time, not simultaneously."
        below += f" --json shows {rest} more." if rest > 0 else ""
        tables.append(("Settings that both ran", ["setting", "A", "B", "B − A", "95 %", "better"], rows, below))
    for title, changes in (("Settings that differ", comparison.settings), ("Sweep section", comparison.search)):
        if changes:
            swept = any(change.swept for change in changes)
            rows = [[c.path, c.a or "–", c.b or "–", *([c.swept] if swept else [])] for c in changes]
            tables.append((title, ["setting", "A", "B", *(["swept by"] if swept else [])], rows, ""))
    return tables


def _runs_of(side: Side) -> str:
    ids = ", ".join(side.trial_ids[:5]) + (", ..." if len(side.trial_ids) > 5 else "")
    return f"{len(side.trial_ids)} seeds: {ids}" if len(side.trial_ids) > 1 else ids


def _with_mode(difference: Difference) -> str:
    return difference.metric + {"max": "↑", "min": "↓", None: ""}[difference.mode]


def _figures(d: Difference) -> list[str]:
    interval = "–" if d.low is None or d.high is None else f"[{d.low:+.4f}, {d.high:+.4f}]"
    return [number(d.a), number(d.b), number(d.difference, "+.4f"), interval]
