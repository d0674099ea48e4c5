"""Pictures of a sweep: the metric by learning rate and by λ, what is best for whom, where training diverges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: the caller's matplotlib state stays as it is
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from orpo_ray.results.frames import LAMBDA, LR, SEED, mean_interval, varied_axes

_NO_HUE = math.nan  # one object: NaN is found in a dict by identity
_MAX_LEGEND = 8
_MAX_FRONT = 15
"""Settings on the front that the legend names."""
_MIN_FOR_INTERVAL = 3
"""Over two values the 95 % t-interval is nine times as wide as they are apart: it says nothing and hides the rest."""
_CURVES = {
    "eval/chosen_logp": "log p(chosen)\nnats per token",
    "eval/rejected_logp": "log p(rejected)\nnats per token",
    "eval/log_odds": "log odds ratio\nchosen : rejected",
}
"""Metrics drawn over steps -> label of their panel."""
_MARKERS: dict[str, tuple[str, bool]] = {
    "finished": ("o", True),
    "unfinished": ("o", False),
    "stopped_early": ("v", False),
    "diverged": ("x", True),
    "failed": ("+", True),
}
"""Status of a trial -> marker, and whether it is filled."""


def write_plots(
    folder: Path, results: dict[str, Any], frame: pd.DataFrame, curves: pd.DataFrame
) -> list[tuple[Path, str]]:
    """Draw those pictures for which the sweep has axes.

    Args:
        folder: of the PNG files; made where it is missing.
        results: as `results.summarize` gives them, with `winners`.
        frame: of `frames.load_runs_frame`.
        curves: of `frames.load_evaluations_frame`.

    Returns:
        Files with their captions.
    """
    varied, metric = varied_axes(results), results["metric"]
    has_metric = metric in frame and bool(frame[metric].notna().any())
    drawn: list[tuple[str, Figure, str]] = []
    if LR in varied and has_metric:
        drawn.append(("metric_by_lr.png", *_metric_by_lr(frame, metric, varied)))
    if LAMBDA in varied and has_metric:
        drawn.append(("metric_by_lambda.png", *_metric_by_lambda(frame, metric, varied)))
    winners = results["winners"]
    if len(winners["pareto"]["settings"]) > 1:
        drawn.append(("pareto.png", *_pareto(winners["pareto"])))
    if {LR, LAMBDA} <= {*varied} and any(b["diverged"] and b["held"] for b in winners["divergence"].values()):
        drawn.append(("divergence.png", *_divergence(frame, winners["divergence"])))
    if any(column in curves for column in _CURVES):
        drawn.append(("curves.png", *_curves_figure(frame, curves, varied)))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure, caption in drawn:
        figure.savefig(folder / name, dpi=150)
        paths.append((folder / name, caption))
    return paths


def _panels(rows: int, frame: pd.DataFrame, height: float) -> tuple[Figure, np.ndarray, list[str]]:
    """An empty figure with a column of panels per bundle: (figure, axes [rows, bundles], bundles)."""
    bundles = list(dict.fromkeys(frame["bundle"]))
    figure = Figure(figsize=(2.0 + 3.4 * len(bundles), 0.6 + height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(bundles), sharex=True, sharey="row", squeeze=False)
    for axis in axes.flat:
        _bare(axis)
    for axis, bundle in zip(axes[0], bundles, strict=True):
        axis.set_title(bundle, fontsize=10)
    return figure, axes, bundles


def _bare(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)


def _colours(frame: pd.DataFrame, hue: str | None) -> dict[float, Any]:
    """Value of the axis `hue` -> colour, from dark to light; NaN -> one colour where there is no such axis.

    Viridis: the colour-blind and black-and-white printers keep its order.
    """
    values = [value for value, _ in _by_hue(frame, hue)]
    return dict(zip(values, colormaps["viridis"](np.linspace(0.0, 0.88, len(values))), strict=True))


def _by_hue(frame: pd.DataFrame, hue: str | None) -> list[tuple[float, pd.DataFrame]]:
    if hue is None:
        return [(_NO_HUE, frame)]
    return [(float(str(value)), group) for value, group in frame.groupby(hue)]


def _metric_by_lr(frame: pd.DataFrame, metric: str, varied: list[str]) -> tuple[Figure, str]:
    figure, axes, bundles = _panels(1, frame, height=3.2)
    hue = LAMBDA if LAMBDA in varied else None
    colours = _colours(frame, hue)
    for axis, bundle in zip(axes[0], bundles, strict=True):
        for lam, group in _by_hue(frame[frame["bundle"] == bundle], hue):
            finished = group[group["status"] == "finished"].groupby(LR)[metric].mean()
            axis.plot(finished.index, finished, color=colours[lam], linewidth=1.2, alpha=0.7)
            _scatter(axis, group, LR, metric, colours[lam])
        _log_ticks(axis, frame[LR], ".0e")
        axis.set_xlabel("learning rate")
    axes[0, 0].set_ylabel(metric)
    _legend(figure, colours, "λ", frame)
    return figure, f"{metric} against learning rate{_over_seeds(varied)}. Marks at the foot have no value."


def _metric_by_lambda(frame: pd.DataFrame, metric: str, varied: list[str]) -> tuple[Figure, str]:
    figure, axes, bundles = _panels(1, frame, height=3.2)
    colours = _colours(frame, LAMBDA)
    lambdas, shown = sorted(colours), frame[metric].tolist()
    for axis, bundle in zip(axes[0], bundles, strict=True):
        of_bundle = frame[frame["bundle"] == bundle]
        for lam, group in _by_hue(of_bundle, LAMBDA):
            _scatter(axis, group, LAMBDA, metric, colours[lam])
        finished = of_bundle[(of_bundle["status"] == "finished") & of_bundle[metric].notna()]
        means = [(lam, *mean_interval(g[metric].tolist())) for lam, g in _by_hue(finished, LAMBDA)]
        if len(lambdas) <= _MAX_LEGEND:  # drawn from a range, each is tried once: nothing to average
            at, middle = [lam for lam, _, _ in means], [mean for _, mean, _ in means]
            axis.plot(at, middle, color="0.25", linewidth=1.2, zorder=1.5)
        for (lam, mean, half), (_, group) in zip(means, _by_hue(finished, LAMBDA), strict=True):
            if half is not None and len(group) >= _MIN_FOR_INTERVAL:
                axis.errorbar([lam], [mean], [half], color="0.25", linewidth=1.2, capsize=4, zorder=1.5)
                shown += [mean - half, mean + half]
        if lambdas[0] > 0 and lambdas[-1] / lambdas[0] >= 30:
            _log_ticks(axis, frame[LAMBDA], "g")
        axis.set_xlabel("λ (loss.orpo_lambda)")
    axes[0, 0].set_ylabel(metric)
    _limits_by_points(axes[0, 0], pd.Series(shown))
    _legend(figure, colours, "λ", frame)
    match [name for name in varied if name != LAMBDA]:
        case []:
            return figure, f"{metric} against λ; one trial at each λ."
        case [name] if name == SEED:
            over = "the seeds that finished"
        case others:
            over = f"the trials that finished, which differ in {', '.join(others)}"
    return figure, (
        f"{metric} against λ. Line and bars: mean and 95 % t-interval over {over}; no bar for fewer than "
        f"{_MIN_FOR_INTERVAL}, over two it would be wider than the plot."
    )


def _pareto(pareto: dict[str, Any]) -> tuple[Figure, str]:
    """Every setting as a point, those on the front numbered and named beside the panel."""
    settings = pareto["settings"]
    front = [row for row in settings if row["on_front"]]
    cost, gain = (np.array([row[key] for row in settings]) for key in ("cost", "accuracy"))
    longest = max(len(row["name"]) for row in front)
    figure = Figure(figsize=(6.2 + 0.075 * longest, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    _bare(axis)
    # A setting that went wrong would squeeze those that matter into a corner.
    low, high = _whiskers(cost, always=[row["cost"] for row in front])
    bottom, top = _whiskers(gain, always=[row["accuracy"] for row in front])
    shown = (cost >= low) & (cost <= high) & (gain >= bottom) & (gain <= top)
    axis.plot(cost[shown], gain[shown], "o", color="0.75", markersize=5)
    colour = colormaps["viridis"](0.3)
    axis.step(
        [row["cost"] for row in front], [row["accuracy"] for row in front], where="post", color=colour, linewidth=1.2
    )
    handles = []
    for place, row in enumerate(front, start=1):
        face = "white" if row["uncertain"] else colour
        at = (row["cost"], row["accuracy"])
        axis.plot(*at, "o", color=colour, markerfacecolor=face, markersize=7, zorder=3)
        # Above and to the left of the front there is nothing.
        axis.annotate(str(place), at, (-5, 4), textcoords="offset points", ha="right", fontsize=9)
        often = "" if row["frequency"] is None else f" ({row['frequency']:.0%})"
        handles.append(
            Line2D(
                [],
                [],
                color=colour,
                marker="o",
                markerfacecolor=face,
                linestyle="",
                label=f"{place}  {row['name']}{often}",
            )
        )
    axis.margins(0.08)
    axis.set_xlabel(f"{pareto['cost']} (lower is better)")
    axis.set_ylabel(f"{pareto['gain']} (higher is better)")
    figure.legend(handles=handles[:_MAX_FRONT], loc="outside right upper", frameon=False, fontsize=9)
    caption = f"{pareto['gain']} against {pareto['cost']}: grey settings are beaten in both by a numbered one."
    if any(row["frequency"] is not None for row in front):
        caption += " In brackets: share of the bootstrap's resamples in which it is on the front; hollow: under 95 %."
    if left := int((~shown).sum()):
        caption += f" {left} far worse {'setting is' if left == 1 else 'settings are'} outside the picture."
    return figure, caption


def _whiskers(values: np.ndarray, always: list[float]) -> tuple[float, float]:
    """Limits three interquartile ranges off the middle half, and never inside `always`."""
    quarter, three_quarters = np.quantile(values, [0.25, 0.75])
    reach = 3 * (three_quarters - quarter) or math.inf
    return min(quarter - reach, *always), max(three_quarters + reach, *always)


def _divergence(frame: pd.DataFrame, divergence: dict[str, Any]) -> tuple[Figure, str]:
    """How trials ended over λ and learning rate, and the fitted boundary."""
    figure, axes, bundles = _panels(1, frame, height=3.2)
    ended = frame[frame["status"].isin(("finished", "stopped_early", "diverged"))]
    colours = {"finished": "0.45", "stopped_early": "0.45", "diverged": "tab:red"}
    is_fitted = False
    for axis, bundle in zip(axes[0], bundles, strict=True):
        of_bundle = ended[ended["bundle"] == bundle]
        for status, colour in colours.items():
            marker, is_filled = _MARKERS[status]
            some = of_bundle[of_bundle["status"] == status]
            face = colour if is_filled else "none"
            axis.plot(some[LAMBDA], some[LR], marker, color=colour, markerfacecolor=face, markersize=6)
        rows = divergence.get(bundle, {"rows": []})["rows"]
        fitted = [((r["lambda_low"] + r["lambda_high"]) / 2, r["lr_50"]) for r in rows if r["lr_50"] is not None]
        if fitted:
            is_fitted = True
            axis.plot(*zip(*fitted, strict=True), color="tab:red", linewidth=1.2, marker="_", markersize=12)
        axis.set_xlabel("λ (loss.orpo_lambda)")
    _log_ticks(axes[0, 0], ended[LR], ".0e", which="y")
    axes[0, 0].set_ylabel("learning rate")
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            marker=_MARKERS[status][0],
            markerfacecolor=colour if _MARKERS[status][1] else "none",
            linestyle="",
            label=status.replace("_", " "),
        )
        for status, colour in colours.items()
        if (ended["status"] == status).any()
    ]
    if is_fitted:
        handles.append(Line2D([], [], color="tab:red", linewidth=1.2, label="half diverge (fit)"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    caption = "How trials ended, over λ and learning rate."
    if is_fitted:
        caption += " The line is where a logistic curve gives divergence a chance of 50 %."
    return figure, caption


def _curves_figure(frame: pd.DataFrame, curves: pd.DataFrame, varied: list[str]) -> tuple[Figure, str]:
    shown = [column for column in _CURVES if column in curves]
    figure, axes, bundles = _panels(len(shown), frame, height=2.2)
    hue = LAMBDA if LAMBDA in varied else LR if LR in varied else None
    colours = _colours(frame, hue)
    drawn: dict[str, list[float]] = {column: [] for column in shown}
    for row, column in zip(axes, shown, strict=True):
        for axis, bundle in zip(row, bundles, strict=True):
            for value, group in _by_hue(frame[frame["bundle"] == bundle], hue):
                finished = group[group["status"] == "finished"]
                trials = finished if len(finished) else group[group["status"].isin(("stopped_early", "unfinished"))]
                of_trials = curves[curves["trial_id"].isin(trials["trial_id"])]
                # Up to the step that all of them reached: a mean whose trials change is no curve.
                by_step = of_trials.pivot(index="step", columns="trial_id", values=column).dropna()
                if by_step.empty:
                    continue
                drawn[column] += _draw_mean(axis, by_step, colours[value], "-" if len(finished) else "--")
        row[0].set_ylabel(_CURVES[column])
    logps = [logp for column in shown if column.endswith("_logp") for logp in drawn[column]]
    for row, column in zip(axes, shown, strict=True):
        # One scale for chosen and rejected, so that the eye can compare them.
        _limits_by_points(row[0], pd.Series(logps if column.endswith("_logp") else drawn[column], dtype=float))
    for axis in axes[-1]:
        axis.set_xlabel("step")
    _legend(figure, colours, "λ" if hue == LAMBDA else "lr", frame[:0])
    caption = "Held-out log-probabilities and log odds over training (compare the paper's figures 3, 7 and 9)"
    if len(frame) == 1:
        return figure, f"{caption}."
    over = "seeds" if SEED in varied and set(varied) <= {hue, SEED} else "trials that finished"
    return figure, (
        f"{caption}: mean over the {over}, with its 95 % t-interval from {_MIN_FOR_INTERVAL} on and each one where "
        "there are two; dashed where none finished."
    )


def _draw_mean(axis: Axes, by_step: pd.DataFrame, colour: Any, style: str) -> list[float]:
    """The mean over trials (columns) by step (rows), and how far they spread; returns the values drawn as lines."""
    mean = by_step.mean(axis=1)
    axis.plot(mean.index, mean, style, marker="o", markersize=2.5, color=colour, linewidth=1.5)
    if by_step.shape[1] >= _MIN_FOR_INTERVAL:
        half = np.array([mean_interval(values)[1] for values in by_step.to_numpy().tolist()], dtype=float)
        axis.fill_between(mean.index, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        return mean.tolist()
    if by_step.shape[1] == 2:
        axis.plot(by_step.index, by_step, style, color=colour, linewidth=0.6, alpha=0.6)
    return by_step.to_numpy().ravel().tolist()


def _scatter(axis: Axes, group: pd.DataFrame, x: str, metric: str, colour: Any) -> None:
    for status, (marker, is_filled) in _MARKERS.items():
        some = group[group["status"] == status]
        face = colour if is_filled else "none"
        valued, bare = some[some[metric].notna()], some[some[metric].isna()]
        axis.plot(valued[x], valued[metric], marker, color=colour, markerfacecolor=face, markersize=6)
        if len(bare):  # at the foot of the panel: x in data, y in panel heights
            foot = [0.03] * len(bare)
            axis.plot(bare[x], foot, marker, color=colour, markersize=6, transform=axis.get_xaxis_transform())


def _log_ticks(axis: Axes, values: pd.Series, spec: str, which: Literal["x", "y"] = "x") -> None:
    """A log axis with a readable number of labels, however narrow the range."""
    decades = math.log10(values.max() / values.min())
    axis.set(**{f"{which}scale": "log"})
    ticks = axis.xaxis if which == "x" else axis.yaxis
    ticks.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if decades < 1 else (1, 3) if decades < 2.5 else (1,)))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{spec}}"))
    ticks.set_minor_formatter(NullFormatter())


def _limits_by_points(axis: Axes, values: pd.Series) -> None:
    """Bands over few trials can be wider than all the data: they may leave the panel."""
    if values.dropna().empty:
        return
    low, high = float(values.min()), float(values.max())
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 0.05
    axis.set_ylim(low - margin, high + margin)


def _legend(figure: Figure, colours: dict[float, Any], symbol: str, frame: pd.DataFrame) -> None:
    """Colours and, for the trials in `frame`, markers, beside the panels."""
    values = [value for value in colours if not math.isnan(value)]
    shown = [values[round(i)] for i in np.linspace(0, len(values) - 1, min(_MAX_LEGEND, len(values)))]
    handles = [Line2D([], [], color=colours[v], linewidth=2.5, label=f"{symbol} = {v:.3g}") for v in shown]
    for status, (marker, is_filled) in _MARKERS.items():
        if (frame["status"] == status).any():
            face = "0.35" if is_filled else "none"
            label = status.replace("_", " ")
            handles.append(Line2D([], [], color="0.35", marker=marker, markerfacecolor=face, linestyle="", label=label))
    if handles:
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)


def _over_seeds(varied: list[str]) -> str:
    return "; lines join the means over seeds" if SEED in varied else ""
