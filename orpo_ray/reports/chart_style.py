"""What all charts of a report share: Chart and Panel, colours, symbols, axes and labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from orpo_ray.formatting import short_count
from orpo_ray.results.frames import LAMBDA, LR
from orpo_ray.storage.events import Status

GREY, ALARM = "#8a8f98", "#d55e00"
"""Readable on white and on black; colour-blind readers can tell vermilion from viridis (Okabe and Ito 2008)."""
SYMBOLS = {
    Status.FINISHED: "circle",
    Status.UNFINISHED: "circle-open",
    Status.STOPPED_EARLY: "triangle-down-open",
    Status.DIVERGED: "x",
    Status.FAILED: "cross",
}
"""Status of a trial -> marker."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure."""

    figure: go.Figure
    """A trace whose colour differs between light and dark pages has both in `meta` (`light`, `dark`). A trace that is
    shown only on demand has `rest` in its `meta`."""
    label: str
    """Text alternative for readers who cannot see the figure."""
    title: str = ""
    """The model size, where each size has its own figure."""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    """The plotted numbers as a table, where they are few."""
    min_width: int = 0
    """Width in pixels below which the figure scrolls instead of shrinking."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Figures that belong together, or the reason why there are none."""

    charts: tuple[Chart, ...]
    text: str
    """Caption; without charts, the reason."""
    rest: int = 0
    """Number of trials that are drawn only on demand."""


def new_figure(height: int, **layout: Any) -> go.Figure:
    return styled(go.Figure(), height, **layout)


def styled(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    """Set the shared layout; text and grid colours are left to the page, which may be light or dark."""
    given = {"margin": {"l": 56, "r": 14, "t": 28, "b": 48}, "showlegend": False, "font": {"size": 12}} | layout
    figure.update_layout(template="none", height=height, hovermode="closest", **given)
    figure.update_xaxes(automargin=True, zeroline=False, title_standoff=8)
    figure.update_yaxes(automargin=True, zeroline=False, title_standoff=8)
    return figure


def viridis(place: float) -> dict[str, str]:
    """Viridis colours at a place from 0 to 1, without the end that would be invisible on a light or dark page."""
    light, dark = sample_colorscale("Viridis", [0.85 * place, 0.28 + 0.72 * place])
    return {"light": light, "dark": dark}


def hue(lam: float, frame: pd.DataFrame) -> float:
    """Rank of a λ among those of the sweep, from 0 to 1."""
    values = sorted(set(frame[LAMBDA].dropna()))
    return values.index(lam) / max(1, len(values) - 1)


def whiskers(values: np.ndarray, mode: str) -> tuple[float, float]:
    """Plot limits: the whole good end; the bad end up to three interquartile ranges off the middle half."""
    quarter, three_quarters = np.quantile(values, [0.25, 0.75])
    reach = 3 * (three_quarters - quarter) or math.inf
    low, high = float(values.min()), float(values.max())
    return (max(low, quarter - reach), high) if mode == "max" else (low, min(high, three_quarters + reach))


def for_bundle(bundle: Any) -> str:
    return f" for {bundle}" if bundle else ""


def shortened(name: str) -> str:
    return name if len(name) <= 36 else name[:35] + "…"


def lr_text(value: float) -> str:
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def axis_name(name: str) -> str:
    return {LAMBDA: "λ", LR: "learning rate"}.get(name, name)


def parameter_count(parameters: int | None) -> str:
    return short_count(parameters, (" B", " M", " k")) if parameters else "not known"


def log_axis(update: Any, values: Iterable[float]) -> None:
    """Make an axis logarithmic, with ticks at 1, 2 and 5 of each decade, written as `1e-3`.

    Args:
        update: the figure's `update_xaxes` or `update_yaxes`.
        values: data on the axis; values that are not positive are ignored.
    """
    positive = [v for v in values if v > 0]
    low, high = math.log10(min(positive)), math.log10(max(positive))
    pad = max(0.08 * (high - low), 0.1)
    ticks = [m * 10.0**e for e in range(math.floor(low - pad), math.ceil(high + pad) + 1) for m in (1, 2, 5)]
    ticks = [t for t in ticks if low - pad <= math.log10(t) <= high + pad]
    update(type="log", range=[low - pad, high + pad], tickvals=ticks, ticktext=[lr_text(t) for t in ticks])
