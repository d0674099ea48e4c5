"""What a sweep's journal knows of each trial, as searchers, schedulers and cost models need it. No Ray, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

ENDED_WELL = ("finished", "stopped_early")
LOST = ("diverged", "failed")


class Exhausted(Exception):
    """A searcher will propose nothing more; the message says why."""


def trial_id_of(index: int) -> str:
    """Id of the search's trial of this number, from 0."""
    return f"{index:05d}"


@dataclass(slots=True)
class TrialHistory:
    """One trial."""

    trial_id: str
    params: dict[str, Any]
    """Axis name -> value; changed by a fork."""
    bundle: str
    purpose: Literal["search", "confirm"] = "search"
    """`confirm`: another seed of a finalist, always trained to its end."""
    max_steps: int | None = None
    """Known once it has started."""
    devices: int = 1
    """Workers that it occupies."""
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    """Optimizer step -> held-out metrics."""
    seconds: dict[int, float] = field(default_factory=dict)
    """Optimizer step -> seconds of training until then, its own: not those of a fork's donor."""
    seconds_taken_over: float = 0.0
    """Seconds in the counter of its checkpoint that another trial had spent; negative where it lost some of its own."""
    status: str | None = None
    """How it ended: finished, stopped_early, diverged or failed; None before that."""
    paused: bool = False
    """Waiting between two assignments, its state on disk."""
    reused_from: str | None = None
    """MLflow run whose result was taken over instead of training the same setting again."""

    @property
    def step(self) -> int:
        """Of its last evaluation; 0 before the first."""
        return max(self.metrics, default=0)

    @property
    def device_seconds(self) -> float:
        """Training time × workers, as far as evaluations and the end have reported it."""
        return 0.0 if self.reused_from else self.devices * max(self.seconds.values(), default=0.0)

    def value(self, metric: str) -> float | None:
        """The metric at the last evaluation that has it finite; None for a trial that diverged or failed."""
        if self.status in LOST:
            return None
        for step in sorted(self.metrics, reverse=True):
            if math.isfinite(value := self.metrics[step].get(metric, math.nan)):
                return value
        return None


class History:
    """All trials of a sweep, in the order of their submission. Feed it the journal's events in order."""

    def __init__(self, events: Iterable[dict[str, Any]] = ()) -> None:
        """Start from `events`, e.g. those of `results.read_events`."""
        self.trials: dict[str, TrialHistory] = {}
        for event in events:
            self.apply(event)

    def apply(self, event: dict[str, Any]) -> None:
        """Take note of one event.

        Raises:
            KeyError: it is of a trial that was never submitted.
        """
        trial_id = event["trial_id"]
        if event["event"] == "submitted":
            self.trials[trial_id] = TrialHistory(
                trial_id, event["params"], event["bundle"], event.get("purpose", "search")
            )
            return
        trial = self.trials[trial_id]
        match event["event"]:
            case "started":
                trial.max_steps, trial.paused = event["max_steps"], False
                trial.devices = event.get("devices", 1)
            case "eval":
                trial.metrics[event["step"]] = event["metrics"]
                trial.seconds[event["step"]] = event.get("seconds", 0.0) - trial.seconds_taken_over
            case "paused":
                trial.paused = not event.get("held", False)  # held: by an interrupted sweep, which goes on with it
            case "forked":
                trial.params = event["params"]
                donor = self.trials[event["donor"]]
                own, theirs = max(trial.seconds.values(), default=0.0), max(donor.seconds.values(), default=0.0)
                trial.seconds_taken_over = theirs + donor.seconds_taken_over - own
                trial.metrics = {step: m for step, m in trial.metrics.items() if step < event["step"]}
                trial.metrics |= {event["step"]: donor.metrics[event["step"]]}
            case "finished":
                trial.status, trial.paused = event["status"], False
                trial.reused_from = event.get("reused_from")
                own = event["train_seconds"] - trial.seconds_taken_over
                trial.seconds[event["steps"]] = max(own, trial.seconds.get(event["steps"], 0.0))

    @property
    def device_hours(self) -> float:
        """Spent by all trials."""
        return sum(trial.device_seconds for trial in self.trials.values()) / 3600.0
