"""The Ray Tune scheduler: decides which trial starts, continues, pauses or ends, with one pruning rule per bundle.

Tune asks a search algorithm (`search.algorithm`) for trials and this scheduler for decisions. Both are rebuilt from the
journal when a sweep is continued. Tune's own snapshots, which omit schedulers (ray-project/ray#30838), are not used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, MedianStoppingRule
from ray.tune.schedulers import TrialScheduler as Decision

from orpo_ray.config import AshaConfig, FifoConfig, HyperBandConfig, MedianConfig, Pb2Config, PbtConfig
from orpo_ray.config.space import describe, plain
from orpo_ray.search.asha import Asha
from orpo_ray.search.population import Pbt, pb2
from orpo_ray.search.proposals import Proposals
from orpo_ray.search.rules import BundleView, Fifo, HyperBand, Median, PruningRule
from orpo_ray.storage.events import Evaluated, Event, Finished, Forked, Status, Submitted
from orpo_ray.storage.sweep_state import SweepState, TrialState

_log = logging.getLogger(__name__)

_BUDGET_SPENT = "the sweep's budget is spent"


class SweepScheduler(FIFOScheduler):
    """Starts, pauses and stops trials within the free slots; one pruning rule per bundle."""

    def __init__(
        self,
        proposals: Proposals,
        broker: Any,
        slots: int,
        lookahead: int,
        reason_to_stop: Callable[[TrialState, SweepState], str | None] | None,
        events: list[Event],
    ) -> None:
        """Start or continue a sweep.

        Args:
            proposals: the trials to come; its history is kept up to date here.
            broker: actor handle of the sweep's broker.
            slots: number of trials that can train at once.
            lookahead: trials started beyond that, so that groups find their next trial queued.
            reason_to_stop: gives the searcher's reason to end a trial; None for searchers that stop none.
            events: the journal so far.
        """
        super().__init__()
        self.proposals, self._broker, self._reason_to_stop = proposals, broker, reason_to_stop
        self._sweep = proposals.sweep
        self._slots, self._lookahead = slots, lookahead
        self._rules: dict[str, PruningRule] = {}
        self._trials: dict[str, Trial] = {}
        self._live: dict[str, Trial] = {}
        self._ready: dict[str, Trial] = {}
        """Trials that may start at any time: new ones, and those that were in training before a restart."""
        self._events = events
        self.stopped_by_user: set[str] = set()
        """Ids of trials that the user has stopped. The event pump's thread adds to it after telling the broker."""
        self.is_running = False
        """Whether Tune's loop has begun."""

    def __reduce__(self) -> Any:
        # Tune pickles its settings at the start but never reads them back here.
        return (FIFOScheduler, ())

    @property
    def _history(self) -> SweepState:
        return self.proposals.history

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Ignore Tune's settings: metric and mode come from the sweep's config."""
        return True

    def resize(self, slots: int) -> None:
        """Change the number of trials that can train at once. Called by the event pump's thread."""
        self._slots = slots

    # ---- proposals

    def wants_trial(self) -> bool:
        """Whether another trial should be proposed now."""
        if self._is_population:
            return True  # a population starts as a whole
        waiting = len(self._ready)
        if self._sweep.is_model_based:
            # Proposals improve with more results, so propose only if a slot would be empty.
            return waiting == 0 and self._num_active() < self._slots and self._promotion() is None
        return waiting == 0 and self._num_active() < self._slots + self._lookahead

    @property
    def _is_population(self) -> bool:
        return isinstance(self._sweep.scheduler, PbtConfig | Pb2Config)

    def add_known(self, trial_id: str, params: dict[str, Any], known: TrialState) -> None:
        """Use a known result instead of training: the trial is submitted and finished at once."""
        bundle = self._sweep.bundle_of(params)
        step, metrics = known.evaluated_step, known.last_metrics
        ray.get(self._broker.adopt.remote(trial_id, params, bundle, step, metrics, known.reused_from))
        self._history.apply(Submitted(trial_id=trial_id, params=params, bundle=bundle))
        self._history.apply(Evaluated(trial_id=trial_id, step=step, metrics=metrics))
        self._history.apply(Finished.reused(trial_id, step, metrics, known.reused_from))

    # ---- callbacks of Tune

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A proposal became a Tune trial, or its driver was restarted."""
        history = self._history.trials[trial.trial_id]
        is_new = trial.trial_id not in self._trials
        self._trials[trial.trial_id] = self._live[trial.trial_id] = trial
        rule = None
        if history.purpose == "search":
            rule = self._rule_of(trial)
            rule.on_trial_add(self._view(tune_controller, trial), trial)
        # Rungs and populations restore paused trials from the journal. HyperBand's brackets start empty: all trials run
        # to their next evaluation and are compared there.
        if is_new and (not history.paused or isinstance(rule, HyperBand)):
            self._ready[trial.trial_id] = trial

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide on an evaluation: continue, pause or stop."""
        report = json.loads(result["report"])
        history = self._history.trials[trial.trial_id]
        is_repeated = report["step"] <= history.evaluated_step
        self._record(trial, report)
        if report["max_steps"] is not None and report["step"] >= report["max_steps"]:
            return str(Decision.CONTINUE)  # the report of its end follows
        if self.proposals.over_budget(planned=False):
            return self._stop(trial, _BUDGET_SPENT)
        if history.purpose == "confirm" or is_repeated:
            return str(Decision.CONTINUE)
        if self._reason_to_stop is not None and (why := self._reason_to_stop(history, self._history)) is not None:
            return self._stop(trial, why)
        decision = self._rule_of(trial).on_trial_result(self._view(tune_controller, trial), trial, result)
        if decision in (Decision.PAUSE, Decision.NOOP):
            history.status = Status.PAUSED
            ray.get(self._broker.pause.remote(trial.trial_id))
        return str(decision)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """A trial ended by itself, or was stopped while it trained."""
        report = json.loads(result["report"])
        self._record(trial, report)
        self._end(trial, Status(report["status"] or Status.STOPPED_EARLY), report["seconds"])
        if self._history.trials[trial.trial_id].purpose == "search":
            self._rule_of(trial).on_trial_complete(self._view(tune_controller, trial), trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """A trial was ended while it was paused."""
        history = self._history.trials[trial.trial_id]
        self._end(trial, Status.STOPPED_EARLY, history.clock_seconds)
        if history.purpose == "search":
            self._rule_of(trial).on_trial_remove(self._view(tune_controller, trial), trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Do nothing: Tune restarts the failed driver and calls `on_trial_add`."""

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The next trial for a free slot; None if there is none."""
        self.is_running = True
        self._end_stopped_by_user(tune_controller)
        self._stop_eliminated(tune_controller)
        if self._num_active() >= self._slots + self._lookahead:
            return None
        if self._is_population:
            for rule in self._rules.values():
                chosen = rule.choose_trial_to_run(self._view_of_rule(tune_controller, rule))
                if chosen is not None and chosen.status == Trial.PAUSED:
                    return self._begin(chosen)
            return None
        fresh = next(iter(self._ready.values()), None)
        promoted = self._promotion()
        if fresh is None and promoted is None and not self._num_active() and self.proposals.search_is_over:
            for rule in self._rules.values():
                if isinstance(rule, HyperBand):
                    rule.halve_unfilled(self._view_of_rule(tune_controller, rule))
        chosen = promoted or fresh if self._sweep.is_model_based else fresh or promoted
        if chosen is None and not self._num_active():
            # The searcher waits for results, which need a trial to continue.
            last = (rule.last_promotion() for rule in self._rules.values() if isinstance(rule, Asha))
            chosen = next((trial for trial in last if trial is not None), None)
        return None if chosen is None else self._begin(chosen)

    # ---- inside

    def _stop(self, trial: Trial, reason: str) -> str:
        """Give the broker the reason before Tune ends the trial."""
        ray.get(self._broker.stop.remote(trial.trial_id, reason))
        return str(Decision.STOP)

    def _begin(self, trial: Trial) -> Trial:
        self._ready.pop(trial.trial_id, None)
        self._history.trials[trial.trial_id].status = Status.WAITING
        if isinstance(rule := self._rules.get(self._bundle_of(trial)), Asha):
            rule.begin(trial)
        return trial

    def _record(self, trial: Trial, report: dict[str, Any]) -> None:
        """Apply a report to the history, as the journal does."""
        history = self._history.trials[trial.trial_id]
        history.max_steps, history.devices = report["max_steps"], report["devices"]
        if report["step"] > history.evaluated_step and report["metrics"]:
            found = {"step": report["step"], "metrics": report["metrics"], "seconds": report["seconds"]}
            self._history.apply(Evaluated(trial_id=trial.trial_id, **found))

    def _end(self, trial: Trial, status: Status, seconds: float) -> None:
        step = self._history.trials[trial.trial_id].evaluated_step
        self._history.apply(Finished(trial_id=trial.trial_id, status=status, steps=step, train_seconds=seconds))
        self._ready.pop(trial.trial_id, None)
        self._live.pop(trial.trial_id, None)

    def _end_stopped_by_user(self, controller: Any) -> None:
        """End paused trials that the user stopped, before they are chosen again; the broker ends those in training."""
        for trial_id in list(self.stopped_by_user):
            if (trial := self._live.get(trial_id)) is not None and trial.status == Trial.PAUSED:
                controller.stop_trial(trial)

    def _stop_eliminated(self, controller: Any) -> None:
        for rule in self._rules.values():
            if isinstance(rule, Asha):
                for trial_id in rule.eliminated():
                    self._stop(self._trials[trial_id], "not among the best of its rung")
                    controller.stop_trial(self._trials[trial_id])
        if self.proposals.over_budget(planned=False):
            for trial in list(self._live.values()):
                if trial.status == Trial.PAUSED:
                    self._stop(trial, _BUDGET_SPENT)
                    controller.stop_trial(trial)

    def _promotion(self) -> Trial | None:
        for rule in self._rules.values():
            if (trial := rule.choose_trial_to_run(None)) is not None:
                return trial
        return None

    def _more_to_come(self) -> bool:
        """Whether new trials, proposed or not, are still to start before others are promoted."""
        return bool(self._ready) or not self.proposals.search_is_over

    def _num_active(self) -> int:
        return sum(trial.status in (Trial.PENDING, Trial.RUNNING) for trial in self._live.values())

    def _bundle_of(self, trial: Trial) -> str:
        return self._history.trials[trial.trial_id].bundle

    def _rule_of(self, trial: Trial) -> PruningRule:
        bundle = self._bundle_of(trial)
        if bundle not in self._rules:
            self._rules[bundle] = self._build(bundle)
        return self._rules[bundle]

    def _view(self, controller: Any, trial: Trial) -> Any:
        return self._view_of_rule(controller, self._rule_of(trial))

    def _view_of_rule(self, controller: Any, rule: PruningRule) -> Any:
        return BundleView(controller, lambda: [t for t in self._trials.values() if self._is_of(t, rule)])

    def _is_of(self, trial: Trial, rule: PruningRule) -> bool:
        history = self._history.trials[trial.trial_id]
        return history.purpose == "search" and self._rules.get(history.bundle) is rule

    def _build(self, bundle: str) -> PruningRule:
        sweep, scheduler = self._sweep, self._sweep.scheduler
        known = {"metric": sweep.metric, "mode": sweep.mode}
        earlier = [e for e in self._events if self._is_search_of(e.trial_id, bundle)]
        match scheduler:
            case FifoConfig():
                return Fifo()
            case AshaConfig():
                return Asha(sweep, self._trials, earlier, self._history, self._more_to_come)
            case MedianConfig():
                rule = MedianStoppingRule(
                    time_attr="step",
                    **known,
                    grace_period=scheduler.grace_steps,
                    min_samples_required=scheduler.min_trials,
                )
                return Median(rule, sweep.metric, earlier)
            case HyperBandConfig():
                # Tune's variant for BOHB waits until a bracket is full; the plain one halves partly filled brackets.
                return HyperBand(
                    time_attr="evaluation",
                    **known,
                    max_t=self.proposals.num_evaluations,
                    reduction_factor=scheduler.reduction_factor,
                )
            case PbtConfig():
                return Pbt(scheduler, sweep, self._exploited, self._restored_population(bundle))
            case Pb2Config():
                return pb2(scheduler, sweep, self._exploited, self._restored_population(bundle))

    def _is_search_of(self, trial_id: str, bundle: str) -> bool:
        trial = self._history.trials[trial_id]
        return trial.bundle == bundle and trial.purpose == "search"

    def _restored_population(self, bundle: str) -> dict[str, TrialState]:
        return {t.trial_id: t for t in self._history.trials.values() if t.bundle == bundle and t.metrics}

    def _exploited(self, trial: Trial, donor: Trial) -> None:
        """Fork a trial: Tune lets it continue from the donor's state with the settings now in its config."""
        params = plain(trial.config)
        step = ray.get(self._broker.fork.remote(trial.trial_id, donor.trial_id, params))
        self._history.apply(Forked(trial_id=trial.trial_id, donor=donor.trial_id, step=step, params=params))
        self._history.trials[trial.trial_id].status = Status.PAUSED
        _log.info("trial %s continues from a copy of %s: %s", trial.trial_id, donor.trial_id, describe(params))
