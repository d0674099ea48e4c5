"""ORPO preference tuning: sweeps on Ray Tune, Ray Train and DeepSpeed ZeRO, logged to MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_ray.results.runs import load_runs

__all__ = ["load_runs"]


def __getattr__(name: str) -> Any:
    # Imported at first use, so that importing the package, as the command line does, needs no pandas and MLflow.
    if name == "load_runs":
        from orpo_ray.results.runs import load_runs

        return load_runs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
