"""Style shared by all charts: colours, axes, labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from orpo_ray.results.frames import LAMBDA, LR


def new_figure(height: int, **layout: Any) -> go.Figure:
    return styled(go.Figure(), height, **layout)


def styled(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    """No colours: the page gives them, as it is light or dark."""
    given = {"margin": {"l": 56, "r": 14, "t": 28, "b": 48}, "showlegend": False, "font": {"size": 12}} | layout
    figure.update_layout(template="none", height=height, hovermode="closest", **given)
    figure.update_xaxes(automargin=True, zeroline=False, title_standoff=8)
    figure.update_yaxes(automargin=True, zeroline=False, title_standoff=8)
    return figure


def viridis(place: float) -> dict[str, str]:
    """Of viridis, from 0 to 1; neither what is lost on a dark page nor on a light one."""
    light, dark = sample_colorscale("Viridis", [0.85 * place, 0.28 + 0.72 * place])
    return {"light": light, "dark": dark}


def hue(lam: float, frame: pd.DataFrame) -> float:
    values = sorted(set(frame[LAMBDA].dropna()))
    return values.index(lam) / max(1, len(values) - 1)


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
    if not parameters:
        return "not known"
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)


def log_axis(update: Any, values: Iterable[float]) -> None:
    """Ticks at 1, 2 and 5 of each decade, written as `1e-3`."""
    positive = [v for v in values if v > 0]
    low, high = math.log10(min(positive)), math.log10(max(positive))
    pad = max(0.08 * (high - low), 0.1)
    ticks = [m * 10.0**e for e in range(math.floor(low - pad), math.ceil(high + pad) + 1) for m in (1, 2, 5)]
    ticks = [t for t in ticks if low - pad <= math.log10(t) <= high + pad]
    update(type="log", range=[low - pad, high + pad], tickvals=ticks, ticktext=[lr_text(t) for t in ticks])
