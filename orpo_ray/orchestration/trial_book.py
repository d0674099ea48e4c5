"""The broker's records: trials, queues and worker groups of a sweep, with every change written to the journal."""

from __future__ import annotations

import bisect
import time
from pathlib import Path
from typing import Any

from orpo_ray.orchestration.broker_state import BrokeredGroup, BrokeredTrial, Load
from orpo_ray.storage.checkpoint_files import copy_to_trial, exists
from orpo_ray.storage.events import Event, Finished, Forked, Paused, Preempted, Retried, Started, Status
from orpo_ray.storage.journal import Journal, drop_torn_tail, read_events
from orpo_ray.storage.object_store import Storage
from orpo_ray.storage.run_dir import EVENTS_FILE
from orpo_ray.storage.sweep_state import SweepState
from orpo_ray.training.trial import TrialResult


class TrialBook:
    """The sweep's state and the decisions that need nothing else; the broker adds the waiting."""

    def __init__(self, run_dir: Path, max_failures: int, remote: Storage | None) -> None:
        """Continue from the journal in `run_dir`, if there is one.

        Args:
            run_dir: the sweep's directory.
            max_failures: how often a trial is retried after its processes died.
            remote: the sweep's folder in an object store, if checkpoints are kept there.
        """
        self.run_dir, self.max_failures, self.remote = run_dir, max_failures, remote
        self.sweep = SweepState()
        self.trials: dict[str, BrokeredTrial] = {}
        self.groups: dict[str, BrokeredGroup] = {}
        self.queues: dict[str, list[str]] = {}
        """Resource class -> ids of waiting trials, in order."""
        self.is_held = False
        """The sweep is being interrupted: no trial is assigned any more."""
        self.replayed: list[Event] = []
        """Events that the journal held at the start."""
        self._replay()
        self.journal = Journal(run_dir / EVENTS_FILE, remote)

    def load(self) -> Load:
        """Current queues and groups."""
        now = time.monotonic()
        groups = self.groups.items()
        return Load(
            queued={resource_class: len(queue) for resource_class, queue in self.queues.items() if queue},
            busy={name: group.trial_id for name, group in groups if group.trial_id is not None},
            assigned={name: group.assigned for name, group in groups if group.assigned},
            idle_seconds={
                name: now - group.idle_since
                for name, group in groups
                if group.idle_since is not None and group.trial_id is None
            },
            nodes={name: group.nodes for name, group in groups if group.nodes},
        )

    def take_back(self, trial: BrokeredTrial, result: TrialResult) -> None:
        """Take back a trial from its worker group, ended, paused or preempted."""
        if trial.group is not None:
            group = self.group(trial.group)
            group.trial_id, group.idle_since = None, time.monotonic()
        trial_id, attempt = trial.state.trial_id, trial.state.attempt
        place: Any = {"trial_id": trial_id, "step": result.steps, "checkpoint": result.checkpoint}
        if result.status is Status.PREEMPTED:
            trial.group, trial.pending_decision = None, None
            # Reports still on their way belong to the past attempt; a preemption does not count as a failure.
            self.record(Preempted(**place, attempt=attempt + 1))
            self.enqueue(trial_id)
        elif result.status is Status.PAUSED:
            trial.group = None
            self.record(Paused(**place, held=self.is_held and not trial.pause_requested))
            if trial.stop_requested:
                self.end_unfinished(trial, Status.STOPPED_EARLY, None)
            elif trial.pause_requested:
                trial.is_parked, trial.pause_requested = True, False
            else:
                self.enqueue(trial_id)  # it was submitted again in the meantime
        elif result.status is Status.FAILED:
            # The worker lost its state with the exception; the journal has the last evaluation.
            self.end_unfinished(trial, Status.FAILED, result.error, result.train_seconds)
        else:
            self.end(
                Finished(
                    trial_id=trial_id,
                    status=result.status,
                    steps=result.steps,
                    metrics=result.metrics,
                    checkpoint=result.checkpoint,
                    train_seconds=result.train_seconds,
                    error=trial.error_of_end(result.status, result.error),
                )
            )

    def group(self, name: str) -> BrokeredGroup:
        """The worker group of this name, created if it is new."""
        return self.groups.setdefault(name, BrokeredGroup())

    def devices(self, trial: BrokeredTrial) -> int:
        """Ranks that train the trial; 1 where its group is not known."""
        return (len(self.group(trial.group).processes) if trial.group else 0) or 1

    def enqueue(self, trial_id: str) -> None:
        """Queue a trial in the order of trial ids, which count up: drivers start together and submit in any order."""
        trial = self.trials[trial_id]
        if self.is_held:
            trial.is_parked = True
        else:
            bisect.insort(self.queues.setdefault(trial.resource_class, []), trial_id)

    def decide(self, trial: BrokeredTrial, decision: str) -> None:
        """Answer the waiting worker; while the sweep is being interrupted, `continue` becomes `pause`."""
        trial.decide("pause" if self.is_held and decision == "continue" else decision)

    def interrupt(self, group: str, reason: str) -> None:
        """Requeue the trial of a group whose processes have died, or end it after too many failures.

        Args:
            group: its name.
            reason: used unless one of its ranks has reported one.
        """
        known = self.group(group)
        reason, known.complaint = known.complaint or reason, None
        if known.trial_id is None:
            return
        trial, known.trial_id = self.trials[known.trial_id], None
        trial.pending_decision = None
        attempt, failures = trial.state.attempt + 1, trial.state.failures + 1
        if failures > self.max_failures:
            error = f"{reason}; given up after {failures} attempts (sweep.max_failures {self.max_failures})"
            trial.state.attempt = attempt  # so that late reports of its workers are ignored
            self.end_unfinished(trial, Status.FAILED, error)
            return
        trial_id = trial.state.trial_id
        self.record(Retried(trial_id=trial_id, attempt=attempt, failures=failures, error=reason))
        self.enqueue(trial_id)

    def end_unfinished(
        self, trial: BrokeredTrial, status: Status, error: str | None, train_seconds: float | None = None
    ) -> None:
        """End a trial with the numbers of its last evaluation.

        Args:
            trial: the trial.
            status: of the end.
            error: why.
            train_seconds: training time if a worker reported it; by default that of the last evaluation.
        """
        state = trial.state
        self.end(
            Finished(
                trial_id=state.trial_id,
                status=status,
                steps=state.evaluated_step,
                metrics=state.last_metrics,
                checkpoint=state.checkpoint,
                train_seconds=state.clock_seconds if train_seconds is None else train_seconds,
                error=trial.error_of_end(status, error),
            )
        )

    def end(self, end: Finished) -> None:
        """End a trial and notify its driver."""
        self.record(end)
        trial = self.trials[end.trial_id]
        trial.results.put_nowait(trial.end(self.devices(trial)))

    def record(self, event: Event) -> None:
        """Append an event to the journal, then apply it."""
        self.journal.append(event)
        self._apply(event)

    def _apply(self, event: Event) -> None:
        state = self.sweep.apply(event)
        if event.trial_id not in self.trials:
            self.trials[event.trial_id] = BrokeredTrial(state)

    def _replay(self) -> None:
        path = self.run_dir / EVENTS_FILE
        if not path.exists():
            return
        drop_torn_tail(path)
        forks: dict[str, str | None] = {}  # trial -> donor's checkpoint that it has not resumed from yet
        for event in read_events(path):
            if isinstance(event, Forked):
                forks[event.trial_id] = self.sweep.trials[event.donor].checkpoint
            elif isinstance(event, Started):
                forks.pop(event.trial_id, None)
            self._apply(event)
            self.replayed.append(event)
        for trial in self.trials.values():
            if trial.state.end is None:
                trial.is_parked = True
            else:
                trial.end(devices=1)
        for trial_id, checkpoint in forks.items():
            # If the donor has moved on from this checkpoint, the copy was made before the crash.
            if checkpoint is not None and exists(checkpoint, self.remote):
                copied = copy_to_trial(checkpoint, trial_id, self.run_dir, self.remote)
                self.sweep.trials[trial_id].checkpoint = copied
