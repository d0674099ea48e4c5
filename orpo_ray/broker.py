"""The broker between Tune's trial drivers and the warm worker groups: one async actor, and the sweep's journal.

Every trial's life passes through here: a driver submits it, a group takes it, evaluations go to the driver and its
decision comes back, training metrics and the end are written down. What is written to `events.jsonl` is the truth of
the sweep; whoever dies, the next broker reads it and goes on.
"""

from __future__ import annotations

import asyncio
import bisect
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.actor

from orpo_ray.results import EVENTS_FILE, read_events


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
    """What the group manager needs to know."""

    queued: dict[str, int]
    """lane -> trials waiting."""
    busy: dict[str, str]
    """group -> trial."""
    idle_seconds: dict[str, float]
    """group -> seconds since it had work."""


@dataclass(slots=True)
class _Trial:
    bundle: str
    lane: str = ""
    config: Any = None
    attempt: int = 0
    group: str | None = None
    logged_step: int = 0
    evaluated_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: str | None = None
    stop_requested: bool = False
    end: dict[str, Any] | None = None
    results: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    """Evaluations on their way to the driver."""
    verdict: asyncio.Future[str] | None = None
    """Set while a worker waits to hear whether to go on."""


class Broker:
    """See the module's docstring. All methods are remote; those that wait do so without holding up the others."""

    def __init__(self, run_dir: str, max_failures: int) -> None:
        """Continue from the journal in `run_dir`, if there is one."""
        self._path = Path(run_dir) / EVENTS_FILE
        self._max_failures = max_failures
        self._trials: dict[str, _Trial] = {}
        self._queues: dict[str, list[str]] = {}  # lane -> trials
        self._lanes: dict[str, str] = {}  # group -> lane
        self._processes: dict[str, list[str]] = {}  # group -> host:pid of each rank
        self._last_bundle: dict[str, str] = {}  # group -> bundle of its latest trial
        self._busy: dict[str, str] = {}  # group -> trial
        self._idle_since: dict[str, float] = {}
        self._complaints: dict[str, str] = {}  # group -> why it is about to end
        self._retired: set[str] = set()
        self._undelivered: list[dict[str, Any]] = []
        self._changed = asyncio.Condition()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._replay()
        self._journal = self._path.open("a", encoding="utf-8")

    # ---- Tune's drivers -------------------------------------------------------------------------------------------

    async def submit(self, trial_id: str, params: dict[str, Any], bundle: str, lane: str, config: Any) -> None:
        """Queue a trial. One that is known already (its driver, or everything, was restarted) is not queued twice.

        Args:
            trial_id: Tune's.
            params: axis name -> value.
            bundle: label of its bundle, or "".
            lane: which groups can run it: those that occupy what it needs.
            config: its ExperimentConfig, only passed on.
        """
        trial = self._trials.get(trial_id)
        if trial is None:
            trial = self._trials[trial_id] = _Trial(bundle)
            self._record("submitted", trial_id, params=params, bundle=bundle)
        if trial.config is None and trial.end is None:
            trial.config, trial.lane = config, lane
            self._enqueue(trial_id)
        elif trial.end is None:
            # Its driver was restarted. What the old one took with it is offered again.
            trial.results = asyncio.Queue()
            if trial.verdict is not None:
                trial.results.put_nowait(_result(trial.evaluated_step, trial.metrics))
        await self._notify()

    async def next_result(self, trial_id: str) -> dict[str, Any]:
        """Wait for the trial's next evaluation or its end. Asking for the next one says: go on."""
        trial = self._trials[trial_id]
        if trial.verdict is not None and trial.results.empty():
            self._answer(trial, "continue")
        if trial.end is not None and trial.results.empty():
            return trial.end
        return await trial.results.get()

    async def stop(self, trial_id: str) -> None:
        """The trial is to end at its next evaluation; harmless if it has ended."""
        trial = self._trials.get(trial_id)
        if trial is None or trial.end is not None:
            return
        trial.stop_requested = True
        self._answer(trial, "stop")
        if trial_id in (queue := self._queues.get(trial.lane, [])):
            queue.remove(trial_id)
            self._end_unfinished(trial_id, "stopped_early", None)
        await self._notify()

    # ---- worker groups --------------------------------------------------------------------------------------------

    async def join(self, group: str, lane: str, processes: list[str]) -> None:
        """A group's processes are up. If they were up before and had a trial, that one was interrupted.

        Args:
            group: its name.
            lane: which trials it can run.
            processes: `host:pid` of every rank, for the journal: where to look when a trial hangs.
        """
        self._lanes[group] = lane
        self._processes[group] = processes
        self._idle_since[group] = time.monotonic()
        self._interrupted(group, self._complaints.pop(group, "a worker process died"))
        await self._notify()

    async def complain(self, group: str, reason: str) -> None:
        """A rank says why it is about to bring its group down."""
        self._complaints.setdefault(group, reason)

    async def take(self, group: str, timeout_s: float) -> Assignment | str:
        """Wait for a trial of the group's lane. Returns `wait` after `timeout_s` without one, `end` to finish."""
        lane, processes = self._lanes[group], self._processes[group]

        def replaced() -> bool:
            # The process that asked has died and this is its question still waiting; it must not take a trial along.
            return self._processes.get(group) is not processes

        def ready() -> bool:
            return replaced() or group in self._retired or bool(self._queues.get(lane))

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(ready), timeout_s)
            except TimeoutError:
                return "wait"
            if replaced():
                return "wait"
            if group in self._retired:
                return "end"
            queue = self._queues[lane]
            # The oldest trial of the bundle whose weights the group has in memory, else the oldest.
            warm = self._last_bundle.get(group)
            trial_id = next((t for t in queue if self._trials[t].bundle == warm), queue[0])
            queue.remove(trial_id)
        trial = self._trials[trial_id]
        trial.group = group
        self._last_bundle[group] = trial.bundle
        self._busy[group] = trial_id
        return Assignment(trial_id, trial.attempt, trial.config)

    async def started(self, trial_id: str, attempt: int, step: int, max_steps: int, facts: dict[str, Any]) -> None:
        """Training begins after `step` steps that were done before."""
        trial = self._trials[trial_id]
        if attempt == trial.attempt:
            self._record(
                "started",
                trial_id,
                attempt=attempt,
                group=trial.group,
                processes=self._processes.get(trial.group or "", []),
                step=step,
                max_steps=max_steps,
                facts=facts,
            )

    async def log(self, trial_id: str, attempt: int, step: int, metrics: dict[str, float]) -> None:
        """Training metrics of a step; steps that an earlier attempt reported are not written twice."""
        trial = self._trials[trial_id]
        if attempt == trial.attempt and step > trial.logged_step:
            trial.logged_step = step
            self._record("log", trial_id, step=step, metrics=metrics)

    async def evaluated(
        self, trial_id: str, attempt: int, step: int, metrics: dict[str, float], checkpoint: str | None
    ) -> str:
        """Held-out metrics of a step. Waits for the driver's decision: `continue` or `stop`."""
        trial = self._trials[trial_id]
        if attempt != trial.attempt:
            return "stop"
        if step <= trial.evaluated_step:
            return "stop" if trial.stop_requested else "continue"
        trial.evaluated_step, trial.metrics, trial.checkpoint = step, metrics, checkpoint
        self._record("eval", trial_id, step=step, metrics=metrics, checkpoint=checkpoint)
        if trial.stop_requested:
            return "stop"
        trial.verdict = asyncio.get_running_loop().create_future()
        trial.results.put_nowait(_result(step, metrics))
        return await trial.verdict

    async def finished(
        self,
        trial_id: str,
        attempt: int,
        status: str,
        steps: int,
        metrics: dict[str, float],
        checkpoint: str | None,
        train_seconds: float,
        error: str | None,
    ) -> None:
        """The trial has ended and its group is free."""
        trial = self._trials[trial_id]
        if attempt != trial.attempt or trial.end is not None:
            return
        if status == "failed":
            # The exception took what the worker knew of the trial; the journal has it.
            steps, metrics, checkpoint = trial.evaluated_step, trial.metrics, trial.checkpoint
        if trial.group is not None:
            self._busy.pop(trial.group, None)
            self._idle_since[trial.group] = time.monotonic()
        self._end(trial_id, status, steps, metrics, checkpoint, train_seconds, error)
        await self._notify()

    # ---- the sweep process ----------------------------------------------------------------------------------------

    async def lost(self, group: str, reason: str) -> None:
        """The group has ended and will not come back; a trial it had is queued again or, too often tried, failed."""
        self._interrupted(group, self._complaints.pop(group, reason))
        self._processes.pop(group, None)
        self._lanes.pop(group, None)
        self._idle_since.pop(group, None)
        await self._notify()

    async def fail_lane(self, lane: str, reason: str) -> None:
        """No group of this lane can be kept running: its waiting trials fail with the reason."""
        for trial_id in self._queues.pop(lane, []):
            self._end_unfinished(trial_id, "failed", reason)
        await self._notify()

    async def settle(self) -> None:
        """Tune is done. Trials that it had stopped just before a crash, so that nobody ran on, end where they were."""
        for trial_id, trial in self._trials.items():
            if trial.end is None and trial.config is None and trial.evaluated_step:
                self._end_unfinished(trial_id, "stopped_early", None)
            elif trial.end is None and trial.config is None:
                self._end_unfinished(trial_id, "failed", "proposed just before a crash, and not known to Tune after it")

    async def retire(self, group: str) -> None:
        """Let the group end once its present trial is done."""
        self._retired.add(group)
        await self._notify()

    async def drain(self) -> list[dict[str, Any]]:
        """Events since the last call, in order."""
        events, self._undelivered = self._undelivered, []
        return events

    async def load(self) -> Load:
        """Queues and groups as they are."""
        now = time.monotonic()
        return Load(
            queued={lane: len(queue) for lane, queue in self._queues.items() if queue},
            busy=dict(self._busy),
            idle_seconds={g: now - since for g, since in self._idle_since.items() if g not in self._busy},
        )

    # ---- inside ---------------------------------------------------------------------------------------------------

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _enqueue(self, trial_id: str) -> None:
        """In the order of Tune's ids, which count up: drivers start at the same time and arrive in any order."""
        bisect.insort(self._queues.setdefault(self._trials[trial_id].lane, []), trial_id)

    def _answer(self, trial: _Trial, decision: str) -> None:
        if trial.verdict is not None and not trial.verdict.done():
            trial.verdict.set_result(decision)
        trial.verdict = None

    def _interrupted(self, group: str, reason: str) -> None:
        trial_id = self._busy.pop(group, None)
        if trial_id is None:
            return
        trial = self._trials[trial_id]
        trial.verdict = None
        trial.attempt += 1
        if trial.attempt > self._max_failures:
            error = f"{reason}; given up after {trial.attempt} attempts (sweep.max_failures {self._max_failures})"
            self._end_unfinished(trial_id, "failed", error)
            return
        self._record("retry", trial_id, attempt=trial.attempt, error=reason)
        self._enqueue(trial_id)

    def _end(
        self,
        trial_id: str,
        status: str,
        steps: int,
        metrics: dict[str, float],
        checkpoint: str | None,
        train_seconds: float,
        error: str | None,
    ) -> None:
        trial = self._trials[trial_id]
        self._record(
            "finished",
            trial_id,
            status=status,
            steps=steps,
            metrics=metrics,
            checkpoint=checkpoint,
            train_seconds=train_seconds,
            error=error,
        )
        trial.end = {"step": steps, "metrics": metrics, "status": status, "error": error}
        trial.results.put_nowait(trial.end)

    def _end_unfinished(self, trial_id: str, status: str, error: str | None) -> None:
        """End a trial that no worker is at, with what its last evaluation said."""
        trial = self._trials[trial_id]
        self._end(trial_id, status, trial.evaluated_step, trial.metrics, trial.checkpoint, 0.0, error)

    def _record(self, event: str, trial_id: str, **details: Any) -> None:
        entry = {"event": event, "trial_id": trial_id, **details, "time": int(time.time() * 1000)}
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()
        self._undelivered.append(entry)

    def _replay(self) -> None:
        if not self._path.exists():
            return
        _drop_torn_tail(self._path)
        for entry in read_events(self._path):
            trial_id = entry["trial_id"]
            match entry["event"]:
                case "submitted":
                    self._trials[trial_id] = _Trial(entry["bundle"])
                case "log":
                    self._trials[trial_id].logged_step = entry["step"]
                case "eval":
                    self._trials[trial_id].evaluated_step = entry["step"]
                    self._trials[trial_id].metrics = entry["metrics"]
                    self._trials[trial_id].checkpoint = entry["checkpoint"]
                case "retry":
                    self._trials[trial_id].attempt = entry["attempt"]
                case "finished":
                    self._trials[trial_id].end = {
                        "step": entry["steps"],
                        "metrics": entry["metrics"],
                        "status": entry["status"],
                        "error": entry["error"],
                    }
            self._undelivered.append(entry)


def _result(step: int, metrics: dict[str, float]) -> dict[str, Any]:
    """An evaluation as the driver gets it; an end has a status."""
    return {"step": step, "metrics": metrics, "status": None, "error": None}


def start(name: str, namespace: str, run_dir: Path, max_failures: int) -> ray.actor.ActorHandle:
    """Start the sweep's broker on this node. Its concurrency must exceed all drivers and groups that wait in it."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    actor = ray.remote(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here)(Broker)
    return actor.options(name=name, namespace=namespace).remote(str(run_dir), max_failures)


def _drop_torn_tail(path: Path) -> None:
    """Cut off a line that a crash left unfinished, so that what follows starts on a line of its own."""
    with path.open("rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            file.truncate(whole)
            os.fsync(file.fileno())
