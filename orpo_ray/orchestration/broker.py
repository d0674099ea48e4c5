"""The broker between Tune's trial drivers and the warm worker groups: one async actor, and the sweep's journal.

Every trial's life passes through here: a driver submits it, a group takes it, evaluations go to the driver and its
decision comes back, training metrics and the end are written down. What is written to `events.jsonl` is the truth of
the sweep; whoever dies, the next broker reads it and goes on.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import ray
import ray.actor

from orpo_ray.orchestration.broker_state import Assignment, BrokerAddress, Load
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
    """See the module's docstring. All methods are remote; those that wait do so without holding up the others."""

    def __init__(self, run_dir: str, max_failures: int, remote: Storage | None = None) -> None:
        """Continue from the journal in `run_dir`, if there is one.

        Args:
            run_dir: the sweep's directory.
            max_failures: how often a trial is tried again after its process died.
            remote: the sweep's folder in an object store, where checkpoints then are.
        """
        self._book = TrialBook(Path(run_dir), max_failures, remote)
        self._changed = asyncio.Condition()

    # ---- Tune's drivers -------------------------------------------------------------------------------------------

    async def submit(
        self, trial_id: str, params: dict[str, Any], bundle: str, resource_class: str, config: Any, purpose: Purpose
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
        if trial_id not in self._book.trials:
            self._book.record(Submitted(trial_id=trial_id, params=params, bundle=bundle, purpose=purpose))
        trial = self._book.trials[trial_id]
        if trial.report is not None:
            return
        known, trial.config, trial.resource_class = trial.config is not None, config, resource_class
        if not known or trial.is_parked:
            trial.is_parked = False
            self._book.enqueue(trial_id)
        # Its worker may not have let go of it yet; then `finished` sees that it is wanted again.
        trial.pause_requested = False
        await self._notify()

    async def adopt(
        self, trial_id: str, params: dict[str, Any], bundle: str, step: int, metrics: dict[str, float], run_id: str
    ) -> None:
        """Record a trial whose result an earlier MLflow run already holds: nothing is trained."""
        if trial_id in self._book.trials:
            return
        self._book.record(Submitted(trial_id=trial_id, params=params, bundle=bundle))
        self._book.record(Evaluated(trial_id=trial_id, step=step, metrics=metrics))
        self._book.end(
            Finished(
                trial_id=trial_id,
                status=Status.FINISHED,
                steps=step,
                metrics=metrics,
                train_seconds=0.0,
                reused_from=run_id,
            )
        )

    async def pause(self, trial_id: str) -> None:
        """The trial is to give its group back at the evaluation it waits at, keeping its checkpoint."""
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
        trial, donor = self._book.trials[trial_id], self._book.trials[donor_id]
        await self.pause(trial_id)
        await self.pause(donor_id)
        async with self._changed:
            paused = self._changed.wait_for(lambda: all(t.is_parked or t.report for t in (trial, donor)))
            await asyncio.wait_for(paused, timeout_s)
        step, checkpoint = donor.state.evaluated_step, donor.state.checkpoint
        if checkpoint is None or not checkpoint.endswith(step_name(step)):
            raise FileNotFoundError(
                f"trial {donor_id} has no checkpoint of step {step} that trial {trial_id} could go on from, only "
                f"{checkpoint}"
            )
        # Written down first: a restart finishes what a crash leaves half done.
        self._book.record(Forked(trial_id=trial_id, donor=donor_id, step=step, params=params))
        await self._book.journal.flushed()
        trial.state.checkpoint = await asyncio.to_thread(
            copy_to_trial, checkpoint, trial_id, self._book.run_dir, self._book.remote
        )
        return step

    async def next_result(self, trial_id: str, driver: str) -> dict[str, Any] | None:
        """Wait for the trial's next evaluation or its end. Asking for the next one says: go on.

        Args:
            trial_id: the trial.
            driver: name of the asking driver. A new one is given again what its predecessor took with it; one that has
                been replaced while it waited gets None, which nobody hears.
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
        """The trial is to end at its next evaluation; harmless if it has ended.

        Args:
            trial_id: the trial.
            reason: for its end, where there is something to say.
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
        """The sweep is to be interrupted: nothing is handed out any more, what trains pauses at its next evaluation.

        The scheduler still decides on that evaluation; only what it lets go on is paused, for the next run to take up.
        """
        self._book.is_held = True
        for trial_id in [t for queue in self._book.queues.values() for t in queue]:
            self._book.trials[trial_id].is_parked = True
        self._book.queues.clear()
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
        self._book.group(group).go_up(resource_class, processes, nodes, time.monotonic())
        self._book.interrupt(group, "a worker process died")
        await self._notify()

    async def controlled(self, group: str, controller: ray.actor.ActorHandle) -> None:
        """The group has begun to start, under this actor of Ray Train's."""
        self._book.group(group).controller = controller

    async def controller(self, group: str) -> ray.actor.ActorHandle | None:
        """The actor that starts and watches the group; None before there is one."""
        return self._book.group(group).controller

    async def complain(self, group: str, reason: str) -> None:
        """A rank says why it is about to bring its group down."""
        known = self._book.group(group)
        known.complaint = known.complaint or reason

    async def take(self, group: str, timeout_s: float) -> Assignment | str:
        """Wait for a trial of the group's resource class.

        Returns:
            The trial; `wait` after `timeout_s` without one; `end` when the group is to end.
        """
        known = self._book.group(group)
        if known.resource_class is None:
            return "end"  # it was given up, since a node of it died; its trials are with others
        resource_class, processes = known.resource_class, known.processes

        def replaced() -> bool:
            # The process that asked has died, and its request still waits: it must not take a trial along.
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
            if not queue:  # emptied between the wait and now
                return "wait"
            # The oldest trial of the bundle whose weights the group has in memory, else the oldest.
            warm = (t for t in queue if self._book.trials[t].state.bundle == known.last_bundle)
            trial_id = next(warm, queue[0])
            queue.remove(trial_id)
        trial = self._book.trials[trial_id]
        trial.group = group
        known.assigned += 1
        known.last_bundle, known.trial_id = trial.state.bundle, trial_id
        return Assignment(trial_id, trial.state.attempt, trial.config)

    async def started(self, trial_id: str, attempt: int, step: int, max_steps: int, facts: dict[str, Any]) -> None:
        """Training begins after `step` steps that were done before."""
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
        """Training metrics of a step; steps that an earlier attempt reported are not written twice."""
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
        """Held-out metrics of a step. Waits for the driver's decision: `continue`, `pause` or `stop`.

        Args:
            trial_id: the trial.
            attempt: the assignment's.
            step: optimizer step.
            metrics: held-out metrics.
            checkpoint: the newest one.
            seconds: of training until here.
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
        """A group has handed its trial back: it has ended or is paused, and the group is free; or it is preempted,
        and the group is about to end."""
        trial = self._book.trials[trial_id]
        if attempt == trial.state.attempt and trial.report is None:
            self._book.take_back(trial, result)
            await self._notify()

    # ---- the sweep process ----------------------------------------------------------------------------------------

    async def lost(self, group: str, reason: str) -> None:
        """The group's processes are no more; a trial it had is queued again or, too often tried, failed. The group may
        join again."""
        self._book.interrupt(group, reason)
        self._book.group(group).go_down()
        await self._notify()

    async def fail_resource_class(self, resource_class: str, reason: str) -> None:
        """No group of this resource_class can be kept running: its waiting trials fail with the reason."""
        for trial_id in self._book.queues.pop(resource_class, []):
            self._book.end_unfinished(self._book.trials[trial_id], Status.FAILED, reason)
        await self._notify()

    async def retire(self, group: str) -> None:
        """Let the group end once its present trial is done."""
        self._book.group(group).is_retired = True
        await self._notify()

    async def drain(self) -> list[Event]:
        """Events since the last call that no crash can take back any more, in order."""
        replayed, self._book.replayed = self._book.replayed, []
        return replayed + self._book.journal.take()

    async def flushed(self) -> None:
        """Wait until all that was told so far is safe from any crash."""
        await self._book.journal.flushed()

    async def warn(self, trial_id: str, attempt: int, message: str) -> None:
        """Something went wrong in a trial that does not end it."""
        if attempt == self._book.trials[trial_id].state.attempt:
            self._book.record(Warned(trial_id=trial_id, message=message))

    async def load(self) -> Load:
        """Queues and groups as they are."""
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
