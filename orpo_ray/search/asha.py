"""Asynchronous successive halving with pauses (Li et al. 2018, arXiv 1810.05934).

A trial that is not among the best at a rung is paused there, with its checkpoint on disk, and promoted when it becomes
one of the best. Ray Tune's own ASHA stops such a trial for good, judged by the few trials that reported before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler as Decision

from orpo_ray.config import AshaConfig, SweepConfig
from orpo_ray.storage.events import Evaluated, Event, Finished, Logged, Started, Status, Submitted
from orpo_ray.storage.sweep_state import SweepState


@dataclass(slots=True)
class _Rung:
    step: int
    values: dict[str, float] = field(default_factory=dict)
    """trial -> its metric at this rung, higher is better."""


class Rungs:
    """The rungs of comparable trials, i.e. of one model size. No Ray."""

    def __init__(
        self,
        grace_steps: int,
        reduction_factor: float,
        max_steps: int,
        mode: Literal["max", "min"],
        *,
        depth_last: bool,
    ) -> None:
        """Rungs at grace_steps · reduction_factor^k, below max_steps.

        Args:
            grace_steps: step of the first rung.
            reduction_factor: η; about one trial in η is promoted from a rung.
            max_steps: optimizer steps of a whole trial.
            mode: whether a higher or a lower metric is better.
            depth_last: promote from the lowest rung first, and only once no fresh trials are to come. With a fixed
                number of trials this costs no time and promotes fewer trials that later ones overtake. Otherwise the
                highest rung comes first, as in the paper, so that complete results exist early.
        """
        self._depth_last = depth_last
        self._factor = reduction_factor
        self._sign = 1.0 if mode == "max" else -1.0
        self._rungs: list[_Rung] = []
        step = float(grace_steps)
        while step < max_steps:
            self._rungs.append(_Rung(round(step)))
            step *= reduction_factor
        self._running: dict[str, int] = {}  # trial -> how many rungs it has passed
        self._waiting: dict[str, int] = {}  # trial -> the rung it waits at

    @property
    def steps(self) -> list[int]:
        """Steps of the rungs."""
        return [rung.step for rung in self._rungs]

    @property
    def waiting(self) -> list[str]:
        """Trials that are paused at a rung."""
        return list(self._waiting)

    def add(self, trial_id: str) -> None:
        """Add a trial that has been proposed and will run."""
        self._running.setdefault(trial_id, 0)

    def report(self, trial_id: str, step: int, value: float, more_to_come: bool) -> Literal["continue", "pause"]:
        """Record an evaluation. A paused trial waits until `next_promotion` returns it."""
        passed = self._running[trial_id]
        reached = passed
        while reached < len(self._rungs) and step >= self._rungs[reached].step:
            self._rungs[reached].values[trial_id] = self._sign * value
            reached += 1
        if reached == passed:
            return "continue"
        del self._running[trial_id]
        self._waiting[trial_id] = reached - 1
        if self.next_promotion(more_to_come) != trial_id:
            return "pause"
        self.promote(trial_id)
        return "continue"

    def next_promotion(self, more_to_come: bool) -> str | None:
        """The paused trial to resume next; None if all have to wait. Call `promote` when it resumes.

        Args:
            more_to_come: whether further trials will be proposed. If not, the best trial of each complete rung is
                promoted, however few there are.
        """
        if self._depth_last and more_to_come:
            return None
        complete = 0 if more_to_come else self._num_complete()
        rungs = range(len(self._rungs))
        for index in rungs if self._depth_last else reversed(rungs):
            for trial_id in self._candidates(index, last=index < complete):
                if self._waiting.get(trial_id) == index:
                    return trial_id
        return None

    def promote(self, trial_id: str) -> None:
        """Record that a paused trial resumes."""
        self._running[trial_id] = self._waiting.pop(trial_id) + 1

    def eliminated(self, more_to_come: bool) -> list[str]:
        """Paused trials that can never be promoted: their rung is complete and its promotions are taken."""
        complete = 0 if more_to_come else self._num_complete()
        return [
            trial_id
            for trial_id, index in self._waiting.items()
            if index < complete and trial_id not in self._candidates(index, last=True)
        ]

    def remove(self, trial_id: str) -> None:
        """Remove a trial that has ended. Its values at the rungs still count."""
        self._running.pop(trial_id, None)
        self._waiting.pop(trial_id, None)

    def _candidates(self, index: int, last: bool) -> list[str]:
        """Best trials of a rung, as many as may be promoted: one in η, at least one if `last` (no more will arrive)."""
        values = self._rungs[index].values
        places = int(len(values) / self._factor)
        ranked = sorted(values, key=lambda trial_id: -values[trial_id])  # ties: the first to arrive
        return ranked[: max(places, 1) if last else places]

    def _num_complete(self) -> int:
        """Number of rungs, from the lowest, that no further trial can reach if none is added."""
        for index in range(len(self._rungs)):
            if any(passed <= index for passed in self._running.values()):
                return index
            if any(self._waiting.get(trial_id) == index for trial_id in self._candidates(index, last=True)):
                return index + 1  # complete itself, but one of its trials will reach the next rung
        return len(self._rungs)


class Asha:
    """Pruning rule that applies `Rungs` to Tune's trials."""

    def __init__(
        self,
        sweep: SweepConfig,
        trials: dict[str, Trial],
        events: list[Event],
        history: SweepState,
        more_to_come: Callable[[], bool],
    ) -> None:
        self._sweep, self._trials, self._history = sweep, trials, history
        self._more_to_come = more_to_come
        self._rungs: Rungs | None = None
        self._cached: tuple[bool, str | None, list[str]] | None = None
        """Cache of (more to come, next promotion, eliminated trials), because Tune asks many times a second."""
        self._events = events
        if max_steps := next((e.max_steps for e in events if isinstance(e, Started)), None):
            self._start(max_steps)

    def _start(self, max_steps: int) -> Rungs:
        """Build the rungs and replay the journal's reports."""
        assert isinstance(self._sweep.scheduler, AshaConfig)
        scheduler = self._sweep.scheduler
        rungs = self._rungs = Rungs(
            scheduler.grace_steps,
            scheduler.reduction_factor,
            max_steps,
            self._sweep.mode,
            depth_last=not self._sweep.is_model_based,
        )
        for event in self._events:
            trial_id = event.trial_id
            if isinstance(event, Started | Logged | Evaluated) and trial_id in rungs.waiting:
                rungs.promote(trial_id)  # it was resumed
            match event:
                case Submitted():
                    rungs.add(trial_id)
                case Evaluated() if self._sweep.metric in event.metrics:
                    rungs.report(trial_id, event.step, event.metrics[self._sweep.metric], more_to_come=True)
                case Finished():
                    rungs.remove(trial_id)
        for trial_id in rungs.waiting:
            # Set again because a crash may have come between its evaluation and the decision to pause it.
            self._history.trials[trial_id].status = Status.PAUSED
        self._events = []
        return rungs

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        if self._rungs is not None and trial.trial_id not in self._rungs.waiting:
            self._rungs.add(trial.trial_id)
            self._cached = None

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        rungs = self._rungs
        if rungs is None:
            rungs = self._start(json.loads(result["report"])["max_steps"])
            for other in controller.get_trials():
                rungs.add(other.trial_id)
        self._cached = None
        decision = rungs.report(trial.trial_id, result["step"], result[self._sweep.metric], self._more_to_come())
        return str(Decision.PAUSE if decision == "pause" else Decision.CONTINUE)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self.on_trial_remove(controller, trial)

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        if self._rungs is not None:
            self._rungs.remove(trial.trial_id)
            self._cached = None

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        chosen = self._answers()[1]
        trial = None if chosen is None else self._trials.get(chosen)
        # Right after a pause Tune is still saving the trial, which is not PAUSED yet.
        return trial if trial is not None and trial.status == Trial.PAUSED else None

    def last_promotion(self) -> Trial | None:
        """The trial that would be promoted if no more trials were to come."""
        chosen = None if self._rungs is None else self._rungs.next_promotion(more_to_come=False)
        trial = None if chosen is None else self._trials.get(chosen)
        return trial if trial is not None and trial.status == Trial.PAUSED else None

    def begin(self, trial: Trial) -> None:
        """Record that the trial was chosen to run."""
        if self._rungs is not None and trial.trial_id in self._rungs.waiting:
            self._rungs.promote(trial.trial_id)
            self._cached = None

    def eliminated(self) -> list[str]:
        """See `Rungs.eliminated`; only trials that Tune has paused already."""
        return [
            name for name in self._answers()[2] if name in self._trials and self._trials[name].status == Trial.PAUSED
        ]

    def _answers(self) -> tuple[bool, str | None, list[str]]:
        more = self._more_to_come()
        if self._cached is None or self._cached[0] != more:
            rungs = self._rungs
            promotion, eliminated = (
                (None, []) if rungs is None else (rungs.next_promotion(more), rungs.eliminated(more))
            )
            self._cached = (more, promotion, eliminated)
        return self._cached
