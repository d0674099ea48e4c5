"""State of trials and worker groups that the broker keeps beside the journal. No Ray."""

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
    """Number of earlier attempts. Reports of an earlier attempt are ignored."""
    config: Any
    """The trial's ExperimentConfig."""


@dataclass(frozen=True, slots=True)
class Load:
    """Queue lengths and the activity of worker groups, for the group manager."""

    queued: dict[str, int]
    """resource class -> trials waiting."""
    busy: dict[str, str]
    """group -> trial."""
    assigned: dict[str, int]
    """group -> number of trials assigned to it so far."""
    idle_seconds: dict[str, float]
    """group -> seconds since it became idle."""
    nodes: dict[str, list[str]]
    """group -> id of each rank's node, for groups whose processes are up."""


@dataclass(slots=True)
class BrokeredTrial:
    """A trial's state, and the messages that its driver and its worker wait for."""

    state: TrialState
    resource_class: str = ""
    """Worker groups that can run it."""
    config: Any = None
    """Its ExperimentConfig; None until it is submitted by this run of the sweep."""
    group: str | None = None
    """Worker group that trains it."""
    stop_requested: bool = False
    stop_reason: str | None = None
    pause_requested: bool = False
    is_parked: bool = False
    """It is neither queued nor in a group, and stays so until it is submitted again."""
    report: dict[str, Any] | None = None
    """Its end, in the form that its driver gets."""
    driver: str | None = None
    """Name of the driver that last asked for its results."""
    results: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    """Evaluations on their way to the driver."""
    pending_decision: asyncio.Future[str] | None = None
    """Set while a worker waits for the decision on its evaluation."""

    def standing_decision(self) -> str:
        """The decision on an evaluation that was already reported and decided before a restart."""
        return "stop" if self.stop_requested else "pause" if self.pause_requested else "continue"

    def decide(self, decision: str) -> None:
        """Answer the worker, if one waits."""
        if self.pending_decision is not None and not self.pending_decision.done():
            self.pending_decision.set_result(decision)
        self.pending_decision = None

    def last_report(self, devices: int) -> dict[str, Any]:
        """The last evaluation in the form that the driver gets; `status` is None until the end.

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
        """Build, keep and return the report of its end, from its state."""
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
        """The error to record with its end; for a stop without an error, the reason given for the stop."""
        return error or self.stop_reason if status is Status.STOPPED_EARLY else error


@dataclass(slots=True)
class BrokeredGroup:
    """A worker group. Its name outlives its processes, which Ray Train may restart."""

    resource_class: str | None = None
    """Trials it can run; None while its processes are not up."""
    processes: list[str] = field(default_factory=list)
    """`host:pid` of each rank."""
    nodes: list[str] = field(default_factory=list)
    """Node id of each rank."""
    controller: Any = None
    """Actor handle of its Ray Train controller."""
    last_bundle: str | None = None
    """Bundle of its latest trial, whose weights it has in memory."""
    assigned: int = 0
    """Number of trials assigned to it so far."""
    trial_id: str | None = None
    """Trial that it trains now."""
    idle_since: float | None = None
    """`time.monotonic()` when it last became idle; None while its processes are not up."""
    complaint: str | None = None
    """Why it is about to end, as reported by one of its ranks."""
    is_retired: bool = False
    """It ends after its current trial."""

    def go_up(self, resource_class: str, processes: list[str], nodes: list[str], now: float) -> None:
        """Record that its processes are up."""
        self.resource_class, self.processes, self.nodes, self.idle_since = resource_class, processes, nodes, now

    def go_down(self) -> None:
        """Record that its processes are gone."""
        self.resource_class, self.processes, self.nodes, self.idle_since = None, [], [], None
