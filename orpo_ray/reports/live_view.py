"""Draw a `LiveSweep` with rich, for a terminal of any size: trials, curves of the best ones, worker groups."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orpo_ray.config.space import describe
from orpo_ray.formatting import clock
from orpo_ray.reports.live_state import LiveSweep
from orpo_ray.storage.events import ENDS, Status
from orpo_ray.storage.sweep_state import TrialState

_CURVES = ("green", "cyan", "magenta", "yellow", "blue")
_QUEUE = (Status.WAITING, Status.TRAINING, Status.STOPPING, Status.PAUSED, Status.INTERRUPTED)
"""Statuses of trials that have not ended, in the order they are shown."""
_STYLES = {Status.TRAINING: "", Status.STOPPING: "yellow", Status.FAILED: "red", Status.DIVERGED: "red"}


def plot(curves: list[list[tuple[int, float]]], width: int, height: int) -> list[Text]:
    """Plot curves in braille dots (2 × 4 per character), each with its number, from 1, at its end.

    Args:
        curves: points (step, value) of each; at most as many curves as there are colours.
        width: in characters, including labels of the values.
        height: in lines, including the line of steps.
    """
    points = [point for curve in curves for point in curve]
    if not points or height < 3 or width < 24:
        return []
    (left, right), (low, high) = (
        (f(p[0] for p in points) for f in (min, max)),
        [f(p[1] for p in points) for f in (min, max)],
    )
    labels = [f"{value:9.4f} " for value in (high, low)]
    margin = max(map(len, labels))
    columns, rows = width - margin, height - 1
    dots: dict[tuple[int, int], int] = {}
    owner: dict[tuple[int, int], int] = {}

    def at(step: float, value: float) -> tuple[int, int]:
        x = (step - left) / (right - left or 1) * (2 * columns - 1)
        y = (high - value) / (high - low or 1) * (4 * rows - 1)
        return round(x), round(y)

    for number, curve in enumerate(curves):
        corners = [at(*point) for point in curve]
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] or corners, strict=False):
            length = max(abs(x1 - x0), abs(y1 - y0), 1)
            for i in range(length + 1):
                x, y = round(x0 + (x1 - x0) * i / length), round(y0 + (y1 - y0) * i / length)
                cell = x // 2, y // 4
                dots[cell] = dots.get(cell, 0) | (0x01, 0x08, 0x02, 0x10, 0x04, 0x20, 0x40, 0x80)[y % 4 * 2 + x % 2]
                owner.setdefault(cell, number)  # the better trial is in front
    marks: dict[tuple[int, int], int] = {}
    for number, curve in enumerate(curves):
        if curve:
            x, y = at(*curve[-1])
            marks.setdefault((x // 2, y // 4), number)
    lines = []
    for row in range(rows):
        line = Text((labels[0] if row == 0 else labels[1] if row == rows - 1 else "").rjust(margin), style="dim")
        for column in range(columns):
            cell = column, row
            if cell in marks:
                line.append(str(marks[cell] + 1), style=f"not dim bold {_CURVES[marks[cell]]}")
            elif cell in dots:
                line.append(chr(0x2800 + dots[cell]), style=f"not dim {_CURVES[owner[cell]]}")
            else:
                line.append(" ")
        lines.append(line)
    ends = f"step {left}", str(right)
    lines.append(Text(" " * margin + ends[0] + ends[1].rjust(columns - len(ends[0])), style="dim"))
    return lines


def sparkline(values: list[float], width: int = 8) -> str:
    """The last `width` values as bars, scaled from their minimum to their maximum."""
    shown = values[-width:]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[round((value - low) / (high - low or 1.0) * 7)] for value in shown)


def frame(live: LiveSweep, width: int, height: int | None, selected: str | None, footer: Text | None) -> RenderableType:
    """Draw the whole view.

    Args:
        live: the sweep.
        width: in characters.
        height: lines to fill exactly; None: as many as all trials need.
        selected: id of the trial to show details of.
        footer: the last line.
    """
    ranked, trials = live.ranked(), live.sweep.trials
    leading = [t.trial_id for t in ranked if live.curve(t)][: len(_CURVES)]
    if selected is not None and selected not in leading and live.curve(trials[selected]):
        leading = [*leading[: len(_CURVES) - 1], selected]
    head = _head(live, width)
    tail: list[RenderableType] = [_line(text, width) for text in _group_lines(live, most=3 if height else None)]
    tail += [_line(_details(live, selected), width)] if selected is not None else []
    tail += [_line(Text(f"MLflow  {live.about.mlflow}", style="dim"), width)]
    tail += [_line(footer, width)] if footer is not None else []
    body = None if height is None else max(height - len(head) - len(tail), 5)
    beside = width >= 120
    if body is None:
        curves_height, table_height = 10, None
    elif beside:
        curves_height, table_height = body, body
    else:
        curves_height = min(max(body // 2, 4), 12) if body >= 9 else 0
        table_height = body - curves_height
    curves_width = width * 2 // 5 if beside else width
    curves = plot([live.curve(trials[t]) for t in leading], curves_width, curves_height)
    table_width = width - curves_width - 2 if beside else width
    room = None if table_height is None else table_height - 1
    table = _table(live, _window(ranked, selected, room), leading, selected, table_width)
    if beside:
        both = Table.grid(padding=(0, 2, 0, 0))
        both.add_column(width=table_width)
        both.add_column(width=curves_width)
        both.add_row(table, Group(*curves))
        middle: list[RenderableType] = [both]
        used = max(min(len(ranked), room or len(ranked)) + 1, len(curves))
    else:
        middle = [table, *curves]
        used = min(len(ranked), room or len(ranked)) + 1 + len(curves)
    blank = [Text("")] * max(body - used, 0) if body is not None else []
    return Group(*head, *middle, *blank, *tail)


def _line(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    text.no_wrap = True
    return text


def _head(live: LiveSweep, width: int) -> list[RenderableType]:
    about, counts = live.about, live.counts()
    colour = {"running": "bold green", "ended": "bold", "interrupted": "bold yellow"}[live.state]
    best = next((value for t in live.ranked() if (value := t.value(about.metric)) is not None), None)
    title = Text.assemble((about.name, "bold"), "  ", (live.state, colour), f"  {about.metric}")
    title.append("" if best is None else f" best {best:.4f}").append(f" ({about.mode})", style="dim")
    left, spent = live.left(), f"{live.sweep.device_hours:.2g}"
    if about.budget_hours is not None:
        spent += f" of {about.budget_hours:g}"
    times = Text(f" {live.sweep.num_ended}/{about.num_trials} trials", style="bold")
    times.append(f"  {clock(live.seconds)}, {spent} device-h", style="not bold")
    if left is not None:
        on_clock = "" if left.seconds is None else f"{clock(left.seconds)}, "
        times.append(f"; left ≤ {on_clock}{left.device_hours:.2g} device-h", style="not bold dim")
    bar = Table.grid()
    size = 20 if width >= 100 else 8
    bar.add_row(
        ProgressBar(total=max(about.num_trials, 1), completed=live.sweep.num_ended, width=size),
        _line(times, width - size),
    )
    queue = Text("  ".join(f"{s} {counts[s]}" for s in _QUEUE if counts[s]), style="dim")
    ends = ", ".join(f"{counts[s]} {s.replace('_', ' ')}" for s in ENDS if counts[s])
    queue.append(f"{'  ' if queue else ''}ended {live.sweep.num_ended}{': ' if ends else ''}{ends}")
    return [_line(title, width), bar, _line(queue if counts else Text("no trial yet", style="dim"), width)]


def _window(ranked: list[TrialState], selected: str | None, room: int | None) -> list[TrialState]:
    """As many trials as fit, including the selected one."""
    if room is None or len(ranked) <= room:
        return ranked
    place = next((i for i, trial in enumerate(ranked) if trial.trial_id == selected), 0)
    first = min(max(place - room + 1, 0), len(ranked) - room)
    return ranked[first : first + room]


def _table(
    live: LiveSweep, trials: list[TrialState], leading: list[str], selected: str | None, width: int
) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", width=width, pad_edge=False)
    table.add_column("", width=1)
    table.add_column("trial", no_wrap=True, overflow="ellipsis", ratio=1)
    for title, size in (("status", 13), ("step", 11), (live.about.metric.removeprefix("eval/")[:12], 12)):
        table.add_column(title, width=size, no_wrap=True, justify="left" if title == "status" else "right")
    table.add_column("trend", width=8, no_wrap=True)
    for trial in trials:
        trial_id, status = trial.trial_id, live.status(trial)
        value = trial.value(live.about.metric)
        number = leading.index(trial_id) if trial_id in leading else None
        style = _STYLES.get(status, "dim")
        confirms = "confirm " if trial.purpose == "confirm" else ""
        table.add_row(
            "" if number is None else Text(str(number + 1), style=f"not dim bold {_CURVES[number]}"),
            Text(confirms + describe(trial.params)),
            status.replace("_", " "),
            f"{trial.step}/{trial.max_steps}" if trial.max_steps else "",
            "" if value is None else f"{value:.4f}",
            sparkline([v for _, v in live.curve(trial)]),
            style=f"{style} reverse" if trial_id == selected else style,
        )
    return table


def _group_lines(live: LiveSweep, most: int | None) -> list[Text]:
    groups = live.groups()
    lines = []
    for name, trial_id, processes in groups[:most]:
        trial = live.sweep.trials[trial_id]
        pairs_per_second = trial.logged.get("perf/pairs_per_second")
        speed = "" if pairs_per_second is None else f"  {pairs_per_second:.3g} pairs/s"
        place = processes[0] if len(processes) == 1 else f"{processes[0]} +{len(processes) - 1}" if processes else ""
        lines.append(Text(f"group {name.rpartition('-')[2]}  {place}{speed}  {describe(trial.params)}", style="dim"))
    if most is not None and len(groups) > most:
        lines[-1:] = [Text(f"and {len(groups) - most + 1} more groups", style="dim")]
    return lines


def _details(live: LiveSweep, trial_id: str) -> Text:
    trial = live.sweep.trials[trial_id]
    text = Text.assemble((f"trial {trial_id}", "bold"), f"  {describe(trial.params)}")
    text.append(f"  {live.status(trial).replace('_', ' ')} at step {trial.step}, {trial.device_seconds:.0f} device-s")
    return text.append(f": {trial.error.splitlines()[0]}" if trial.error else "")
