"""Charts over training: held-out log-probabilities and log odds by step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from plotly.subplots import make_subplots

from orpo_ray.config.space import describe
from orpo_ray.formatting import number
from orpo_ray.reports.axis_charts import binned
from orpo_ray.reports.chart_style import GREY, Chart, Panel, for_bundle, hue, rounded, styled, viridis
from orpo_ray.reports.report_data import ReportData, best_trial, ranked
from orpo_ray.results.frames import LAMBDA, setting_of

_MAX_POINTS, _MAX_POINTS_REST = 120, 24
"""Points drawn of a curve, and of one that is shown only on demand; a screen shows no more."""
_CURVES = {
    "eval/chosen_logp": "log p(chosen)",
    "eval/rejected_logp": "log p(rejected)",
    "eval/log_odds": "log odds ratio",
}


def curves(data: ReportData) -> Panel:
    """Log-probabilities and log odds over training, as in the paper's figures 3, 7 and 9 (arXiv 2403.07691).

    Shows the best trial at each λ, including λ = 0 and the best trial of all; the others are drawn on demand.
    """
    results, frame, evaluations = data.results, data.frame, data.evaluations
    shown = [column for column in _CURVES if column in evaluations]
    if evaluations.empty or not shown:
        return Panel((), "No evaluation has recorded log-probabilities yet.")
    of_trial = {str(trial_id): group.sort_values("step") for trial_id, group in evaluations.groupby("trial_id")}
    params = {t["trial_id"]: t["params"] for t in results["trials"]}
    best = (best_trial(results) or {}).get("trial_id")
    ids = sorted((trial["trial_id"] for trial in ranked(results)), key=lambda trial_id: trial_id != best)
    columns = ("trial", "steps", *(_CURVES[c] for c in shown))
    charts, rest = [], 0
    for bundle, group in frame.groupby("bundle", sort=False):
        own = {*group["trial_id"]} & of_trial.keys()
        mine = [trial_id for trial_id in ids if trial_id in own]
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
                line = {"width": 0.8, "color": GREY}
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
        "paper: the best trial at each λ; bold: the best of its size; dashed: λ = 0."
    )
    return Panel(tuple(charts), text, rest)


def _one_per_lambda(ids: list[str], params: dict[str, Any], frame: pd.DataFrame) -> list[str]:
    """Of trial ids, the best first, the first at each λ (or range of λ); without an axis λ, the first four."""
    if LAMBDA not in frame:
        return ids[:4]
    cell = dict(zip(frame["trial_id"], binned(frame[LAMBDA], log=False)[0], strict=True))
    first: dict[Any, str] = {}
    for trial_id in ids:
        lam = params[trial_id].get(LAMBDA)
        first.setdefault("control" if lam == 0 else cell[trial_id], trial_id)
    return list(first.values())


def _thinned(points: pd.DataFrame, column: str, most: int) -> tuple[list[int], list[float]]:
    """At most `most` of the steps with a value, evenly spaced, first and last included; and the values there."""
    step_N, value_N = points["step"].to_numpy(), points[column].to_numpy()
    known_N = np.flatnonzero(~np.isnan(value_N))
    kept_N = known_N[np.unique(np.linspace(0, len(known_N) - 1, min(most, len(known_N))).astype(int))]
    return step_N[kept_N].tolist(), [rounded(value) for value in value_N[kept_N]]


def _joined(of_trials: Iterable[pd.DataFrame], column: str) -> tuple[list[Any], list[Any]]:
    """All curves as one line with gaps: plotly draws one trace faster than hundreds."""
    x: list[Any] = []
    y: list[Any] = []
    for points in of_trials:
        steps, values = _thinned(points, column, _MAX_POINTS_REST)
        x += [*steps, None]
        y += [*values, None]
    return x, y


def _without_bundle(params: dict[str, Any], bundle: str) -> str:
    return describe({name: value for name, value in setting_of(params).items() if value != bundle})
