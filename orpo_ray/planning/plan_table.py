"""Formats for the tables of a plan."""

from __future__ import annotations

from typing import Any

from orpo_ray.planning.memory import GIB

TABLE_STYLE: dict[str, Any] = {"title_justify": "left", "box": None, "padding": (0, 2, 0, 0)}


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def _bytes(count: int) -> str:
    return _gib(count) if count >= GIB else f"{count / 2**20:.0f} MiB"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{max(1, round(60 * hours))} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
