"""Made-up journals of sweeps under way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orpo_ray.config import parse

BEGAN = 1_700_000_000_000
"""Milliseconds since 1970."""


def event(kind: str, trial_id: str, at_s: float, **details: Any) -> dict[str, Any]:
    """As the broker writes it, `at_s` seconds after the sweep began."""
    return {"event": kind, "trial_id": trial_id, **details, "time": BEGAN + int(at_s * 1000)}


def submitted(trial_id: str, at_s: float, lr: float) -> dict[str, Any]:
    return event("submitted", trial_id, at_s, params={"optim.lr": lr}, bundle="", purpose="search")


def started(trial_id: str, at_s: float, group: str, step: int = 0) -> dict[str, Any]:
    facts = {"model/parameters": 1000}
    at = {"attempt": 0, "group": group, "processes": ["host:1"], "devices": 1, "step": step, "max_steps": 16}
    return event("started", trial_id, at_s, **at, facts=facts)


def evaluated(trial_id: str, at_s: float, step: int, nll: float, seconds: float) -> dict[str, Any]:
    found = {"metrics": {"eval/nll": nll}, "checkpoint": f"/step-{step}", "seconds": seconds}
    return event("eval", trial_id, at_s, step=step, **found)


def finished(trial_id: str, at_s: float, status: str, steps: int, nll: float, seconds: float) -> dict[str, Any]:
    end = {"metrics": {"eval/nll": nll}, "checkpoint": f"/step-{steps}", "train_seconds": seconds, "error": None}
    return event("finished", trial_id, at_s, status=status, steps=steps, **end)


UNDER_WAY = [
    submitted("00000", 0, 1e-3),
    submitted("00001", 0, 2e-3),
    submitted("00002", 1, 3e-3),
    started("00000", 2, "group-9-001"),
    started("00001", 2, "group-9-002"),
    evaluated("00000", 6, 4, 3.0, 4.0),
    event("log", "00001", 7, step=3, metrics={"train/loss": 2.0, "perf/pairs_per_second": 12.5}),
    evaluated("00000", 10, 8, 2.5, 8.0),
    evaluated("00001", 11, 4, 2.75, 4.0),
]
"""Of four trials two train, one waits, one is not proposed yet. Each step takes a second."""


def write_journal(run_dir: Path, events: list[dict[str, Any]] | None = None, **sweep: Any) -> Path:
    """A run directory with `UNDER_WAY` or other events; returns it."""
    tree: dict[str, Any] = {
        "name": run_dir.name,
        "output_dir": str(run_dir.parent),
        "model": {"path": "tiny-llama-1m"},
        "data": {"path": "builtin://style-pairs"},
        "train": {"max_steps": 16, "eval_every": 4},
        "sweep": {
            "metric": "eval/nll",
            "space": {"optim.lr": {"type": "grid", "values": [1e-3, 2e-3, 3e-3, 4e-3]}},
            **sweep,
        },
    }
    run_dir.mkdir(parents=True)
    config = parse(tree).model_dump(mode="json")
    (run_dir / "sweep.json").write_text(json.dumps({"sweep_id": "abc", "config": config}), encoding="utf-8")
    append(run_dir, UNDER_WAY if events is None else events)
    return run_dir


def append(run_dir: Path, events: list[dict[str, Any]]) -> None:
    """Write more into the journal."""
    with (run_dir / "events.jsonl").open("a", encoding="utf-8") as journal:
        journal.writelines(json.dumps(entry) + "\n" for entry in events)
