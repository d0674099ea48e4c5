"""PNG files of the report's charts: the same plotly figures, drawn trace by trace with matplotlib.

Plotly's own PNG export needs Chrome. This module draws what the charts use: scatter, bar and heatmap traces on linear,
logarithmic and category axes. Parallel coordinates are interactive and get no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: the caller's matplotlib state must stay as it is
from matplotlib.ticker import NullLocator
from plotly.colors import unlabel_rgb

from orpo_ray.reports.chart_style import Chart, Panel
from orpo_ray.reports.charts import HEADINGS

_PIXELS_PER_INCH = 90  # of plotly's heights
_MARKERS = {"circle": "o", "triangle-down": "v", "x": "X", "cross": "P"}
_DASHES = {None: "-", "solid": "-", "dash": "--", "dot": ":"}
_MAX_LEGEND = 12


def write_pngs(folder: Path, panels: Mapping[str, Panel], metric: str) -> list[tuple[Path, str]]:
    """Write one PNG per panel that has charts.

    Args:
        folder: created where missing.
        panels: from `charts.draw_panels`.
        metric: the sweep's metric, for the headings.

    Returns:
        Files with their captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, panel in panels.items():
        if not panel.charts or any(trace.type == "parcoords" for trace in panel.charts[0].figure.data):
            continue
        figure = draw(panel, HEADINGS[name].format(metric=metric))
        figure.savefig(folder / f"{name}.png", dpi=150)
        written.append((folder / f"{name}.png", panel.text))
    return written


def draw(panel: Panel, heading: str) -> Figure:
    """A figure with one column per chart and one row per y axis."""
    rows = max(len([*chart.figure.select_yaxes()]) for chart in panel.charts)
    height = max(chart.figure.layout.height for chart in panel.charts) / _PIXELS_PER_INCH
    width = 7.5 if len(panel.charts) == 1 else 4.4 * len(panel.charts)
    figure = Figure(figsize=(width, height + 0.4), layout="constrained")
    axes = figure.subplots(rows, len(panel.charts), squeeze=False, sharex="col")
    figure.suptitle(heading, parse_math=False)
    for axes_R, chart in zip(axes.T, panel.charts, strict=True):
        _draw_chart(axes_R, chart)
    return figure


def _draw_chart(axes_R: Iterable[Axes], chart: Chart) -> None:
    shown = [trace for trace in chart.figure.data if trace.visible is not False]
    layout = chart.figure.layout
    handles: dict[str, Any] = {}
    for row, axis in enumerate(axes_R, start=1):
        suffix = "" if row == 1 else str(row)
        own = [trace for trace in shown if (trace.yaxis or "y") == f"y{suffix}"]
        places = [_set_up(axis, way, layout[f"{way}axis{suffix}"], own) for way in "xy"]
        for trace in own:
            x, y = (_numbers(trace[way], known) for way, known in zip("xy", places, strict=True))
            handle = _DRAW[trace.type](axis, trace, x, y)
            if layout.showlegend and trace.name and trace.showlegend is not False:
                handles[trace.name] = handle
        axis.set_title(chart.title if row == 1 else "", fontsize=10, parse_math=False)
    if handles:
        names = [*handles][:_MAX_LEGEND]
        is_wide = not chart.title and max(map(len, names)) <= 24
        legend = axis.legend(
            [handles[name] for name in names],
            names,
            ncols=3 if is_wide else 1,
            loc="upper left",
            bbox_to_anchor=(0, -0.2),
            frameon=False,
            fontsize=8,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def _set_up(axis: Axes, way: str, layout: Any, traces: list[Any]) -> dict[Any, int] | None:
    """Title, scale and ticks of the x or y axis; returns the places of its categories, None for a numeric axis."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    set_ = {key: getattr(axis, f"set_{way}{key}") for key in ("label", "scale", "lim", "ticks")}
    set_["label"](layout.title.text or "", parse_math=False)
    values = [value for trace in traces for value in trace[way] if value is not None]
    if any(isinstance(value, str) for value in values):
        places = {name: place for place, name in enumerate(dict.fromkeys([*(layout.categoryarray or ()), *values]))}
        set_["ticks"]([*places.values()], [name.replace("<br>", "\n") for name in places], fontsize=8, parse_math=False)
        set_["lim"](-0.5, len(places) - 0.5)
        return places
    if layout.type == "log":
        set_["scale"]("log")
    if layout.tickvals is not None:
        set_["ticks"]([*layout.tickvals], [text.replace("<br>", "\n") for text in layout.ticktext], parse_math=False)
        getattr(axis, f"{way}axis").set_minor_locator(NullLocator())
    if layout.range is not None:
        set_["lim"](*(np.power(10.0, layout.range) if layout.type == "log" else layout.range))
    return None


def _numbers(values: Any, places: dict[Any, int] | None) -> list[float]:
    return [np.nan if value is None else value if places is None else places[value] for value in values]


def _colour(trace: Any, given: str | None) -> Any:
    """The trace's colour on a light page."""
    text = (trace.meta or {}).get("light") or given or "#333333"
    return tuple(part / 255 for part in unlabel_rgb(text)) if text.startswith("rgb") else text


def _draw_scatter(axis: Axes, trace: go.Scatter, x: list[float], y: list[float]) -> Any:
    colour = _colour(trace, trace.marker.color or trace.line.color)
    style: dict[str, Any] = {"color": colour, "clip_on": trace.cliponaxis is not False}
    handle = None
    if "lines" in trace.mode:
        step = "steps-post" if trace.line.shape == "hv" else "default"
        width = 0.7 * (trace.line.width or 2)
        (handle,) = axis.plot(x, y, _DASHES[trace.line.dash], drawstyle=step, linewidth=width, **style)
    if "markers" in trace.mode:
        given = trace.marker.symbol or "circle"
        symbols = np.array([given] * len(x) if isinstance(given, str) else given)
        for symbol in np.unique(symbols):
            (marks,) = axis.plot(
                np.array(x)[symbols == symbol],
                np.array(y)[symbols == symbol],
                _MARKERS[symbol.removesuffix("-open")],
                markersize=0.7 * trace.marker.size,
                markerfacecolor="white" if symbol.endswith("-open") else colour,
                zorder=3,
                **style,
            )
            handle = handle or marks
    if "text" in trace.mode:
        beside, centred = {"xytext": (-5, 4), "ha": "right"}, {"xytext": (0, 0), "ha": "center"}
        text_style: dict[str, Any] = {**(beside if trace.textposition == "top left" else centred)}
        text_style |= {"textcoords": "offset points", "fontsize": 9, "va": "center", "parse_math": False}
        for at_x, at_y, text in zip(x, y, trace.text, strict=True):
            axis.annotate(text, (at_x, at_y), **text_style)
    for way in "xy":
        _draw_error(axis, trace, way, x, y, colour)
    return handle


def _draw_error(axis: Axes, trace: Any, way: str, x: list[float], y: list[float], colour: Any) -> None:
    bars = trace[f"error_{way}"]
    if bars.array is None or not len(bars.array):
        return
    below = bars.array if bars.arrayminus is None else bars.arrayminus
    spread: dict[str, Any] = {f"{way}err": np.array([below, bars.array], dtype=float).clip(0)}
    axis.errorbar(x, y, **spread, fmt="none", ecolor=bars.color or colour, elinewidth=bars.thickness or 1.5, capsize=3)


def _draw_bar(axis: Axes, trace: go.Bar, x: list[float], y: list[float]) -> Any:
    bars = axis.barh(y, x, color=_colour(trace, None), height=0.6)
    _draw_error(axis, trace, "x", x, y, None)
    return bars


def _draw_heatmap(axis: Axes, trace: go.Heatmap, x: list[float], y: list[float]) -> Any:
    z = np.array(trace.z, dtype=float)
    colours = "viridis_r" if trace.reversescale else "viridis"
    image = axis.imshow(z, cmap=colours, vmin=trace.zmin, vmax=trace.zmax, aspect="auto", origin="lower")
    axis.grid(False)
    for row, column in zip(*np.nonzero(~np.isnan(z)), strict=True):
        is_light = np.mean(image.cmap(image.norm(z[row, column]))[:3]) > 0.5
        text = trace.text[row][column].replace("<br>", "\n")
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if is_light else "white")
    return image


_DRAW = {"scatter": _draw_scatter, "bar": _draw_bar, "heatmap": _draw_heatmap}
