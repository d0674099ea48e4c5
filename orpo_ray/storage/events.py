"""Events of a sweep's journal, one type per kind, and the statuses of a trial."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Literal

Purpose = Literal["search", "confirm"]
"""`search`, or `confirm`: a finalist trained to its end with another seed."""


class Status(StrEnum):
    """Status of a trial; its value appears in `results.json`, MLflow and Prometheus."""

    WAITING = "waiting"
    """Queued until a worker group is free."""
    TRAINING = "training"
    PAUSED = "paused"
    """Without a worker group until the scheduler resumes it; its state is in a checkpoint."""
    STOPPING = "stopping"
    """Stopped by a user; it trains until its next evaluation."""
    INTERRUPTED = "interrupted"
    """Not ended, while no process runs the sweep."""
    PREEMPTED = "preempted"
    """Returned by its worker group because its node is about to be taken away."""
    UNFINISHED = "unfinished"
    """Not ended, in results of a sweep that has not ended."""
    FINISHED = "finished"
    STOPPED_EARLY = "stopped_early"
    DIVERGED = "diverged"
    """Ended because its loss or gradient was not finite."""
    FAILED = "failed"

    @property
    def has_ended(self) -> bool:
        """Whether the trial will never train again."""
        return self.ended_well or self.is_lost

    @property
    def ended_well(self) -> bool:
        """Whether its last evaluation counts."""
        return self in (Status.FINISHED, Status.STOPPED_EARLY)

    @property
    def is_lost(self) -> bool:
        """Whether it ended without a result."""
        return self in (Status.DIVERGED, Status.FAILED)


ENDS = tuple(status for status in Status if status.has_ended)
"""Statuses of an ended trial, from best to worst."""


def now_ms() -> int:
    """Current time in milliseconds since 1970, UTC."""
    return int(time.time() * 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a trial."""

    kind: ClassVar[str]
    trial_id: str
    time: int = field(default_factory=now_ms)
    """Milliseconds since 1970, UTC."""

    def to_json(self) -> dict[str, Any]:
        """The event as the JSON object of a journal line."""
        return {"event": self.kind} | {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted(Event):
    """The trial was queued for the first time."""

    kind: ClassVar[str] = "submitted"
    params: dict[str, Any]
    """Axis -> value."""
    bundle: str
    """Label of its bundle; "" without a bundle axis."""
    purpose: Purpose = "search"


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """A worker group began to train the trial."""

    kind: ClassVar[str] = "started"
    attempt: int
    """Number of earlier attempts."""
    group: str | None
    processes: list[str] = field(default_factory=list)
    """`host:pid` of each rank."""
    devices: int = 1
    """Number of ranks."""
    step: int
    """Optimizer steps done before this start."""
    max_steps: int
    """Optimizer steps of the whole trial."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Values that only the worker knows, such as `model/parameters`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged(Event):
    """Training metrics of a step were reported."""

    kind: ClassVar[str] = "log"
    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """The trial was evaluated on held-out pairs."""

    kind: ClassVar[str] = "eval"
    step: int
    metrics: dict[str, float]
    checkpoint: str | None = None
    """Address of the newest checkpoint, if there is one."""
    seconds: float = 0.0
    """Training time until this step, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused(Event):
    """The trial was paused, and its worker group is free."""

    kind: ClassVar[str] = "paused"
    step: int
    checkpoint: str | None = None
    held: bool = False
    """Paused by an interruption of the sweep: the next run resumes it without a decision of the scheduler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted(Event):
    """The trial left a node that is about to be taken away; this does not count as a failure."""

    kind: ClassVar[str] = "preempted"
    step: int
    checkpoint: str | None
    attempt: int
    """Number of its next attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """A problem occurred that does not end the trial."""

    kind: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """The trial's processes died, and it was queued again."""

    kind: ClassVar[str] = "retry"
    attempt: int
    """Number of its next attempt."""
    failures: int
    """Attempts so far that ended with a crash."""
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked(Event):
    """The trial continues from a copy of another's state, with other settings (population-based training)."""

    kind: ClassVar[str] = "forked"
    donor: str
    """Id of the trial whose state was copied."""
    step: int
    """Optimizer step of the copied state."""
    params: dict[str, Any]
    """Axis -> value from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The trial ended."""

    kind: ClassVar[str] = "finished"
    status: Status
    steps: int
    """Optimizer steps done."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of its last evaluation."""
    checkpoint: str | None = None
    train_seconds: float
    error: str | None = None
    """Why it failed, diverged or was stopped."""
    reused_from: str | None = None
    """MLflow run whose result was used instead of training."""

    @classmethod
    def reused(cls, trial_id: str, step: int, metrics: dict[str, float], run_id: str | None) -> Finished:
        """The end of a trial whose result an earlier MLflow run holds: nothing is trained."""
        end: dict[str, Any] = {"status": Status.FINISHED, "steps": step, "metrics": metrics, "train_seconds": 0.0}
        return cls(trial_id=trial_id, **end, reused_from=run_id)

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))  # a journal line holds a plain string


KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (Submitted, Started, Logged, Evaluated, Paused, Preempted, Warned, Retried, Forked, Finished)
}
"""Name of an event kind in the journal -> its type."""


def from_json(entry: Any) -> Event:
    """Parse an event from the JSON object of a journal line.

    Raises:
        ValueError: it is not an event, or its fields do not match its kind.
    """
    if not isinstance(entry, dict) or not isinstance(kind := entry.get("event"), str):
        raise ValueError("not a JSON object with an `event` key")
    if kind not in KINDS:
        raise ValueError(f"unknown event {kind!r}; known are {', '.join(KINDS)}")
    try:
        return KINDS[kind](**{key: value for key, value in entry.items() if key != "event"})
    except TypeError as error:
        raise ValueError(f"event {kind!r} {str(error).partition('() ')[2]}") from None
