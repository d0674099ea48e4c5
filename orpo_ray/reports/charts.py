"""The figures of a sweep's page (plotly): each with its caption, a text alternative and the numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from orpo_ray.config.space import describe
from orpo_ray.formatting import number
from orpo_ray.reports.chart_style import (
    axis_name,
    for_bundle,
    hue,
    log_axis,
    lr_text,
    new_figure,
    parameter_count,
    rounded,
    shortened,
    styled,
    viridis,
)
from orpo_ray.results.frames import LAMBDA, LR, SEED, finished_rows, setting_key, setting_of, varied_axes
from orpo_ray.results.importance import N_SPLITS, permutation_shares
from orpo_ray.results.winners import Optimum

_MAX_SHOWN = 10
"""Settings whose intervals are drawn."""
_MAX_CELLS = 8
"""Values of an axis that are told apart; more are put into bins."""
_MAX_POINTS, _MAX_POINTS_REST = 120, 24
"""Of a curve: a screen shows no more of it."""
_MAX_TABLE = 40
"""Rows of a figure's table; beyond that it is no alternative to the figure."""
MIN_TRIALS = 10
"""Finished trials below which a forest says nothing of importance."""
_CURVES = {
    "eval/chosen_logp": "log p(chosen)",
    "eval/rejected_logp": "log p(rejected)",
    "eval/log_odds": "log odds ratio",
}
_GREY, _ALARM = "#8a8f98", "#d55e00"
"""Read on white and on black alike; vermilion is told from viridis by the colour-blind too (Okabe and Ito 2008)."""
_SYMBOLS = {"finished": "circle", "stopped_early": "triangle-down-open", "diverged": "x"}


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure."""

    figure: go.Figure
    """Its traces' colours are in `meta` where they differ between light and dark pages (`light`, `dark`), and `rest`
    where a trace is shown on demand only."""
    label: str
    """What it shows, for those who cannot see it."""
    title: str = ""
    """The model size, where there is a figure for each."""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    """The numbers drawn, where they are few."""
    min_width: int = 0
    """Pixels below which it scrolls instead of shrinking."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Figures that belong together, or the reason why there are none."""

    charts: tuple[Chart, ...]
    text: str
    """Caption; without charts, the reason."""
    rest: int = 0
    """Trials that are drawn on demand only."""


def intervals(winners: dict[str, Any]) -> Panel:
    """The best settings with their intervals, those tied with the best in colour.

    Args:
        winners: of `winners.summarize_winners`.
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
            marker={"size": 10, "color": _GREY},
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


def heat_maps(results: dict[str, Any], frame: pd.DataFrame) -> Panel:
    """λ × learning rate, one map per model size: the metric's mean over the trials that finished in each cell.

    Args:
        results: of `results.summarize`.
        frame: of `frames.load_runs_frame`.
    """
    metric, mode = results["metric"], results["mode"]
    if missing := _missing_axes(results, LAMBDA, LR):
        return Panel((), missing)
    finished = finished_rows(frame, metric)
    if finished.empty:
        return Panel((), f"No trial has finished with a value of {metric}.")
    lr_of, lrs = _binned(frame[LR], log=True)
    lambda_of, lambdas = _binned(frame[LAMBDA], log=False)
    low, high = _whiskers(finished[metric].to_numpy(), mode)
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
        table = tuple(rows) if len(rows) <= 2 * _MAX_TABLE else ()
        charts.append(Chart(figure, label, str(bundle), ("λ", "lr", metric, "finished", "others"), table))
    text = (
        f"Mean {metric} of the trials that finished (over seeds{_and_bins(lrs, lambdas)}); brighter is better, ★ is "
        "the best cell. Cells without a value: – no trial, × all diverged or failed, … none has finished."
    )
    return Panel(tuple(charts), text)


def curves(results: dict[str, Any], frame: pd.DataFrame, evaluations: pd.DataFrame) -> Panel:
    """Log-probabilities and log odds over training, as in the paper's figures 3, 7 and 9 (arXiv 2403.07691).

    Drawn are the best trial of each λ, λ = 0 and the best of all among them; the others on demand.

    Args:
        results: of `results.summarize`.
        frame: of `frames.load_runs_frame`.
        evaluations: of `frames.load_evaluations_frame`.
    """
    shown = [column for column in _CURVES if column in evaluations]
    if evaluations.empty or not shown:
        return Panel((), "No evaluation has recorded log-probabilities yet.")
    of_trial = {str(trial_id): group.sort_values("step") for trial_id, group in evaluations.groupby("trial_id")}
    params = {t["trial_id"]: t["params"] for t in results["trials"]}
    ranked = _ranked(results, frame)
    columns = ("trial", "steps", *(_CURVES[c] for c in shown))
    charts, rest = [], 0
    for bundle, group in frame.groupby("bundle", sort=False):
        own = {*group["trial_id"]} & of_trial.keys()
        mine = [trial_id for trial_id in ranked if trial_id in own]
        if not mine:
            continue
        chosen = _one_per_lambda(mine, params, frame)
        others = [trial_id for trial_id in mine if trial_id not in chosen]
        rest += len(others)
        figure = make_subplots(rows=len(shown), cols=1, shared_xaxes=True, vertical_spacing=0.05)
        styled(figure, height=110 + 150 * len(shown) + 19 * len(chosen))
        for row, column in enumerate(shown, start=1):
            x, y = _joined([of_trial[t] for t in others], column)
            if x:
                line = {"width": 0.8, "color": _GREY}
                figure.add_scatter(
                    x=x, y=y, mode="lines", line=line, visible=False, hoverinfo="skip", meta={"rest": True},
                    showlegend=False, row=row, col=1,
                )  # fmt: skip
            for place, trial_id in enumerate(chosen):
                lam = params[trial_id].get(LAMBDA)
                steps, values = _thinned(of_trial[trial_id], column, _MAX_POINTS)
                figure.add_scatter(
                    x=steps,
                    y=values,
                    mode="lines+markers" if len(steps) < 30 else "lines",
                    line={"width": 3 if place == 0 else 1.8, "dash": "dash" if lam == 0 else "solid"},
                    marker={"size": 4},
                    name=_without_bundle(params[trial_id], str(bundle)),
                    legendgroup=trial_id,
                    showlegend=row == 1,
                    meta=viridis(hue(lam, frame) if lam is not None else place / max(1, len(chosen) - 1)),
                    hovertemplate="%{y:.4f} at step %{x}",
                    row=row,
                    col=1,
                )  # fmt: skip
            figure.update_yaxes(title_text=_CURVES[column], row=row, col=1, automargin=True)
        figure.update_xaxes(title_text="step", row=len(shown), col=1)
        legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.14, "yanchor": "top", "font": {"size": 11}}
        figure.update_layout(showlegend=True, legend=legend)
        label = f"Held-out {', '.join(_CURVES[c] for c in shown)} by step{for_bundle(bundle)}"
        rows = []
        for trial_id in chosen:
            first, last = of_trial[trial_id].iloc[0], of_trial[trial_id].iloc[-1]
            ends = [f"{number(first[c])} → {number(last[c])}" for c in shown]
            rows.append((describe(params[trial_id]), f"{int(first['step'])} → {int(last['step'])}", *ends))
        charts.append(Chart(figure, label, str(bundle), columns, tuple(rows)))
    if not charts:
        return Panel((), "No trial has been evaluated yet.")
    text = (
        "Held-out log-probabilities (nats per token) and log odds over training, as in figures 3, 7 and 9 of the "
        "paper: the best trial at each λ, the best of the size in bold, λ = 0 dashed."
    )
    return Panel(tuple(charts), text, rest)


def pareto(front_of: dict[str, Any]) -> Panel:
    """Likelihood against preference accuracy, a point per setting.

    Args:
        front_of: `pareto` of `winners.summarize_winners`.
    """
    settings, cost, gain = front_of["settings"], front_of["cost"], front_of["gain"]
    if len(settings) < 2:
        return Panel((), f"Fewer than two settings finished with both {cost} and {gain}.")
    front = [row for row in settings if row["on_front"]]
    costs, gains = (np.array([row[key] for row in settings]) for key in ("cost", "accuracy"))
    # A setting that went wrong would squeeze those that matter into a corner.
    most = max(_whiskers(costs, "min")[1], *(row["cost"] for row in front))
    least = min(_whiskers(gains, "max")[0], *(row["accuracy"] for row in front))
    shown = [r for r in settings if r["cost"] <= most and r["accuracy"] >= least]
    figure = new_figure(height=420)
    figure.add_scatter(
        x=[r["cost"] for r in shown if not r["on_front"]],
        y=[r["accuracy"] for r in shown if not r["on_front"]],
        hovertext=[r["name"] for r in shown if not r["on_front"]],
        mode="markers",
        marker={"size": 7, "color": _GREY, "opacity": 0.6},
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
    text = "Every setting; a grey one is beaten in both by a numbered one (the table below names them)."
    if any(row["frequency"] is not None for row in front):
        text += " Hollow: on the front in under 95 % of the bootstrap's resamples."
    if left := len(settings) - len(shown):
        text += f" {left} far worse {'setting is' if left == 1 else 'settings are'} outside the picture."
    label = f"{gain} against {cost}, {len(front)} of {len(settings)} settings on the front"
    return Panel((Chart(figure, label),), text)


def parallel(results: dict[str, Any], frame: pd.DataFrame) -> Panel:
    """Parallel coordinates: a line per finished trial through its settings and final metrics.

    Args:
        results: of `results.summarize`.
        frame: of `frames.load_runs_frame`.
    """
    metric = results["metric"]
    finished, axes = _finished_and_axes(results, frame)
    if len(finished) < 2 or not axes:
        return Panel((), "It takes two finished trials that differ in a setting.")
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
    low, high = _whiskers(finished[metric].to_numpy(), results["mode"])
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
        f"A line for each of the {len(finished)} trials that finished; brighter is better in {metric}. Drag along an "
        "axis to keep part of its range, double-click to have all back."
    )
    label = f"Parallel coordinates of {', '.join(str(d['label']) for d in dimensions)}"
    return Panel((Chart(figure, label, min_width=110 * len(dimensions)),), text)


def importance(results: dict[str, Any], frame: pd.DataFrame) -> Panel:
    """Which setting the metric depends on: permutation importance of a random forest (Breiman 2001).

    The forest learns on three quarters of the settings and is judged on the rest, ten times over. A setting's
    importance is how much shuffling it there raises the squared error, in units of the metric's variance.

    Args:
        results: of `results.summarize`.
        frame: of `frames.load_runs_frame`.
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
            (), f"Not enough trials to say: {len(set(groups))} settings finished, it takes at least {MIN_TRIALS}."
        )
    target = finished[metric].to_numpy(dtype=float)
    if not target.std():
        return Panel((), f"All trials have the same {metric}: nothing to explain.")
    explained, shares_SF = permutation_shares(np.stack([*features.values()], axis=1), target, groups)
    if explained <= 0:
        return Panel(
            (),
            f"A random forest cannot tell {metric} of a setting it has not seen from the others' (R² = {explained:.2f} "
            "on held-out settings), so it says nothing about importance.",
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
            "color": _GREY,
        },
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )
    figure.update_xaxes(title_text="rise of the squared error, in variances", rangemode="tozero")
    figure.update_yaxes(automargin=True)
    text = (
        f"Permutation importance of a random forest for {metric} (R² = {explained:.2f} on settings it has not seen): "
        f"median over {N_SPLITS} splits, bars from the 10 % to the 90 % quantile. It counts within the ranges that "
        "were tried."
    )
    quantiles_3F = np.stack([middle_F, low_F, high_F])[:, order]
    rows = [(name, *(f"{q:.3f}" for q in of_one)) for name, of_one in zip(names, quantiles_3F.T, strict=True)]
    return Panel((Chart(figure, text, "", ("setting", "median", "10 %", "90 %"), tuple(rows[::-1])),), text)


def scaling(found: Sequence[Optimum], metric: str) -> Panel:
    """The best learning rate and λ against model size.

    Args:
        found: of `optima`.
        metric: by which the settings were judged.
    """
    if len(found) < 2:
        return Panel((), "One model size finished: nothing to compare it with.")
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
        "Bars span the settings of that size that cannot be told from it."
        if all(o.tied for o in found)
        else "How far ties reach is not known: there are no intervals."
    )
    return Panel(tuple(charts), text)


def divergence(results: dict[str, Any], frame: pd.DataFrame, boundaries: dict[str, Any]) -> Panel:
    """How trials ended over λ and learning rate, with the fitted boundary.

    Args:
        results: of `results.summarize`.
        frame: of `frames.load_runs_frame`.
        boundaries: of `boundary.divergence_boundaries`.
    """
    ended = frame[frame["status"].isin([*_SYMBOLS])]
    if not (ended["status"] == "diverged").any():
        return Panel((), f"No trial diverged: {len(ended)} held as far as they went.")
    if missing := _missing_axes(results, LAMBDA, LR):
        return Panel((), missing)
    charts = []
    for bundle, group in ended.groupby("bundle", sort=False):
        figure = new_figure(height=360, showlegend=True)
        for status, symbol in _SYMBOLS.items():
            some = group[group["status"] == status]
            figure.add_scatter(
                x=some[LAMBDA].tolist(),
                y=some[LR].tolist(),
                mode="markers",
                marker={"symbol": symbol, "size": 9, "color": _ALARM if status == "diverged" else _GREY},
                meta=None if status == "diverged" else viridis(0.45),
                cliponaxis=False,
                name=status.replace("_", " "),
                hovertemplate="λ %{x:g}, lr %{y:.2e}",
            )
        rows = boundaries.get(str(bundle), {"rows": []})["rows"]
        fitted = [((r["lambda_low"] + r["lambda_high"]) / 2, r["lr_50"]) for r in rows if r["lr_50"] is not None]
        if fitted:
            line = {"color": _ALARM, "dash": "dash"}
            x, y = zip(*fitted, strict=True)
            figure.add_scatter(x=x, y=y, mode="lines", line=line, name="half diverge (fit)", hovertemplate="%{y:.2e}")
        figure.update_xaxes(title_text="λ")
        figure.update_yaxes(title_text="learning rate")
        log_axis(figure.update_yaxes, ended[LR])
        figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"})
        lost = int((group["status"] == "diverged").sum())
        label = f"{lost} of {len(group)} trials diverged{for_bundle(bundle)}, by λ and learning rate"
        charts.append(Chart(figure, label, str(bundle)))
    return Panel(tuple(charts), "How trials ended, over λ and learning rate; the line is where half diverge (fit).")


# ---- pieces -------------------------------------------------------------------------------------------------------


def _of_setting(row: dict[str, Any], metric: str) -> str:
    interval = "" if row["low"] is None else f" [{number(row['low'])}, {number(row['high'])}]"
    seeds = f", {row['seeds']} seeds" if row["seeds"] > 1 else ""
    return f"{row['name']}<br>{metric} {number(row['mean'])}{interval}{seeds}"


def _finished_and_axes(results: dict[str, Any], frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Trials that finished, and the axes that vary, without the seed."""
    finished = finished_rows(frame, results["metric"])
    return finished, [name for name in varied_axes(results) if name != SEED and name in finished]


def _missing_axes(results: dict[str, Any], *names: str) -> str:
    lacking = [name for name in names if name not in varied_axes(results)]
    lacking += [n for n in names if n not in lacking and any(n not in t["params"] for t in results["trials"])]
    return f"{' and '.join(lacking)} did not vary between trials, so there is no map." if lacking else ""


def _binned(values: pd.Series, log: bool) -> tuple[pd.Series, list[str]]:
    """The cell of each value, and the cells' names from low to high: values, or ranges where there are many."""
    unique = np.unique(values.dropna())
    write = lr_text if log else lambda v: f"{v:.3g}"
    if len(unique) <= _MAX_CELLS:
        return values.map({v: i for i, v in enumerate(unique)}), [write(v) for v in unique]
    edges = (np.geomspace if log and unique[0] > 0 else np.linspace)(unique[0], unique[-1], _MAX_CELLS - 1)
    cells = pd.Series(np.clip(np.digitize(values, edges[1:-1]), 0, len(edges) - 2), index=values.index)
    return cells, [f"{write(a)}<br>–{write(b)}" for a, b in pairwise(edges)]


def _and_bins(*names: list[str]) -> str:
    return " and over the values within each range" if any("<br>" in n for axis in names for n in axis) else ""


_SHORT_ENDS = {"no trial": "–", "all lost": "×", "none finished": "…", "": ""}


def _cell_text(cell: pd.DataFrame) -> str:
    if cell.empty:
        return "no trial"
    if (cell["status"] == "finished").any():
        return ""
    return "all lost" if cell["status"].isin(("diverged", "failed")).all() else "none finished"


def _whiskers(values: np.ndarray, mode: str) -> tuple[float, float]:
    """Limits of what is drawn: all of the good end, the bad end up to three interquartile ranges off the middle."""
    quarter, three_quarters = np.quantile(values, [0.25, 0.75])
    reach = 3 * (three_quarters - quarter) or math.inf
    low, high = float(values.min()), float(values.max())
    return (max(low, quarter - reach), high) if mode == "max" else (low, min(high, three_quarters + reach))


def _ranked(results: dict[str, Any], frame: pd.DataFrame) -> list[str]:
    """Trial ids, the best first: finished, then those under way or stopped, then the lost."""
    metric = results["metric"]
    values = frame[metric] if metric in frame else pd.Series(math.nan, index=frame.index)
    order = frame.assign(
        place=frame["status"].map({"finished": 0, "diverged": 2, "failed": 2}).fillna(1),
        value=values * (-1 if results["mode"] == "max" else 1),
    )
    ids = [str(trial_id) for trial_id in order.sort_values(["place", "value"], kind="stable")["trial_id"]]
    winner = (results.get("winners", {}).get("best") or {}).get("trial_id")
    return sorted(ids, key=lambda trial_id: trial_id != winner)


def _one_per_lambda(ranked: list[str], params: dict[str, Any], frame: pd.DataFrame) -> list[str]:
    """The best trial at each λ (or range of λ), the best of all first; without λ the best few."""
    if LAMBDA not in frame:
        return ranked[:4]
    cell = dict(zip(frame["trial_id"], _binned(frame[LAMBDA], log=False)[0], strict=True))
    first: dict[Any, str] = {}
    for trial_id in ranked:
        lam = params[trial_id].get(LAMBDA)
        first.setdefault("control" if lam == 0 else cell[trial_id], trial_id)
    return list(first.values())


def _thinned(points: pd.DataFrame, column: str, most: int) -> tuple[list[int], list[float]]:
    """Steps and values, first and last among them."""
    step_N, value_N = points["step"].to_numpy(), points[column].to_numpy()
    known_N = np.flatnonzero(~np.isnan(value_N))
    kept_N = known_N[np.unique(np.linspace(0, len(known_N) - 1, min(most, len(known_N))).astype(int))]
    return step_N[kept_N].tolist(), [rounded(value) for value in value_N[kept_N]]


def _joined(of_trials: Iterable[pd.DataFrame], column: str) -> tuple[list[Any], list[Any]]:
    """All curves as one line with gaps: one trace is drawn faster than hundreds."""
    x: list[Any] = []
    y: list[Any] = []
    for points in of_trials:
        steps, values = _thinned(points, column, _MAX_POINTS_REST)
        x += [*steps, None]
        y += [*values, None]
    return x, y


def _without_bundle(params: dict[str, Any], bundle: str) -> str:
    return describe({name: value for name, value in setting_of(params).items() if value != bundle})


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
