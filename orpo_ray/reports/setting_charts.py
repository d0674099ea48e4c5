"""Charts that compare settings: intervals, the Pareto front, parallel coordinates, importance and model sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from orpo_ray.formatting import number
from orpo_ray.reports.chart_style import (
    GREY,
    Chart,
    Panel,
    axis_name,
    log_axis,
    lr_text,
    new_figure,
    parameter_count,
    rounded,
    shortened,
    viridis,
    whiskers,
)
from orpo_ray.results.frames import LAMBDA, LR, SEED, finished_rows, setting_key, varied_axes
from orpo_ray.results.importance import N_SPLITS, permutation_shares
from orpo_ray.results.winners import Optimum

_MAX_SHOWN = 10
"""Settings whose intervals are drawn."""
MIN_TRIALS = 10
"""Finished settings below which the forest is not asked about importance."""


def intervals(winners: dict[str, Any]) -> Panel:
    """The best settings with their intervals, those tied with the best in colour.

    Args:
        winners: from `winners.summarize_winners`.
    """
    rows = winners["settings"][:_MAX_SHOWN]
    if len(rows) < 2:
        return Panel((), "Fewer than two settings finished: there is nothing to compare.")
    known, figure = winners["no_intervals"] is None, new_figure(height=90 + 30 * len(rows))
    for tied in (True, False):
        some = [row for row in rows if bool(row["tied"] or row is rows[0]) == tied]
        spread = {
            "type": "data",
            "symmetric": False,
            "array": [row["high"] - row["mean"] for row in some] if known else [],
            "arrayminus": [row["mean"] - row["low"] for row in some] if known else [],
            "thickness": 2.5,
            "width": 0,
        }
        figure.add_scatter(
            x=[row["mean"] for row in some],
            y=[shortened(row["name"]) for row in some],
            error_x=spread if known else None,
            mode="markers",
            marker={"size": 10, "color": GREY},
            meta=viridis(0.45) if tied else None,
            hovertext=[_of_setting(row, winners["metric"]) for row in some],
            hoverinfo="text",
        )
    names = [shortened(row["name"]) for row in rows]
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], automargin=True)
    figure.update_xaxes(title_text=winners["metric"], nticks=5)
    better = "higher" if winners["mode"] == "max" else "lower"
    text = f"The best {len(rows)} of {len(winners['settings'])} settings ({better} is better)"
    text += " with 95 % intervals; coloured: tied with the best." if known else "; no intervals."
    table = [(row["name"], number(row["mean"]), number(row["low"]), number(row["high"])) for row in rows]
    return Panel((Chart(figure, text, "", ("setting", winners["metric"], "from", "to"), tuple(table)),), text)


def pareto(front_of: dict[str, Any]) -> Panel:
    """Likelihood against preference accuracy, a point per setting.

    Args:
        front_of: `pareto` in the summary from `winners.summarize_winners`.
    """
    settings, cost, gain = front_of["settings"], front_of["cost"], front_of["gain"]
    if len(settings) < 2:
        return Panel((), f"Fewer than two settings finished with both {cost} and {gain}.")
    front = [row for row in settings if row["on_front"]]
    costs, gains = (np.array([row[key] for row in settings]) for key in ("cost", "accuracy"))
    # One setting that went wrong would squeeze those that matter into a corner.
    most = max(whiskers(costs, "min")[1], *(row["cost"] for row in front))
    least = min(whiskers(gains, "max")[0], *(row["accuracy"] for row in front))
    shown = [r for r in settings if r["cost"] <= most and r["accuracy"] >= least]
    figure = new_figure(height=420)
    figure.add_scatter(
        x=[r["cost"] for r in shown if not r["on_front"]],
        y=[r["accuracy"] for r in shown if not r["on_front"]],
        hovertext=[r["name"] for r in shown if not r["on_front"]],
        mode="markers",
        marker={"size": 7, "color": GREY, "opacity": 0.6},
        hovertemplate=f"%{{hovertext}}<br>{cost} %{{x:.4f}}<br>{gain} %{{y:.4f}}<extra></extra>",
    )
    figure.add_scatter(
        x=[r["cost"] for r in front],
        y=[r["accuracy"] for r in front],
        hovertext=[r["name"] for r in front],
        text=[str(place) for place in range(1, len(front) + 1)],
        textposition="top left",
        mode="lines+markers+text",
        line={"shape": "hv", "width": 1.5},
        marker={"size": 10, "symbol": ["circle-open" if r["uncertain"] else "circle" for r in front]},
        meta=viridis(0.45),
        cliponaxis=False,
        hovertemplate=f"%{{text}}. %{{hovertext}}<br>{cost} %{{x:.4f}}<br>{gain} %{{y:.4f}}<extra></extra>",
    )
    figure.update_xaxes(title_text=f"{cost} (lower is better)")
    figure.update_yaxes(title_text=f"{gain} (higher is better)")
    text = "Every setting. Each grey one is beaten in both metrics by a numbered one, named in the table."
    if any(row["frequency"] is not None for row in front):
        text += " Hollow: on the front in under 95 % of the bootstrap's resamples."
    if left := len(settings) - len(shown):
        text += f" {left} far worse {'setting is' if left == 1 else 'settings are'} outside the picture."
    label = f"{gain} against {cost}, {len(front)} of {len(settings)} settings on the front"
    return Panel((Chart(figure, label),), text)


def parallel(results: dict[str, Any], frame: pd.DataFrame) -> Panel:
    """Parallel coordinates: a line per finished trial through its settings and final metrics.

    Args:
        results: from `results.summarize`.
        frame: from `frames.load_runs_frame`.
    """
    metric = results["metric"]
    finished, axes = _finished_and_axes(results, frame)
    if len(finished) < 2 or not axes:
        return Panel((), "This figure needs two finished trials that differ in a setting.")
    metrics = list(dict.fromkeys([metric, "eval/nll", "eval/preference_accuracy", "eval/log_odds"]))
    dimensions = []
    if finished["bundle"].nunique() > 1:
        dimensions.append(_categories("size", finished["bundle"]))
    for name in axes:
        values, label = finished[name], {LAMBDA: "λ", LR: "lr"}.get(name, name.rsplit(".", 1)[-1])
        if not pd.api.types.is_numeric_dtype(values) or values.dtype == bool:
            dimensions.append(_categories(label, values.astype(str)))
        elif name == LR and (values > 0).all():
            ticks = np.geomspace(values.min(), values.max(), 5) if values.nunique() > 5 else np.unique(values)
            dimensions.append(
                {
                    "label": label,
                    "values": np.log10(values).tolist(),
                    "tickvals": np.log10(ticks).tolist(),
                    "ticktext": [lr_text(tick) for tick in ticks],
                }
            )
        else:
            dimensions.append({"label": label, "values": values.tolist()})
    dimensions += [
        {"label": name.removeprefix("eval/"), "values": [rounded(v) for v in finished[name]]}
        for name in metrics
        if name in finished and finished[name].notna().all()
    ]
    low, high = whiskers(finished[metric].to_numpy(), results["mode"])
    figure = new_figure(height=420, margin={"l": 48, "r": 40, "t": 64, "b": 24})
    figure.add_parcoords(
        dimensions=dimensions,
        line={
            "color": finished[metric].tolist(),
            "cmin": low,
            "cmax": high,
            "colorscale": "Viridis",
            "reversescale": results["mode"] == "min",
        },
    )
    text = (
        f"One line for each of the {len(finished)} trials that finished; brighter is better in {metric}. Drag along an "
        "axis to keep part of its range; double-click to show everything again."
    )
    label = f"Parallel coordinates of {', '.join(str(d['label']) for d in dimensions)}"
    return Panel((Chart(figure, label, min_width=110 * len(dimensions)),), text)


def importance(results: dict[str, Any], frame: pd.DataFrame) -> Panel:
    """Which axis the metric depends on: permutation importance of a random forest (Breiman 2001).

    The forest learns on three quarters of the settings and is judged on the rest, ten times over. The importance of an
    axis is how much shuffling its values there raises the squared error, in units of the metric's variance.

    Args:
        results: from `results.summarize`.
        frame: from `frames.load_runs_frame`.
    """
    metric = results["metric"]
    finished, axes = _finished_and_axes(results, frame)
    features = {axis_name(name): _numbers(finished[name], log=name == LR) for name in axes}
    if finished["bundle"].nunique() > 1:
        features = {"model size": _numbers(finished["bundle"], log=False)} | features
    params = {t["trial_id"]: t["params"] for t in results["trials"]}
    groups = [setting_key(params[trial_id]) for trial_id in finished["trial_id"]]
    features = {name: values for name, values in features.items() if len(set(values)) > 1}
    if not features:
        return Panel((), "Only one setting finished: nothing was varied.")
    if len(set(groups)) < MIN_TRIALS:
        return Panel(
            (), f"Not enough trials to say: {len(set(groups))} settings finished; at least {MIN_TRIALS} are needed."
        )
    target = finished[metric].to_numpy(dtype=float)
    if not target.std():
        return Panel((), f"All trials have the same {metric}: nothing to explain.")
    explained, shares_SF = permutation_shares(np.stack([*features.values()], axis=1), target, groups)
    if explained <= 0:
        return Panel(
            (),
            f"A random forest cannot predict {metric} of settings it has not seen (R² = {explained:.2f} on held-out "
            "settings), so it says nothing about importance.",
        )
    low_F, middle_F, high_F = np.quantile(shares_SF, [0.1, 0.5, 0.9], axis=0)
    order = np.argsort(middle_F)
    names = [[*features][index] for index in order]
    figure = new_figure(height=90 + 38 * len(names))
    figure.add_bar(
        y=names,
        x=middle_F[order].tolist(),
        orientation="h",
        meta=viridis(0.45),
        error_x={
            "type": "data",
            "symmetric": False,
            "array": (high_F - middle_F)[order].tolist(),
            "arrayminus": (middle_F - low_F)[order].tolist(),
            "color": GREY,
        },
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )
    figure.update_xaxes(title_text="rise of the squared error, in variances of the metric", rangemode="tozero")
    figure.update_yaxes(automargin=True)
    text = (
        f"Permutation importance of a random forest for {metric} (R² = {explained:.2f} on settings it has not seen): "
        f"median over {N_SPLITS} splits; bars from the 10 % to the 90 % quantile. It holds only within the ranges that "
        "were tried."
    )
    quantiles_3F = np.stack([middle_F, low_F, high_F])[:, order]
    rows = [(name, *(f"{q:.3f}" for q in of_one)) for name, of_one in zip(names, quantiles_3F.T, strict=True)]
    return Panel((Chart(figure, text, "", ("setting", "median", "10 %", "90 %"), tuple(rows[::-1])),), text)


def scaling(found: Sequence[Optimum], metric: str) -> Panel:
    """The best learning rate and λ against model size.

    Args:
        found: from `winners.optima`.
        metric: the metric that the settings were judged by.
    """
    if len(found) < 2:
        return Panel((), "Fewer than two model sizes finished: there is nothing to compare.")
    known = all(optimum.parameters for optimum in found)
    x = [optimum.parameters if known else optimum.bundle for optimum in found]
    charts = []
    for name, title in ((LR, "learning rate"), (LAMBDA, "λ")):
        if any(name not in optimum.at for optimum in found):
            continue
        at = [optimum.at[name] for optimum in found]
        ranges = [optimum.tied[name] if optimum.tied else (v, v) for optimum, v in zip(found, at, strict=True)]
        figure = new_figure(height=320)
        figure.add_scatter(
            x=x,
            y=at,
            text=[optimum.bundle for optimum in found],
            mode="lines+markers",
            line={"width": 1.2, "dash": "dot"},
            marker={"size": 11},
            meta=viridis(0.45),
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [high - v for (_, high), v in zip(ranges, at, strict=True)],
                "arrayminus": [v - low for (low, _), v in zip(ranges, at, strict=True)],
                "thickness": 2,
                "width": 6,
            },
            hovertemplate="%{text}: %{y:.3g}<extra></extra>",
        )
        if known:
            ticks = {"tickvals": x, "ticktext": [f"{o.bundle}<br>{parameter_count(o.parameters)}" for o in found]}
            figure.update_xaxes(type="log", title_text="parameters", **ticks)
        figure.update_yaxes(title_text=f"best {title}", exponentformat="power")
        if name == LR:
            log_axis(figure.update_yaxes, [v for pair in ranges for v in pair])
        rows = tuple(
            (o.bundle, parameter_count(o.parameters), f"{v:.3g}", f"{low:.3g} to {high:.3g}" if o.tied else "not known")
            for o, v, (low, high) in zip(found, at, ranges, strict=True)
        )
        label = f"Best {title} of each model size"
        charts.append(Chart(figure, label, title, ("size", "parameters", f"best {title}", "tied"), rows))
    if not charts:
        return Panel((), "Neither the learning rate nor λ is an axis of this sweep.")
    text = f"The setting with the best {metric} of each model size. " + (
        "Bars span the settings of that size that are tied with it."
        if all(o.tied for o in found)
        else "The range of tied settings is not known: there are no intervals."
    )
    return Panel(tuple(charts), text)


def _of_setting(row: dict[str, Any], metric: str) -> str:
    interval = "" if row["low"] is None else f" [{number(row['low'])}, {number(row['high'])}]"
    seeds = f", {row['seeds']} seeds" if row["seeds"] > 1 else ""
    return f"{row['name']}<br>{metric} {number(row['mean'])}{interval}{seeds}"


def _finished_and_axes(results: dict[str, Any], frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Trials that finished, and the axes that vary except the seed."""
    finished = finished_rows(frame, results["metric"])
    return finished, [name for name in varied_axes(results) if name != SEED and name in finished]


def _categories(label: str, values: pd.Series) -> dict[str, Any]:
    names = list(dict.fromkeys(values))
    places = list(range(len(names)))
    codes = [names.index(value) for value in values]
    return {"label": label, "values": codes, "tickvals": places, "ticktext": [str(name) for name in names]}


def _numbers(values: pd.Series, log: bool) -> list[float]:
    if not pd.api.types.is_numeric_dtype(values):
        names = list(dict.fromkeys(map(str, values)))
        return [float(names.index(str(value))) for value in values]
    return [math.log10(v) if log and v > 0 else float(v) for v in values.fillna(values.median())]
