"""The broker between Tune's trial drivers and the warm worker groups: one async actor, and the sweep's journal.

Every trial passes through the broker: a driver submits it, a worker group takes it, its evaluations go to the driver
and the driver's decision comes back, and its training metrics and end are recorded. The journal `events.jsonl` is the
sweep's only source of truth: after any crash the next broker reads it and continues.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import ray
import ray.actor

from orpo_ray.orchestration.broker_address import BrokerAddress
from orpo_ray.orchestration.broker_state import Assignment, Load
from orpo_ray.orchestration.trial_book import TrialBook
from orpo_ray.storage.checkpoint_files import copy_to_trial, step_name
from orpo_ray.storage.events import (
    Evaluated,
    Event,
    Finished,
    Forked,
    Logged,
    Purpose,
    Started,
    Status,
    Submitted,
    Warned,
)
from orpo_ray.storage.object_store import Storage
from orpo_ray.storage.run_dir import SweepFolder
from orpo_ray.training.trial import TrialResult


class Broker:
    """Matches trials with worker groups. All methods are called remotely; methods that wait do not block the others."""

    def __init__(self, run_dir: str, max_failures: int, remote: Storage | None = None) -> None:
        """Continue from the journal in `run_dir`, if there is one.

        Args:
            run_dir: the sweep's directory.
            max_failures: how often a trial is retried after its processes died.
            remote: the sweep's folder in an object store, if checkpoints are kept there.
        """
        self._book = TrialBook(Path(run_dir), max_failures, remote)
        self._changed = asyncio.Condition()

    # ---- Tune's drivers -------------------------------------------------------------------------------------------

    async def submit(
        self, trial_id: str, params: dict[str, Any], bundle: str, resource_class: str, config: Any, purpose: Purpose
    ) -> None:
        """Queue a trial, new or paused. A trial that waits or trains already (its driver was restarted) stays as it is.

        Args:
            trial_id: as the search proposed it.
            params: axis name -> value.
            bundle: label of its bundle, or "".
            resource_class: worker groups that can run it.
            config: its ExperimentConfig, passed on to the worker group.
            purpose: `search` or `confirm`.
        """
        if trial_id not in self._book.trials:
            self._book.record(Submitted(trial_id=trial_id, params=params, bundle=bundle, purpose=purpose))
        trial = self._book.trials[trial_id]
        if trial.report is not None:
            return
        known, trial.config, trial.resource_class = trial.config is not None, config, resource_class
        if not known or trial.is_parked:
            trial.is_parked = False
            self._book.enqueue(trial_id)
        # Its worker may not have returned it yet; then `finished` queues it again.
        trial.pause_requested = False
        await self._notify()

    async def adopt(
        self, trial_id: str, params: dict[str, Any], bundle: str, step: int, metrics: dict[str, float], run_id: str
    ) -> None:
        """Record a trial whose result is taken from an earlier MLflow run instead of training."""
        if trial_id in self._book.trials:
            return
        self._book.record(Submitted(trial_id=trial_id, params=params, bundle=bundle))
        self._book.record(Evaluated(trial_id=trial_id, step=step, metrics=metrics))
        self._book.end(Finished.reused(trial_id, step, metrics, run_id))

    async def pause(self, trial_id: str) -> None:
        """Pause a trial at the evaluation it waits at; it keeps its checkpoint and frees its group."""
        trial = self._book.trials[trial_id]
        if trial.report is not None or trial.is_parked:
            return
        trial.pause_requested = True
        trial.decide("pause")
        if trial_id in (queue := self._book.queues.get(trial.resource_class, [])):
            queue.remove(trial_id)
            trial.is_parked, trial.pause_requested = True, False

    async def fork(self, trial_id: str, donor_id: str, params: dict[str, Any], timeout_s: float = 120.0) -> int:
        """Replace a trial's state by a copy of another's, for an exploit of population-based training.

        Both are paused first. Files are linked, not copied: checkpoints are never changed, only replaced.

        Args:
            trial_id: the trial that continues from the donor's checkpoint.
            donor_id: the trial copied from.
            params: the settings it continues with.
            timeout_s: how long the workers may take to pause the two trials.

        Returns:
            The optimizer step of the copied checkpoint.

        Raises:
            TimeoutError: the trials were not paused in time.
            FileNotFoundError: the donor has no checkpoint.
        """
        trial, donor = self._book.trials[trial_id], self._book.trials[donor_id]
        await self.pause(trial_id)
        await self.pause(donor_id)
        async with self._changed:
            paused = self._changed.wait_for(lambda: all(t.is_parked or t.report for t in (trial, donor)))
            await asyncio.wait_for(paused, timeout_s)
        step, checkpoint = donor.state.evaluated_step, donor.state.checkpoint
        if checkpoint is None or not checkpoint.endswith(step_name(step)):
            raise FileNotFoundError(
                f"trial {donor_id} has no checkpoint of step {step} that trial {trial_id} could continue from, only "
                f"{checkpoint}"
            )
        # Recorded first, so that a restart can complete a fork that a crash interrupted.
        self._book.record(Forked(trial_id=trial_id, donor=donor_id, step=step, params=params))
        await self._book.journal.flushed()
        trial.state.checkpoint = await asyncio.to_thread(
            copy_to_trial, checkpoint, trial_id, self._book.run_dir, self._book.remote
        )
        return step

    async def next_result(self, trial_id: str, driver: str) -> dict[str, Any] | None:
        """Wait for the trial's next evaluation or its end. Asking again after an evaluation means: continue.

        Args:
            trial_id: the trial.
            driver: name of the asking driver. A new driver gets the last result that its predecessor received; a driver
                replaced while it waited gets None.
        """
        trial = self._book.trials[trial_id]
        is_new, trial.driver = trial.driver != driver, driver
        if trial.report is not None and trial.results.empty():
            return trial.report
        if trial.pending_decision is not None and trial.results.empty():
            if is_new:
                return trial.last_report(self._book.devices(trial))
            self._book.decide(trial, "continue")
        result = await trial.results.get()
        if trial.driver != driver:
            trial.results.put_nowait(result)
            return None
        return result

    async def stop(self, trial_id: str, reason: str | None = None) -> None:
        """End a trial at its next evaluation; no effect if it has ended.

        Args:
            trial_id: the trial.
            reason: recorded with its end.
        """
        trial = self._book.trials.get(trial_id)
        if trial is None or trial.report is not None:
            return
        trial.stop_requested = True
        trial.stop_reason = trial.stop_reason or reason
        trial.decide("stop")
        if trial_id in (queue := self._book.queues.get(trial.resource_class, [])):
            queue.remove(trial_id)
            trial.is_parked = True
        if trial.is_parked:
            self._book.end_unfinished(trial, Status.STOPPED_EARLY, None)
        await self._notify()

    async def hold(self) -> None:
        """Interrupt the sweep: assign no more trials, and pause those in training at their next evaluation.

        The scheduler still decides on that evaluation; only trials that it continues are paused, for the next run.
        """
        self._book.is_held = True
        for trial_id in [t for queue in self._book.queues.values() for t in queue]:
            self._book.trials[trial_id].is_parked = True
        self._book.queues.clear()
        await self._notify()

    # ---- worker groups --------------------------------------------------------------------------------------------

    async def join(self, group: str, resource_class: str, processes: list[str], nodes: list[str]) -> None:
        """Register a group whose processes are up. If it had a trial before, that trial was interrupted.

        Args:
            group: its name.
            resource_class: which trials it can run.
            processes: `host:pid` of every rank, recorded in the journal to help find a trial that hangs.
            nodes: id of every rank's node.
        """
        self._book.group(group).go_up(resource_class, processes, nodes, time.monotonic())
        self._book.interrupt(group, "a worker process died")
        await self._notify()

    async def controlled(self, group: str, controller: ray.actor.ActorHandle) -> None:
        """Register the group's Ray Train controller, when the group begins to start."""
        self._book.group(group).controller = controller

    async def controller(self, group: str) -> ray.actor.ActorHandle | None:
        """The Ray Train controller of the group; None before it exists."""
        return self._book.group(group).controller

    async def complain(self, group: str, reason: str) -> None:
        """Record why a rank is about to end its group."""
        known = self._book.group(group)
        known.complaint = known.complaint or reason

    async def take(self, group: str, timeout_s: float) -> Assignment | str:
        """Wait for a trial of the group's resource class.

        Returns:
            The trial; `wait` after `timeout_s` without one; `end` when the group should end.
        """
        known = self._book.group(group)
        if known.resource_class is None:
            return "end"  # one of its nodes died, and its trial went to another group
        resource_class, processes = known.resource_class, known.processes

        def replaced() -> bool:
            # The process that asked has died, but its request still waits: it must not get a trial.
            return known.processes is not processes

        def ready() -> bool:
            return replaced() or known.is_retired or bool(self._book.queues.get(resource_class))

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(ready), timeout_s)
            except TimeoutError:
                return "wait"
            if replaced():
                return "wait"
            if known.is_retired:
                return "end"
            queue = self._book.queues.get(resource_class)
            if not queue:  # emptied since the wait ended
                return "wait"
            # Prefer the oldest trial of the bundle whose weights the group has in memory.
            warm = (t for t in queue if self._book.trials[t].state.bundle == known.last_bundle)
            trial_id = next(warm, queue[0])
            queue.remove(trial_id)
        trial = self._book.trials[trial_id]
        trial.group = group
        known.assigned += 1
        known.last_bundle, known.trial_id = trial.state.bundle, trial_id
        return Assignment(trial_id, trial.state.attempt, trial.config)

    async def started(self, trial_id: str, attempt: int, step: int, max_steps: int, facts: dict[str, Any]) -> None:
        """Record that training starts at `step`, the number of optimizer steps done before."""
        trial = self._book.trials[trial_id]
        if attempt != trial.state.attempt:
            return
        processes = self._book.group(trial.group).processes if trial.group else []
        self._book.record(
            Started(
                trial_id=trial_id,
                attempt=attempt,
                group=trial.group,
                processes=processes,
                devices=len(processes),
                step=step,
                max_steps=max_steps,
                facts=facts,
            )
        )

    async def log(self, trial_id: str, attempt: int, step: int, metrics: dict[str, float]) -> None:
        """Record training metrics of a step, unless an earlier attempt has already reported that step."""
        state = self._book.trials[trial_id].state
        if attempt == state.attempt and step > state.logged_step:
            self._book.record(Logged(trial_id=trial_id, step=step, metrics=metrics))

    async def evaluated(
        self,
        trial_id: str,
        attempt: int,
        step: int,
        metrics: dict[str, float],
        checkpoint: str | None,
        seconds: float,
    ) -> str:
        """Record held-out metrics of a step, then wait for the driver's decision: `continue`, `pause` or `stop`.

        Args:
            trial_id: the trial.
            attempt: of the assignment.
            step: optimizer step.
            metrics: held-out metrics.
            checkpoint: address of the newest one.
            seconds: training time until this step.
        """
        trial = self._book.trials[trial_id]
        if attempt != trial.state.attempt:
            return "stop"
        if step <= trial.state.evaluated_step:
            return trial.standing_decision()
        self._book.record(
            Evaluated(trial_id=trial_id, step=step, metrics=metrics, checkpoint=checkpoint, seconds=seconds)
        )
        if trial.stop_requested:
            return "stop"
        trial.pending_decision = asyncio.get_running_loop().create_future()
        trial.results.put_nowait(trial.last_report(self._book.devices(trial)))
        return await trial.pending_decision

    async def finished(self, trial_id: str, attempt: int, result: TrialResult) -> None:
        """Take back a trial from its group.

        Either it has ended or is paused and the group is free, or it is preempted and the group is about to end.
        """
        trial = self._book.trials[trial_id]
        if attempt == trial.state.attempt and trial.report is None:
            self._book.take_back(trial, result)
            await self._notify()

    # ---- the sweep process ----------------------------------------------------------------------------------------

    async def lost(self, group: str, reason: str) -> None:
        """Record that the group's processes are gone, and requeue its trial or fail it after too many attempts.

        The group may join again.
        """
        self._book.interrupt(group, reason)
        self._book.group(group).go_down()
        await self._notify()

    async def fail_resource_class(self, resource_class: str, reason: str) -> None:
        """Fail the waiting trials of a resource class for which no group can be kept running."""
        for trial_id in self._book.queues.pop(resource_class, []):
            self._book.end_unfinished(self._book.trials[trial_id], Status.FAILED, reason)
        await self._notify()

    async def retire(self, group: str) -> None:
        """Let the group end after its current trial."""
        self._book.group(group).is_retired = True
        await self._notify()

    async def drain(self) -> list[Event]:
        """Events that have become durable since the last call, in order."""
        replayed, self._book.replayed = self._book.replayed, []
        return replayed + self._book.journal.take()

    async def flushed(self) -> None:
        """Wait until everything recorded so far is durable."""
        await self._book.journal.flushed()

    async def warn(self, trial_id: str, attempt: int, message: str) -> None:
        """Record a problem in a trial that does not end it."""
        if attempt == self._book.trials[trial_id].state.attempt:
            self._book.record(Warned(trial_id=trial_id, message=message))

    async def load(self) -> Load:
        """Current queues and groups."""
        return self._book.load()

    # ---- inside ---------------------------------------------------------------------------------------------------

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def start(address: BrokerAddress, folder: SweepFolder, max_failures: int) -> ray.actor.ActorHandle:
    """Start the sweep's broker on this node. Its concurrency must exceed the number of drivers and groups that wait."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    actor = ray.remote(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here)(Broker)
    options = actor.options(name=address.name, namespace=address.namespace)
    return options.remote(str(folder.run_dir), max_failures, folder.remote)
