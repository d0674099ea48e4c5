"""Events of a journal, made from what a test cares about."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from orpo_ray.storage.events import Event, from_json
from orpo_ray.storage.sweep_state import SweepState

_DEFAULTS: dict[str, dict[str, Any]] = {
    "submitted": {"bundle": ""},
    "started": {"attempt": 0, "group": None, "step": 0, "max_steps": 100},
    "paused": {"step": 0},
    "retry": {"failures": 1, "error": "died"},
    "finished": {"train_seconds": 0.0},
}


def as_event(entry: dict[str, Any]) -> Event:
    """The typed event of a journal line from which fields may be left out."""
    return from_json(_DEFAULTS.get(entry["event"], {}) | entry)


def as_state(entries: Iterable[dict[str, Any]]) -> SweepState:
    """The sweep that such lines tell of."""
    return SweepState(as_event(entry) for entry in entries)
