"""Charts over λ and the learning rate: heat maps, the metric over one of them, and where training diverges."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from orpo_ray.formatting import number, status_text
from orpo_ray.reports.chart_style import (
    ALARM,
    GREY,
    SYMBOLS,
    Chart,
    Panel,
    axis_name,
    for_bundle,
    log_axis,
    lr_text,
    new_figure,
    viridis,
    whiskers,
)
from orpo_ray.results.frames import LAMBDA, LR, SEED, finished_rows, mean_interval, varied_axes
from orpo_ray.storage.events import Status

_MAX_CELLS = 8
"""Values of an axis that get a cell each; more values share cells."""
_MIN_FOR_INTERVAL = 3
"""Two values have a 95 % t-interval nine times as wide as their distance: it says nothing and hides the rest."""
_MAX_TABLE = 80
"""Rows of a figure's table; a longer table is no alternative to the figure."""


def heat_maps(results: dict[str, Any], frame: pd.DataFrame) -> Panel:
    """λ × learning rate, one map per model size: in each cell the metric's mean over the finished trials.

    Args:
        results: from `results.summarize`.
        frame: from `frames.load_runs_frame`.
    """
    metric, mode = results["metric"], results["mode"]
    if missing := _missing_axes(results, LAMBDA, LR):
        return Panel((), missing)
    finished = finished_rows(frame, metric)
    if finished.empty:
        return Panel((), f"No trial has finished with a value of {metric}.")
    lr_of, lrs = binned(frame[LR], log=True)
    lambda_of, lambdas = binned(frame[LAMBDA], log=False)
    low, high = whiskers(finished[metric].to_numpy(), mode)
    charts = []
    best = (max if mode == "max" else min)(
        mean for _, g in finished.groupby([finished["bundle"], lr_of, lambda_of]) if (mean := g[metric].mean()) == mean
    )
    for bundle, group in frame.groupby("bundle", sort=False):
        z, said, empty, rows = [], [], [], []
        for y, lam in enumerate(lambdas):
            z_row, said_row = [], []
            for x, lr in enumerate(lrs):
                cell = group[(lr_of[group.index] == x) & (lambda_of[group.index] == y)]
                done = finished_rows(cell, metric)[metric]
                mean = float(done.mean()) if len(done) else None
                z_row.append(mean)
                said_row.append("" if mean is None else f"{mean:.3f}{'<br>★' if mean == best else ''}")
                why = _cell_text(cell)
                if mean is None:
                    empty.append((lr, lam, why))
                rows.append((lam, lr.replace("<br>", " "), number(mean), str(len(done)), why))
            z.append(z_row)
            said.append(said_row)
        figure = new_figure(height=130 + 46 * len(lambdas))
        figure.add_heatmap(
            x=lrs,
            y=lambdas,
            z=z,
            text=said,
            texttemplate="%{text}",
            zmin=low,
            zmax=high,
            colorscale="Viridis",
            reversescale=mode == "min",
            showscale=False,
            xgap=2,
            ygap=2,
            hoverongaps=False,
            hovertemplate="λ %{y}, lr %{x}<br>" + metric + " %{z:.4f}<extra></extra>",
        )
        figure.add_scatter(
            x=[x for x, _, _ in empty],
            y=[y for _, y, _ in empty],
            text=[_SHORT_ENDS[why] for *_, why in empty],
            hovertext=[why for *_, why in empty],
            hoverinfo="text",
            mode="text",
        )
        figure.update_xaxes(type="category", title_text="learning rate", categoryarray=lrs, showgrid=False)
        figure.update_xaxes(categoryorder="array", tickangle=0, tickfont_size=11)
        figure.update_yaxes(type="category", title_text="λ", categoryarray=lambdas, showgrid=False)
        figure.update_yaxes(categoryorder="array")
        label = f"Mean {metric} by λ and learning rate{for_bundle(bundle)}"
        table = tuple(rows) if len(rows) <= _MAX_TABLE else ()
        charts.append(Chart(figure, label, str(bundle), ("λ", "lr", metric, "finished", "others"), table))
    text = (
        f"Mean {metric} of the trials that finished (over seeds{_and_bins(lrs, lambdas)}); brighter is better, ★ marks "
        "the best cell. Cells without a value: – no trial, × all diverged or failed, … none has finished."
    )
    return Panel(tuple(charts), text)


def metric_by(axis: str, results: dict[str, Any], frame: pd.DataFrame) -> Panel:
    """The metric over one axis, one figure per model size: each trial, and the finished trials' means with intervals.

    Args:
        axis: λ or the learning rate.
        results: from `results.summarize`.
        frame: from `frames.load_runs_frame`.
    """
    metric, varied = results["metric"], varied_axes(results)
    if axis not in varied or metric not in frame or not frame[metric].notna().any():
        return Panel((), f"No trials with a value of {metric} differ in {axis_name(axis)}.")
    charts = []
    for bundle, group in frame[frame[metric].notna()].groupby("bundle", sort=False):
        figure = new_figure(height=360, showlegend=True)
        values = finished_rows(group, metric).groupby(axis)[metric].apply(list)
        intervals = [(*mean_interval(of_one), len(of_one)) for of_one in values]
        figure.add_scatter(
            x=[*values.index],
            y=[mean for mean, *_ in intervals],
            error_y={"array": [half if seeds >= _MIN_FOR_INTERVAL else None for _, half, seeds in intervals]},
            mode="lines",
            line={"width": 1.5, "color": GREY},
            name="mean",
        )
        _add_by_status(figure, group, axis, metric)
        figure.update_xaxes(title_text=axis_name(axis))
        figure.update_yaxes(title_text=metric)
        if axis == LR:
            log_axis(figure.update_xaxes, frame[LR])
        label = f"{metric} of each trial by {axis_name(axis)}{for_bundle(bundle)}"
        charts.append(Chart(figure, label, str(bundle)))
    match [name for name in varied if name != axis]:
        case []:
            return Panel(tuple(charts), f"{metric} against {axis_name(axis)}; one trial at each value.")
        case [name] if name == SEED:
            over = "the seeds that finished"
        case others:
            over = f"the trials that finished, which differ in {', '.join(others)}"
    text = (
        f"{metric} against {axis_name(axis)}. Line and bars: mean and 95 % t-interval over {over}. Means of fewer than "
        f"{_MIN_FOR_INTERVAL} have no bar, which would be wider than the plot."
    )
    return Panel(tuple(charts), text)


def divergence(results: dict[str, Any], frame: pd.DataFrame, boundaries: dict[str, Any]) -> Panel:
    """How trials ended over λ and learning rate, with the fitted boundary.

    Args:
        results: from `results.summarize`.
        frame: from `frames.load_runs_frame`.
        boundaries: from `divergence.divergence_boundaries`.
    """
    ended = frame[frame["status"].isin([Status.FINISHED, Status.STOPPED_EARLY, Status.DIVERGED])]
    if not (ended["status"] == Status.DIVERGED).any():
        return Panel((), f"No trial diverged: {len(ended)} held as far as they went.")
    if missing := _missing_axes(results, LAMBDA, LR):
        return Panel((), missing)
    charts = []
    for bundle, group in ended.groupby("bundle", sort=False):
        figure = new_figure(height=360, showlegend=True)
        _add_by_status(figure, group, LAMBDA, LR)
        rows = boundaries.get(str(bundle), {"rows": []})["rows"]
        fitted = [((r["lambda_low"] + r["lambda_high"]) / 2, r["lr_50"]) for r in rows if r["lr_50"] is not None]
        if fitted:
            line = {"color": ALARM, "dash": "dash"}
            x, y = zip(*fitted, strict=True)
            figure.add_scatter(x=x, y=y, mode="lines", line=line, name="half diverge (fit)", hovertemplate="%{y:.2e}")
        figure.update_xaxes(title_text="λ")
        figure.update_yaxes(title_text="learning rate")
        log_axis(figure.update_yaxes, ended[LR])
        figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"})
        lost = int((group["status"] == Status.DIVERGED).sum())
        label = f"{lost} of {len(group)} trials diverged{for_bundle(bundle)}, by λ and learning rate"
        charts.append(Chart(figure, label, str(bundle)))
    return Panel(tuple(charts), "How trials ended, by λ and learning rate; on the line, half diverge (fit).")


def _add_by_status(figure: go.Figure, trials: pd.DataFrame, x: str, y: str) -> None:
    """Add the trials as points, one trace per status; statuses that do not occur are left out of the legend."""
    for status, symbol in SYMBOLS.items():
        some = trials[trials["status"] == status]
        if some.empty:
            continue
        is_lost = status in (Status.DIVERGED, Status.FAILED)
        figure.add_scatter(
            x=some[x].tolist(),
            y=some[y].tolist(),
            mode="markers",
            marker={"symbol": symbol, "size": 9, "color": ALARM if is_lost else GREY},
            meta=None if is_lost else viridis(0.45),
            cliponaxis=False,
            name=status_text(status),
            hovertemplate=f"{axis_name(x)} %{{x:.3g}}, {axis_name(y)} %{{y:.3g}}",
        )


def _missing_axes(results: dict[str, Any], *names: str) -> str:
    lacking = [name for name in names if name not in varied_axes(results)]
    lacking += [n for n in names if n not in lacking and any(n not in t["params"] for t in results["trials"])]
    return f"{' and '.join(lacking)} did not vary between trials, so there is no map." if lacking else ""


def binned(values: pd.Series, log: bool) -> tuple[pd.Series, list[str]]:
    """Cell number of each value, and the cells' names from low to high: values, or ranges where there are many."""
    unique = np.unique(values.dropna())
    write = lr_text if log else lambda v: f"{v:.3g}"
    if len(unique) <= _MAX_CELLS:
        places = {name: place for place, name in enumerate(dict.fromkeys(map(write, unique)))}
        return values.map({v: places[write(v)] for v in unique}), [*places]  # values with the same name share a cell
    edges = (np.geomspace if log and unique[0] > 0 else np.linspace)(unique[0], unique[-1], _MAX_CELLS - 1)
    cells = pd.Series(np.clip(np.digitize(values, edges[1:-1]), 0, len(edges) - 2), index=values.index)
    return cells, [f"{write(a)}<br>–{write(b)}" for a, b in pairwise(edges)]


def _and_bins(*names: list[str]) -> str:
    return " and over the values within each range" if any("<br>" in n for axis in names for n in axis) else ""


_SHORT_ENDS = {"no trial": "–", "all lost": "×", "none finished": "…", "": ""}


def _cell_text(cell: pd.DataFrame) -> str:
    if cell.empty:
        return "no trial"
    if (cell["status"] == Status.FINISHED).any():
        return ""
    return "all lost" if cell["status"].isin((Status.DIVERGED, Status.FAILED)).all() else "none finished"
