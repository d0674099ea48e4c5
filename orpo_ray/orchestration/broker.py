"""The broker between Tune's trial drivers and the warm worker groups: one async actor, and the sweep's journal.

Every trial's life passes through here: a driver submits it, a group takes it, evaluations go to the driver and its
decision comes back, training metrics and the end are written down. What is written to `events.jsonl` is the truth of
the sweep; whoever dies, the next broker reads it and goes on.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.actor

from orpo_ray.storage.checkpoint_files import MANIFEST, below, link_checkpoint
from orpo_ray.storage.journal import Journal, drop_torn_tail, read_events
from orpo_ray.storage.object_store import Storage
from orpo_ray.storage.run_dir import EVENTS_FILE


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
    """resource_class -> trials waiting."""
    busy: dict[str, str]
    """group -> trial."""
    assigned: dict[str, int]
    """group -> trials it has been given so far."""
    idle_seconds: dict[str, float]
    """group -> seconds since it had work."""
    nodes: dict[str, list[str]]
    """group -> id of each rank's node, for groups whose processes are up."""


@dataclass(slots=True)
class _Trial:
    bundle: str
    resource_class: str = ""
    config: Any = None
    attempt: int = 0
    failures: int = 0
    """Attempts that ended with a crash."""
    group: str | None = None
    max_steps: int | None = None
    logged_step: int = 0
    evaluated_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    """Of training, until the last evaluation."""
    checkpoint: str | None = None
    stop_requested: bool = False
    stop_reason: str | None = None
    pause_requested: bool = False
    is_paused: bool = False
    """No group has it and none is to take it before it is submitted again."""
    end: dict[str, Any] | None = None
    driver: str | None = None
    """Who asked last for its results."""
    results: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    """Evaluations on their way to the driver."""
    pending_decision: asyncio.Future[str] | None = None
    """Set while a worker waits to hear whether to go on."""


class Broker:
    """See the module's docstring. All methods are remote; those that wait do so without holding up the others."""

    def __init__(self, run_dir: str, max_failures: int, remote: Storage | None = None) -> None:
        """Continue from the journal in `run_dir`, if there is one.

        Args:
            run_dir: the sweep's directory.
            max_failures: how often a trial is tried again after its process died.
            remote: the sweep's folder in an object store, where checkpoints then are.
        """
        self._remote = remote
        self._path = Path(run_dir) / EVENTS_FILE
        self._max_failures = max_failures
        self._trials: dict[str, _Trial] = {}
        self._queues: dict[str, list[str]] = {}  # resource_class -> trials
        self._resource_classes: dict[str, str] = {}  # group -> resource_class
        self._processes: dict[str, list[str]] = {}  # group -> host:pid of each rank
        self._nodes: dict[str, list[str]] = {}  # group -> node id of each rank
        self._controllers: dict[str, ray.actor.ActorHandle] = {}  # group -> Ray Train's actor for it
        self._last_bundle: dict[str, str] = {}  # group -> bundle of its latest trial
        self._assigned: dict[str, int] = {}  # group -> number of trials
        self._busy: dict[str, str] = {}  # group -> trial
        self._idle_since: dict[str, float] = {}
        self._complaints: dict[str, str] = {}  # group -> why it is about to end
        self._retired: set[str] = set()
        self._is_held = False
        self._replayed: list[dict[str, Any]] = []
        self._changed = asyncio.Condition()
        self._replay()
        self._journal = Journal(self._path, remote)

    # ---- Tune's drivers -------------------------------------------------------------------------------------------

    async def submit(
        self, trial_id: str, params: dict[str, Any], bundle: str, resource_class: str, config: Any, purpose: str
    ) -> None:
        """Queue a trial, new or paused. One that waits or trains already (its driver was restarted) is left alone.

        Args:
            trial_id: the proposer's.
            params: axis name -> value.
            bundle: label of its bundle, or "".
            resource_class: which groups can run it: those that occupy what it needs.
            config: its ExperimentConfig, only passed on.
            purpose: `search` or `confirm`.
        """
        trial = self._trials.get(trial_id)
        if trial is None:
            trial = self._trials[trial_id] = _Trial(bundle)
            self._record("submitted", trial_id, params=params, bundle=bundle, purpose=purpose)
        if trial.end is not None:
            return
        known, trial.config, trial.resource_class = trial.config is not None, config, resource_class
        if not known or trial.is_paused:
            trial.is_paused = False
            self._enqueue(trial_id)
        # Its worker may not have let go of it yet; then `finished` sees that it is wanted again.
        trial.pause_requested = False
        await self._notify()

    async def adopt(
        self, trial_id: str, params: dict[str, Any], bundle: str, step: int, metrics: dict[str, float], run_id: str
    ) -> None:
        """Record a trial whose result an earlier MLflow run already holds: nothing is trained."""
        if trial_id in self._trials:
            return
        trial = self._trials[trial_id] = _Trial(bundle)
        self._record("submitted", trial_id, params=params, bundle=bundle, purpose="search")
        trial.evaluated_step, trial.metrics = step, metrics
        self._record("eval", trial_id, step=step, metrics=metrics, checkpoint=None, seconds=0.0)
        self._end(trial_id, "finished", step, metrics, None, 0.0, None, reused_from=run_id)

    async def pause(self, trial_id: str) -> None:
        """The trial is to give its group back at the evaluation it waits at, keeping its checkpoint."""
        trial = self._trials[trial_id]
        if trial.end is not None or trial.is_paused:
            return
        trial.pause_requested = True
        self._answer(trial, "pause")
        if trial_id in (queue := self._queues.get(trial.resource_class, [])):
            queue.remove(trial_id)
            trial.is_paused, trial.pause_requested = True, False

    async def fork(self, trial_id: str, donor_id: str, params: dict[str, Any], timeout_s: float = 120.0) -> int:
        """Replace a trial's state by a copy of another's, for an exploit of population-based training.

        Both are paused first. Files are linked, not copied: checkpoints are never changed, only replaced.

        Args:
            trial_id: the trial that is to go on from the donor's checkpoint.
            donor_id: the trial copied from.
            params: the settings it goes on with.
            timeout_s: how long the workers may take to let go of the two.

        Returns:
            The optimizer step that the checkpoint is of.

        Raises:
            TimeoutError: they did not.
            FileNotFoundError: the donor has no checkpoint.
        """
        trial, donor = self._trials[trial_id], self._trials[donor_id]
        await self.pause(trial_id)
        await self.pause(donor_id)
        async with self._changed:
            paused = self._changed.wait_for(lambda: all(t.is_paused or t.end for t in (trial, donor)))
            await asyncio.wait_for(paused, timeout_s)
        name = f"step-{donor.evaluated_step:08d}"
        if donor.checkpoint is None or not donor.checkpoint.endswith(name):
            raise FileNotFoundError(
                f"trial {donor_id} has no checkpoint of step {donor.evaluated_step} that trial {trial_id} could go on "
                f"from, only {donor.checkpoint}"
            )
        # Written down first: a restart finishes what a crash leaves half done.
        self._record("forked", trial_id, donor=donor_id, step=donor.evaluated_step, params=params)
        trial.metrics, trial.evaluated_step, trial.logged_step = donor.metrics, donor.evaluated_step, donor.logged_step
        await self._journal.flushed()
        trial.checkpoint = await asyncio.to_thread(self._copy_checkpoint, donor.checkpoint, trial_id)
        return donor.evaluated_step

    async def next_result(self, trial_id: str, driver: str) -> dict[str, Any] | None:
        """Wait for the trial's next evaluation or its end. Asking for the next one says: go on.

        Args:
            trial_id: the trial.
            driver: name of the asking driver. A new one is given again what its predecessor took with it; one that has
                been replaced while it waited gets None, which nobody hears.
        """
        trial = self._trials[trial_id]
        is_new, trial.driver = trial.driver != driver, driver
        if trial.end is not None and trial.results.empty():
            return trial.end
        if trial.pending_decision is not None and trial.results.empty():
            if is_new:
                return self._result(trial)
            self._answer(trial, "continue")
        result = await trial.results.get()
        if trial.driver != driver:
            trial.results.put_nowait(result)
            return None
        return result

    async def stop(self, trial_id: str, reason: str | None = None) -> None:
        """The trial is to end at its next evaluation; harmless if it has ended.

        Args:
            trial_id: the trial.
            reason: for its end, where there is something to say.
        """
        trial = self._trials.get(trial_id)
        if trial is None or trial.end is not None:
            return
        trial.stop_requested = True
        trial.stop_reason = trial.stop_reason or reason
        self._answer(trial, "stop")
        if trial_id in (queue := self._queues.get(trial.resource_class, [])):
            queue.remove(trial_id)
            trial.is_paused = True
        if trial.is_paused:
            self._end_unfinished(trial_id, "stopped_early", None)
        await self._notify()

    async def hold(self) -> None:
        """The sweep is to be interrupted: nothing is handed out any more, what trains pauses at its next evaluation.

        The scheduler still decides on that evaluation; only what it lets go on is paused, for the next run to take up.
        """
        self._is_held = True
        for trial_id in [t for queue in self._queues.values() for t in queue]:
            self._trials[trial_id].is_paused = True
        self._queues.clear()
        await self._notify()

    # ---- worker groups --------------------------------------------------------------------------------------------

    async def join(self, group: str, resource_class: str, processes: list[str], nodes: list[str]) -> None:
        """A group's processes are up. If they were up before and had a trial, that one was interrupted.

        Args:
            group: its name.
            resource_class: which trials it can run.
            processes: `host:pid` of every rank, for the journal: where to look when a trial hangs.
            nodes: id of every rank's node.
        """
        self._resource_classes[group] = resource_class
        self._processes[group] = processes
        self._nodes[group] = nodes
        self._idle_since[group] = time.monotonic()
        self._interrupted(group, self._complaints.pop(group, "a worker process died"))
        await self._notify()

    async def controlled(self, group: str, controller: ray.actor.ActorHandle) -> None:
        """The group has begun to start, under this actor of Ray Train's."""
        self._controllers[group] = controller

    async def controller(self, group: str) -> ray.actor.ActorHandle | None:
        """The actor that starts and watches the group; None before there is one."""
        return self._controllers.get(group)

    async def complain(self, group: str, reason: str) -> None:
        """A rank says why it is about to bring its group down."""
        self._complaints.setdefault(group, reason)

    async def take(self, group: str, timeout_s: float) -> Assignment | str:
        """Wait for a trial of the group's resource class. Returns `wait` after `timeout_s` without one, `end` to finish."""
        if group not in self._resource_classes:
            return "end"  # it was given up, since a node of it died; its trials are with others
        resource_class, processes = self._resource_classes[group], self._processes[group]

        def replaced() -> bool:
            # The process that asked has died and this is its question still waiting; it must not take a trial along.
            return self._processes.get(group) is not processes

        def ready() -> bool:
            return replaced() or group in self._retired or bool(self._queues.get(resource_class))

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(ready), timeout_s)
            except TimeoutError:
                return "wait"
            if replaced():
                return "wait"
            if group in self._retired:
                return "end"
            queue = self._queues.get(resource_class)
            if not queue:  # emptied between the wait and now
                return "wait"
            # The oldest trial of the bundle whose weights the group has in memory, else the oldest.
            warm = self._last_bundle.get(group)
            trial_id = next((t for t in queue if self._trials[t].bundle == warm), queue[0])
            queue.remove(trial_id)
        trial = self._trials[trial_id]
        trial.group = group
        self._assigned[group] = self._assigned.get(group, 0) + 1
        self._last_bundle[group] = trial.bundle
        self._busy[group] = trial_id
        return Assignment(trial_id, trial.attempt, trial.config)

    async def started(self, trial_id: str, attempt: int, step: int, max_steps: int, facts: dict[str, Any]) -> None:
        """Training begins after `step` steps that were done before."""
        trial = self._trials[trial_id]
        if attempt == trial.attempt:
            trial.max_steps = max_steps
            self._record(
                "started",
                trial_id,
                attempt=attempt,
                group=trial.group,
                processes=(processes := self._processes.get(trial.group or "", [])),
                devices=len(processes),
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
        self,
        trial_id: str,
        attempt: int,
        step: int,
        metrics: dict[str, float],
        checkpoint: str | None,
        seconds: float,
    ) -> str:
        """Held-out metrics of a step. Waits for the driver's decision: `continue`, `pause` or `stop`.

        Args:
            trial_id: the trial.
            attempt: the assignment's.
            step: optimizer step.
            metrics: held-out metrics.
            checkpoint: the newest one.
            seconds: of training until here.
        """
        trial = self._trials[trial_id]
        if attempt != trial.attempt:
            return "stop"
        if step <= trial.evaluated_step:
            return self._standing_decision(trial)
        trial.evaluated_step, trial.metrics, trial.checkpoint = step, metrics, checkpoint
        trial.seconds = seconds
        self._record("eval", trial_id, step=step, metrics=metrics, checkpoint=checkpoint, seconds=seconds)
        if trial.stop_requested:
            return "stop"
        trial.pending_decision = asyncio.get_running_loop().create_future()
        trial.results.put_nowait(self._result(trial))
        return await trial.pending_decision

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
        """The trial has ended, or is `paused`, and its group is free; or `preempted`, and its group is about to end."""
        trial = self._trials[trial_id]
        if attempt != trial.attempt or trial.end is not None:
            return
        if trial.group is not None:
            self._busy.pop(trial.group, None)
            self._idle_since[trial.group] = time.monotonic()
        if status == "preempted":
            trial.checkpoint, trial.group, trial.pending_decision = checkpoint, None, None
            trial.attempt += 1  # its reports that are still on the way belong to the past; it is no failure
            self._record("preempted", trial_id, step=steps, checkpoint=checkpoint, attempt=trial.attempt)
            self._enqueue(trial_id)
        elif status == "paused":
            trial.checkpoint, trial.group = checkpoint, None
            held = self._is_held and not trial.pause_requested
            self._record("paused", trial_id, step=steps, checkpoint=checkpoint, held=held)
            if trial.stop_requested:
                self._end_unfinished(trial_id, "stopped_early", None)
            elif trial.pause_requested:
                trial.is_paused, trial.pause_requested = True, False
            else:
                self._enqueue(trial_id)  # it was submitted again meanwhile
        else:
            if status == "failed":
                # The exception took what the worker knew of the trial; the journal has it.
                steps, metrics, checkpoint = trial.evaluated_step, trial.metrics, trial.checkpoint
            self._end(trial_id, status, steps, metrics, checkpoint, train_seconds, error)
        await self._notify()

    # ---- the sweep process ----------------------------------------------------------------------------------------

    async def lost(self, group: str, reason: str) -> None:
        """The group's processes are no more; a trial it had is queued again or, too often tried, failed. The group may
        join again."""
        self._interrupted(group, self._complaints.pop(group, reason))
        self._processes.pop(group, None)
        self._nodes.pop(group, None)
        self._resource_classes.pop(group, None)
        self._idle_since.pop(group, None)
        await self._notify()

    async def fail_resource_class(self, resource_class: str, reason: str) -> None:
        """No group of this resource_class can be kept running: its waiting trials fail with the reason."""
        for trial_id in self._queues.pop(resource_class, []):
            self._end_unfinished(trial_id, "failed", reason)
        await self._notify()

    async def retire(self, group: str) -> None:
        """Let the group end once its present trial is done."""
        self._retired.add(group)
        await self._notify()

    async def drain(self) -> list[dict[str, Any]]:
        """Events since the last call that no crash can take back any more, in order."""
        replayed, self._replayed = self._replayed, []
        return replayed + self._journal.take()

    async def flushed(self) -> None:
        """Wait until all that was told so far is safe from any crash."""
        await self._journal.flushed()

    async def warn(self, trial_id: str, attempt: int, message: str) -> None:
        """Something went wrong in a trial that does not end it."""
        if attempt == self._trials[trial_id].attempt:
            self._record("warning", trial_id, message=message)

    async def load(self) -> Load:
        """Queues and groups as they are."""
        now = time.monotonic()
        return Load(
            queued={resource_class: len(queue) for resource_class, queue in self._queues.items() if queue},
            busy=dict(self._busy),
            assigned=dict(self._assigned),
            idle_seconds={g: now - since for g, since in self._idle_since.items() if g not in self._busy},
            nodes=dict(self._nodes),
        )

    # ---- inside ---------------------------------------------------------------------------------------------------

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _enqueue(self, trial_id: str) -> None:
        """In the order of Tune's ids, which count up: drivers start at the same time and arrive in any order."""
        trial = self._trials[trial_id]
        if self._is_held:
            trial.is_paused = True
        else:
            bisect.insort(self._queues.setdefault(trial.resource_class, []), trial_id)

    def _answer(self, trial: _Trial, decision: str) -> None:
        if trial.pending_decision is not None and not trial.pending_decision.done():
            trial.pending_decision.set_result("pause" if self._is_held and decision == "continue" else decision)
        trial.pending_decision = None

    def _standing_decision(self, trial: _Trial) -> str:
        """For an evaluation that was reported before a restart, and decided then."""
        return "stop" if trial.stop_requested else "pause" if trial.pause_requested else "continue"

    def _result(self, trial: _Trial) -> dict[str, Any]:
        """The last evaluation as the driver gets it; an end has a status."""
        return {
            "step": trial.evaluated_step,
            "metrics": trial.metrics,
            "seconds": trial.seconds,
            "max_steps": trial.max_steps,
            "devices": len(self._processes.get(trial.group or "", [""])),
            "status": None,
            "error": None,
        }

    def _interrupted(self, group: str, reason: str) -> None:
        trial_id = self._busy.pop(group, None)
        if trial_id is None:
            return
        trial = self._trials[trial_id]
        trial.pending_decision = None
        trial.attempt += 1
        trial.failures += 1
        if trial.failures > self._max_failures:
            error = f"{reason}; given up after {trial.failures} attempts (sweep.max_failures {self._max_failures})"
            self._end_unfinished(trial_id, "failed", error)
            return
        self._record("retry", trial_id, attempt=trial.attempt, failures=trial.failures, error=reason)
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
        **details: str,
    ) -> None:
        trial = self._trials[trial_id]
        if status == "stopped_early":
            error = error or trial.stop_reason
        self._record(
            "finished",
            trial_id,
            status=status,
            steps=steps,
            metrics=metrics,
            checkpoint=checkpoint,
            train_seconds=train_seconds,
            error=error,
            **details,
        )
        trial.is_paused, trial.seconds = False, max(train_seconds, trial.seconds)
        trial.end = self._result(trial) | {"step": steps, "metrics": metrics, "status": status, "error": error}
        trial.results.put_nowait(trial.end)

    def _end_unfinished(self, trial_id: str, status: str, error: str | None) -> None:
        """End a trial that no worker is at, with what its last evaluation said."""
        trial = self._trials[trial_id]
        step, seconds = trial.evaluated_step, trial.seconds
        self._end(trial_id, status, step, trial.metrics, trial.checkpoint, seconds, error)

    def _record(self, event: str, trial_id: str, **details: Any) -> None:
        entry = {"event": event, "trial_id": trial_id, **details, "time": int(time.time() * 1000)}
        self._journal.append(entry)

    def _replay(self) -> None:
        if not self._path.exists():
            return
        drop_torn_tail(self._path)
        forks: dict[str, str | None] = {}  # trial -> checkpoint that it has not gone on from yet
        for entry in read_events(self._path):
            trial_id = entry["trial_id"]
            match entry["event"]:
                case "submitted":
                    self._trials[trial_id] = _Trial(entry["bundle"])
                case "started":
                    self._trials[trial_id].max_steps = entry["max_steps"]
                    forks.pop(trial_id, None)
                case "log":
                    self._trials[trial_id].logged_step = entry["step"]
                case "eval":
                    self._trials[trial_id].evaluated_step = entry["step"]
                    self._trials[trial_id].metrics = entry["metrics"]
                    self._trials[trial_id].checkpoint = entry["checkpoint"]
                    self._trials[trial_id].seconds = entry.get("seconds", 0.0)
                case "forked":
                    trial, donor = self._trials[trial_id], self._trials[entry["donor"]]
                    trial.logged_step = trial.evaluated_step = entry["step"]
                    trial.metrics, trial.checkpoint = donor.metrics, None
                    forks[trial_id] = donor.checkpoint
                case "paused":
                    self._trials[trial_id].checkpoint = entry["checkpoint"]
                case "preempted":
                    self._trials[trial_id].checkpoint = entry["checkpoint"]
                    self._trials[trial_id].attempt = entry["attempt"]
                case "retry":
                    self._trials[trial_id].attempt = entry["attempt"]
                    self._trials[trial_id].failures = entry.get("failures", entry["attempt"])
                case "finished":
                    trial = self._trials[trial_id]
                    trial.end = self._result(trial) | {
                        "step": entry["steps"],
                        "metrics": entry["metrics"],
                        "status": entry["status"],
                        "error": entry["error"],
                    }
            self._replayed.append(entry)
        for trial in self._trials.values():
            trial.is_paused = trial.end is None  # nobody has it before it is submitted again
        for trial_id, checkpoint in forks.items():
            # Where the donor has gone on, and its checkpoint with it, the copy had been made.
            if checkpoint is not None and self._is_there(checkpoint):
                self._copy_checkpoint(checkpoint, trial_id)

    def _is_there(self, checkpoint: str) -> bool:
        if self._remote is None:
            return Path(checkpoint).is_dir()
        return self._remote.read(f"{below(self._remote, checkpoint)}/{MANIFEST}") is not None

    def _copy_checkpoint(self, checkpoint: str, trial_id: str) -> str:
        """Make a copy of another trial's checkpoint the only one that a trial has. Returns where it is."""
        if self._remote is None:
            return str(link_checkpoint(Path(checkpoint), self._path.parent / "trials" / trial_id))
        source, folder = below(self._remote, checkpoint), f"trials/{trial_id}"
        target = f"{folder}/{checkpoint.rpartition('/')[2]}"
        # The files first and what makes them a checkpoint last; then the older ones can go.
        self._remote.delete(f"{target}/{MANIFEST}")
        self._remote.copy(source, target, last=MANIFEST)
        names = {name.split("/")[2] for name in self._remote.list(folder) if name.split("/")[2].startswith("step-")}
        for name in names - {target.rpartition("/")[2]}:
            self._remote.delete(f"{folder}/{name}")
        return f"{self._remote}/{target}"


def start(
    name: str, namespace: str, run_dir: Path, max_failures: int, remote: Storage | None = None
) -> ray.actor.ActorHandle:
    """Start the sweep's broker on this node. Its concurrency must exceed all drivers and groups that wait in it."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    actor = ray.remote(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here)(Broker)
    return actor.options(name=name, namespace=namespace).remote(str(run_dir), max_failures, remote)
