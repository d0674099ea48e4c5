"""What the broker keeps of trials and worker groups besides the journal. No Ray."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.storage.events import Status
from orpo_ray.storage.sweep_state import TrialState


@dataclass(frozen=True, slots=True)
class Assignment:
    """A trial for a worker group."""

    trial_id: str
    attempt: int
    """How often it has been handed out before. Reports of an earlier attempt are ignored."""
    config: Any
    """The trial's ExperimentConfig."""


@dataclass(frozen=True, slots=True)
class Load:
    """Queues and worker groups, for the group manager."""

    queued: dict[str, int]
    """resource class -> trials waiting."""
    busy: dict[str, str]
    """group -> trial."""
    assigned: dict[str, int]
    """group -> trials it has been given so far."""
    idle_seconds: dict[str, float]
    """group -> seconds since it had work."""
    nodes: dict[str, list[str]]
    """group -> id of each rank's node, for groups whose processes are up."""


@dataclass(slots=True)
class BrokeredTrial:
    """A trial's state, and what its driver and its worker wait for."""

    state: TrialState
    resource_class: str = ""
    """Worker groups that can run it."""
    config: Any = None
    """Its ExperimentConfig; None until it is submitted by this run of the sweep."""
    group: str | None = None
    """Worker group that has it."""
    stop_requested: bool = False
    stop_reason: str | None = None
    pause_requested: bool = False
    is_parked: bool = False
    """No group has it, and none takes it before it is submitted again."""
    report: dict[str, Any] | None = None
    """Its end, as its driver gets it."""
    driver: str | None = None
    """Name of the driver that asked last for its results."""
    results: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    """Evaluations on their way to the driver."""
    pending_decision: asyncio.Future[str] | None = None
    """Set while a worker waits to hear whether to go on."""

    def standing_decision(self) -> str:
        """The decision on an evaluation that was reported before a restart, and decided then."""
        return "stop" if self.stop_requested else "pause" if self.pause_requested else "continue"

    def decide(self, decision: str) -> None:
        """Answer the worker that waits, if one does."""
        if self.pending_decision is not None and not self.pending_decision.done():
            self.pending_decision.set_result(decision)
        self.pending_decision = None

    def last_report(self, devices: int) -> dict[str, Any]:
        """The last evaluation as the driver gets it; the report of an end has a status.

        Args:
            devices: number of ranks of its group.
        """
        return {
            "step": self.state.evaluated_step,
            "metrics": self.state.last_metrics,
            "seconds": self.state.clock_seconds,
            "max_steps": self.state.max_steps,
            "devices": devices,
            "status": None,
            "error": None,
        }

    def end(self, devices: int) -> dict[str, Any]:
        """Keep and return the report of the end that its state tells."""
        assert self.state.end is not None
        end = self.state.end
        self.is_parked = False
        self.report = self.last_report(devices) | {
            "step": end.steps,
            "metrics": end.metrics,
            "status": end.status.value,
            "error": end.error,
        }
        return self.report

    def error_of_end(self, status: Status, error: str | None) -> str | None:
        """The error that its end is recorded with: for a stop, the reason that was given."""
        return error or self.stop_reason if status is Status.STOPPED_EARLY else error


@dataclass(slots=True)
class BrokeredGroup:
    """A worker group. Its name outlives its processes: Ray Train may start them again."""

    resource_class: str | None = None
    """Trials it can run; None while its processes are not up."""
    processes: list[str] = field(default_factory=list)
    """`host:pid` of each rank."""
    nodes: list[str] = field(default_factory=list)
    """Node id of each rank."""
    controller: Any = None
    """Handle of Ray Train's actor for it."""
    last_bundle: str | None = None
    """Bundle of its latest trial, whose weights it has in memory."""
    assigned: int = 0
    """Trials it has been given so far."""
    trial_id: str | None = None
    """Trial it has now."""
    idle_since: float | None = None
    """`time.monotonic()` when it last had nothing to do; None while its processes are not up."""
    complaint: str | None = None
    """Why it is about to end, as one of its ranks said."""
    is_retired: bool = False
    """It ends once its present trial is done."""

    def go_up(self, resource_class: str, processes: list[str], nodes: list[str], now: float) -> None:
        """Take note that its processes are up."""
        self.resource_class, self.processes, self.nodes, self.idle_since = resource_class, processes, nodes, now

    def go_down(self) -> None:
        """Take note that its processes are gone."""
        self.resource_class, self.processes, self.nodes, self.idle_since = None, [], [], None
