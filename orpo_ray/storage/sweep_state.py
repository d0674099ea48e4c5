"""State of a sweep and of its trials, computed by applying the journal's events in order. No Ray, no torch.

The broker, searchers, schedulers, cost models, results and all views read this state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_ray.storage.events import (
    Evaluated,
    Event,
    Finished,
    Forked,
    Logged,
    Paused,
    Preempted,
    Purpose,
    Retried,
    Started,
    Status,
    Submitted,
)
from orpo_ray.storage.journal import read_events
from orpo_ray.storage.run_dir import EVENTS_FILE


@dataclass(slots=True)
class TrialState:
    """State of one trial."""

    trial_id: str
    params: dict[str, Any]
    """Axis -> value; changed by a fork."""
    bundle: str
    purpose: Purpose = "search"
    status: Status = Status.WAITING
    attempt: int = 0
    """Number of earlier attempts. Reports of an earlier attempt are ignored."""
    failures: int = 0
    """Attempts that ended with a crash."""
    starts: list[Started] = field(default_factory=list)
    """Starts of training, in order; starts before and after a pause share an attempt."""
    max_steps: int | None = None
    """Optimizer steps of the whole trial; known once it has started."""
    devices: int = 1
    """Number of its workers."""
    group: str = ""
    """Worker group that trains it, or trained it last."""
    processes: list[str] = field(default_factory=list)
    """`host:pid` of each rank of that group."""
    step: int = 0
    """Optimizer step of its last report; it decreases if training resumes from an earlier checkpoint."""
    furthest_step: int = 0
    """Largest optimizer step reached."""
    logged_step: int = 0
    """Step of its last training metrics."""
    logged: dict[str, float] = field(default_factory=dict)
    """Its last training metrics."""
    tokens_per_second: list[float] = field(default_factory=list)
    """All measurements, in order."""
    peak_memory_gib: float | None = None
    """Largest peak of its rank 0."""
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    """Optimizer step -> held-out metrics."""
    seconds: dict[int, float] = field(default_factory=dict)
    """Optimizer step -> training time of this trial until then, in seconds, without that of a fork's donor."""
    donor_seconds: float = 0.0
    """Seconds in its checkpoint's counter that donors spent, minus its own seconds lost in forks; may be negative."""
    checkpoint: str | None = None
    """Address of the newest checkpoint."""
    error: str | None = None
    """Error of its last failed attempt or of its end."""
    forks: list[Forked] = field(default_factory=list)
    end: Finished | None = None
    submitted_ms: int | None = None
    """Milliseconds since 1970, UTC."""

    @property
    def evaluated_step(self) -> int:
        """Optimizer step of its last evaluation; 0 before the first."""
        return max(self.metrics, default=0)

    @property
    def last_metrics(self) -> dict[str, float]:
        """Held-out metrics of its last evaluation; empty before the first."""
        return self.metrics.get(self.evaluated_step, {})

    @property
    def clock_seconds(self) -> float:
        """Training time that its checkpoint counts, in seconds, including that of a fork's donor."""
        return max(self.seconds.values(), default=0.0) + self.donor_seconds

    @property
    def facts(self) -> dict[str, Any]:
        """Values that only its worker knows, such as `model/parameters`; as in MLflow, those of the first start win."""
        found: dict[str, Any] = {}
        for start in reversed(self.starts):
            found |= start.facts
        return found

    @property
    def paused(self) -> bool:
        """Whether it waits for the scheduler to resume it."""
        return self.status is Status.PAUSED

    @property
    def reused_from(self) -> str | None:
        """MLflow run whose result was used instead of training the same setting again."""
        return self.end.reused_from if self.end else None

    @property
    def device_seconds(self) -> float:
        """Training time × workers in seconds, as far as evaluations and the end have reported it."""
        return 0.0 if self.reused_from else self.devices * max(self.seconds.values(), default=0.0)

    def value(self, metric: str) -> float | None:
        """The metric at the last evaluation with a finite value; None for a trial that diverged or failed."""
        if self.status.is_lost:
            return None
        for step in sorted(self.metrics, reverse=True):
            if math.isfinite(value := self.metrics[step].get(metric, math.nan)):
                return value
        return None

    def apply(self, event: Event) -> None:
        """Apply one event of this trial, except its submission and forks, which `SweepState` applies."""
        match event:
            case Started():
                self.status, self.max_steps, self.devices = Status.TRAINING, event.max_steps, event.devices
                self.group, self.processes = event.group or "", event.processes
                self.starts.append(event)
                self._reach(event.step)
            case Logged():
                self.logged_step, self.logged = event.step, event.metrics
                if (speed := event.metrics.get("perf/tokens_per_second")) is not None:
                    self.tokens_per_second.append(speed)
                if (peak := event.metrics.get("perf/peak_memory_gib")) is not None:
                    self.peak_memory_gib = max(peak, self.peak_memory_gib or 0.0)
                self._reach(event.step)
            case Evaluated():
                self.metrics[event.step] = event.metrics
                self.seconds[event.step] = event.seconds - self.donor_seconds
                self.checkpoint = event.checkpoint or self.checkpoint
                self._reach(event.step)
            case Paused():
                self.status = Status.WAITING if event.held else Status.PAUSED
                self.checkpoint = event.checkpoint or self.checkpoint
            case Preempted():
                self.status, self.attempt, self.checkpoint = Status.WAITING, event.attempt, event.checkpoint
            case Retried():
                self.status, self.attempt, self.failures = Status.WAITING, event.attempt, event.failures
                self.error = event.error
            case Finished():
                self.status, self.error, self.end = event.status, event.error, event
                self.step = self.furthest_step = event.steps
                self.checkpoint = event.checkpoint
                own = event.train_seconds - self.donor_seconds
                self.seconds[event.steps] = max(own, self.seconds.get(event.steps, 0.0))

    def fork(self, event: Forked, donor: TrialState) -> None:
        """Continue from the donor's state; the broker copies the donor's checkpoint."""
        own, theirs = max(self.seconds.values(), default=0.0), max(donor.seconds.values(), default=0.0)
        self.params, self.checkpoint = event.params, None
        self.donor_seconds = theirs + donor.donor_seconds - own
        self.metrics = {step: m for step, m in self.metrics.items() if step < event.step}
        self.metrics[event.step] = donor.metrics[event.step]
        self.step = self.furthest_step = self.logged_step = event.step
        self.forks.append(event)

    def _reach(self, step: int) -> None:
        self.step, self.furthest_step = step, max(self.furthest_step, step)


class SweepState:
    """State of a sweep. Apply the journal's events in order."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        """Apply `events`, e.g. those of `journal.read_events`."""
        self.trials: dict[str, TrialState] = {}
        """Trial id -> trial, in the order of submission."""
        self.began_ms: int | None = None
        """Time of the first event, in milliseconds since 1970."""
        self.last_ms = 0
        """Time of the last event."""
        self._run: str | None = None
        """Run of the sweep that the last start belonged to."""
        self.evaluations: list[Evaluated] = []
        """Evaluations of all trials in order, including those replaced by a fork."""
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> TrialState:
        """Apply one event. Returns its trial.

        Raises:
            ValueError: the trial was never submitted.
        """
        self.began_ms, self.last_ms = self.began_ms or event.time, event.time
        if isinstance(event, Submitted):
            if event.trial_id not in self.trials:
                self.trials[event.trial_id] = TrialState(
                    event.trial_id, event.params, event.bundle, event.purpose, submitted_ms=event.time
                )
            return self.trials[event.trial_id]
        if event.trial_id not in self.trials:
            raise ValueError(f"event {event.kind!r} of trial {event.trial_id} comes before its submission")
        trial = self.trials[event.trial_id]
        if isinstance(event, Forked):
            trial.fork(event, self.trials[event.donor])
            return trial
        if isinstance(event, Evaluated):
            self.evaluations.append(event)
        elif isinstance(event, Started):
            self._end_other_runs(event.group or "")
        trial.apply(event)
        return trial

    def restart(self) -> None:
        """Mark trials in training as waiting, because the process that ran the sweep is gone."""
        for trial in self.trials.values():
            if trial.status is Status.TRAINING:
                trial.status = Status.WAITING

    def _end_other_runs(self, group: str) -> None:
        # A group's name contains the start time of its run of the sweep: trials of earlier runs no longer train.
        run = group.rpartition("-")[0]
        if run != self._run:
            self._run = run
            self.restart()

    @property
    def num_ended(self) -> int:
        """Number of trials that have ended."""
        return sum(trial.status.has_ended for trial in self.trials.values())

    @property
    def parameters(self) -> dict[str, int]:
        """Bundle label -> number of model parameters, as far as workers have reported it."""
        known = ((t.bundle, t.facts.get("model/parameters")) for t in self.trials.values())
        return {bundle: count for bundle, count in known if count is not None}

    @property
    def device_hours(self) -> float:
        """Training time × workers of all trials, in hours."""
        return sum(trial.device_seconds for trial in self.trials.values()) / 3600.0


def read_state(run_dir: str | Path) -> SweepState:
    """State of the sweep in a run directory; without trials if there is no journal yet.

    Raises:
        JournalError: the journal is damaged.
    """
    return SweepState(read_events(Path(run_dir) / EVENTS_FILE))
