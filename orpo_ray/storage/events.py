"""Events of a sweep's journal: one type per kind, and the states a trial can be in."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Literal

Purpose = Literal["search", "confirm"]
"""`confirm`: another seed of a finalist, always trained to its end."""


class Status(StrEnum):
    """State of a trial. `results.json`, MLflow and Prometheus show these words."""

    WAITING = "waiting"
    """For a worker group."""
    TRAINING = "training"
    PAUSED = "paused"
    """Between two assignments, with its state in a checkpoint."""
    STOPPING = "stopping"
    """A user has asked for its end; it trains until its next evaluation."""
    INTERRUPTED = "interrupted"
    """Not ended, and no process runs the sweep."""
    PREEMPTED = "preempted"
    """Between two assignments, as its node is about to be taken away."""
    UNFINISHED = "unfinished"
    """Not ended yet, in the results of a sweep that has not ended."""
    FINISHED = "finished"
    STOPPED_EARLY = "stopped_early"
    DIVERGED = "diverged"
    """Its loss or gradient was not finite."""
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
"""Ends of a trial, from the best to the worst."""


def now_ms() -> int:
    """The clock, in milliseconds since 1970, UTC."""
    return int(time.time() * 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a trial."""

    kind: ClassVar[str]
    trial_id: str
    time: int = field(default_factory=now_ms)
    """When it happened, in milliseconds since 1970, UTC."""

    def to_json(self) -> dict[str, Any]:
        """The event as a line of the journal holds it."""
        return {"event": self.kind} | {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted(Event):
    """The searcher has proposed the trial."""

    kind: ClassVar[str] = "submitted"
    params: dict[str, Any]
    """Axis -> value."""
    bundle: str
    """Label of its bundle; "" where the space has none."""
    purpose: Purpose = "search"


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """A worker group trains the trial."""

    kind: ClassVar[str] = "started"
    attempt: int
    """How often it was handed out before."""
    group: str | None
    processes: list[str] = field(default_factory=list)
    """`host:pid` of each rank."""
    devices: int = 1
    """Number of ranks."""
    step: int
    """Optimizer steps done before."""
    max_steps: int
    facts: dict[str, Any] = field(default_factory=dict)
    """What only the worker knows, such as `model/parameters`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged(Event):
    """Training metrics of a step."""

    kind: ClassVar[str] = "log"
    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """Held-out metrics of a step."""

    kind: ClassVar[str] = "eval"
    step: int
    metrics: dict[str, float]
    checkpoint: str | None = None
    """The newest one, where the trial has one."""
    seconds: float = 0.0
    """Training time until this step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused(Event):
    """The trial has given its worker group back."""

    kind: ClassVar[str] = "paused"
    step: int
    checkpoint: str | None = None
    held: bool = False
    """The sweep was interrupted: when it is continued, so is the trial, without being chosen again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted(Event):
    """The trial has left a node that is about to be taken away; this is no failure."""

    kind: ClassVar[str] = "preempted"
    step: int
    checkpoint: str | None
    attempt: int
    """Number of its next attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something went wrong that does not end the trial."""

    kind: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """The trial's processes died, and it is queued again."""

    kind: ClassVar[str] = "retry"
    attempt: int
    """Number of its next attempt."""
    failures: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked(Event):
    """The trial goes on from a copy of another's state, with other settings (population-based training)."""

    kind: ClassVar[str] = "forked"
    donor: str
    """Id of the trial whose state was copied."""
    step: int
    """Optimizer step of that state."""
    params: dict[str, Any]
    """Axis -> value from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The trial has ended."""

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
    """MLflow run whose result was taken over instead of training."""

    @classmethod
    def reused(cls, trial_id: str, step: int, metrics: dict[str, float], run_id: str | None) -> Finished:
        """The end of a trial whose result an earlier MLflow run holds: nothing is trained."""
        end: dict[str, Any] = {"status": Status.FINISHED, "steps": step, "metrics": metrics, "train_seconds": 0.0}
        return cls(trial_id=trial_id, **end, reused_from=run_id)

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))  # a line of the journal holds the word


KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (Submitted, Started, Logged, Evaluated, Paused, Preempted, Warned, Retried, Forked, Finished)
}
"""Name of a kind in the journal -> its type."""


def from_json(entry: Any) -> Event:
    """The event that a line of the journal holds.

    Raises:
        ValueError: it is no event, or its kind has other fields.
    """
    if not isinstance(entry, dict) or not isinstance(kind := entry.get("event"), str):
        raise ValueError("not a JSON object with an `event` key")
    if kind not in KINDS:
        raise ValueError(f"unknown event {kind!r}; known are {', '.join(KINDS)}")
    try:
        return KINDS[kind](**{key: value for key, value in entry.items() if key != "event"})
    except TypeError as error:
        raise ValueError(f"event {kind!r} {str(error).partition('() ')[2]}") from None
