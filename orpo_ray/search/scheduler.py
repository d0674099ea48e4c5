"""Which trial trains next, goes on, pauses or ends: Tune's view of the sweep, one rule for every bundle.

Two faces of one thing: Tune asks a search algorithm for trials and a scheduler for decisions. Both are rebuilt from the
journal when a sweep is continued; of Tune's own snapshots, which leave schedulers out (ray-project/ray#30838), none is
used.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
from ray.tune.experiment import Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.schedulers import FIFOScheduler, HyperBandForBOHB, MedianStoppingRule, PopulationBasedTraining
from ray.tune.schedulers import TrialScheduler as Decision
from ray.tune.search import SearchAlgorithm

from orpo_ray.config.experiment import (
    AshaConfig,
    FifoConfig,
    HyperBandConfig,
    MedianConfig,
    Pb2Config,
    PbtConfig,
    SweepConfig,
)
from orpo_ray.config.space import Choice, LogUniform, Uniform, describe, plain
from orpo_ray.search.asha import Rungs
from orpo_ray.search.proposals import Proposals
from orpo_ray.storage.history import History, TrialHistory

_log = logging.getLogger(__name__)

_BUDGET_SPENT = "the sweep's budget is spent"


class Rule(Protocol):
    """How trials of one bundle are compared. Confirmation trials are not shown to it."""

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        """It has been proposed, or taken up again after a restart."""

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """An evaluation before the last: continue, pause or stop."""

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """It has ended by itself, or by a stop that the rule decided."""

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        """It was ended while it waited."""

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """A paused trial that should go on."""


class Conductor(FIFOScheduler):
    """Tune's scheduler: gives turns, within the slots there are, and asks each bundle's rule."""

    def __init__(
        self,
        proposals: Proposals,
        broker: Any,
        slots: int,
        lookahead: int,
        gives_up: Callable[[TrialHistory, History], str | None] | None,
        events: list[dict[str, Any]],
    ) -> None:
        """Take up a sweep.

        Args:
            proposals: what comes next; its history is kept up to date here.
            broker: handle of the sweep's broker.
            slots: trials that can train at once.
            lookahead: trials given to drivers beyond that, so that groups find their next one waiting.
            gives_up: the searcher's reason to end a trial, if it has a say in that.
            events: the journal so far.
        """
        super().__init__()
        self.proposals, self._broker, self._gives_up = proposals, broker, gives_up
        self._sweep = proposals.sweep
        self._slots, self._lookahead = slots, lookahead
        self._rules: dict[str, Rule] = {}
        self._trials: dict[str, Trial] = {}
        self._live: dict[str, Trial] = {}
        self._ready: dict[str, Trial] = {}
        """Trials that may start at any time: fresh ones, and those that a restart found in training."""
        self._events = events
        self.unwanted: set[str] = set()
        """Trials that the user has stopped. Another thread adds to it, once the broker knows."""
        self.is_running = False
        """Whether Tune's loop has begun."""

    def __reduce__(self) -> Any:
        # Tune pickles its settings at the start. Nothing is ever read from there.
        return (FIFOScheduler, ())

    @property
    def _history(self) -> History:
        return self.proposals.history

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Metric and mode are the sweep's."""
        return True

    def resize(self, slots: int) -> None:
        """So many trials can train at once from now on. Called by another thread."""
        self._slots = slots

    # ---- proposals

    def wants_trial(self) -> bool:
        """Whether another trial should be proposed now."""
        if self._is_population:
            return True  # it is compared as a whole
        waiting = len(self._ready)
        if self._sweep.is_model_based:
            # A proposal is the better the more is known: only where a slot would be empty.
            return waiting == 0 and self._num_active() < self._slots and self._promotion() is None
        return waiting == 0 and self._num_active() < self._slots + self._lookahead

    @property
    def _is_population(self) -> bool:
        return isinstance(self._sweep.scheduler, PbtConfig | Pb2Config)

    def add_known(self, trial_id: str, params: dict[str, Any], known: TrialHistory) -> None:
        """Take over a result instead of training: it is submitted and finished at once."""
        bundle = self._sweep.bundle_of(params)
        step, metrics = known.step, known.metrics[known.step]
        ray.get(self._broker.adopt.remote(trial_id, params, bundle, step, metrics, known.reused_from))
        self._history.apply(
            {"event": "submitted", "trial_id": trial_id, "params": params, "bundle": bundle, "purpose": "search"}
        )
        self._history.apply({"event": "eval", "trial_id": trial_id, "step": step, "metrics": metrics})
        end = {"status": "finished", "steps": step, "train_seconds": 0.0, "reused_from": known.reused_from}
        self._history.apply({"event": "finished", "trial_id": trial_id, **end})

    # ---- what Tune tells

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A proposal has become a trial, or its driver is started again."""
        history = self._history.trials[trial.trial_id]
        is_new = trial.trial_id not in self._trials
        self._trials[trial.trial_id] = self._live[trial.trial_id] = trial
        rule = None
        if history.purpose == "search":
            rule = self._rule_of(trial)
            rule.on_trial_add(self._view(tune_controller, trial), trial)
        # Rungs and populations know from the journal who waits. HyperBand's brackets begin anew: all go on to the next
        # evaluation, and are compared there.
        if is_new and (not history.paused or isinstance(rule, _HyperBand)):
            self._ready[trial.trial_id] = trial

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Continue, pause or stop."""
        report = json.loads(result["report"])
        history = self._history.trials[trial.trial_id]
        is_repeated = report["step"] <= history.step
        self._note(trial, report)
        if report["max_steps"] is not None and report["step"] >= report["max_steps"]:
            return str(Decision.CONTINUE)  # its end is on its way
        if self.proposals.over_budget(planned=False):
            return self._stop(trial, _BUDGET_SPENT)
        if history.purpose == "confirm" or is_repeated:
            return str(Decision.CONTINUE)
        if self._gives_up is not None and (why := self._gives_up(history, self._history)) is not None:
            return self._stop(trial, why)
        decision = self._rule_of(trial).on_trial_result(self._view(tune_controller, trial), trial, result)
        if decision in (Decision.PAUSE, Decision.NOOP):
            history.paused = True
            ray.get(self._broker.pause.remote(trial.trial_id))
        return str(decision)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """The trial has ended by itself, or was stopped while it trained."""
        report = json.loads(result["report"])
        self._note(trial, report)
        self._end(trial, report["status"] or "stopped_early", report["seconds"])
        if self._history.trials[trial.trial_id].purpose == "search":
            self._rule_of(trial).on_trial_complete(self._view(tune_controller, trial), trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """The trial was ended while it waited."""
        history = self._history.trials[trial.trial_id]
        self._end(trial, "stopped_early", max(history.seconds.values(), default=0.0) + history.seconds_taken_over)
        if history.purpose == "search":
            self._rule_of(trial).on_trial_remove(self._view(tune_controller, trial), trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Its driver failed; Tune starts another, and calls `on_trial_add`."""

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The next to take a free slot."""
        self.is_running = True
        self._end_unwanted(tune_controller)
        self._give_up_hopeless(tune_controller)
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
                if isinstance(rule, _HyperBand):
                    rule.halve_unfilled(self._view_of_rule(tune_controller, rule))
        chosen = promoted or fresh if self._sweep.is_model_based else fresh or promoted
        if chosen is None and not self._num_active():
            # The searcher waits for results, and there will be none unless somebody goes on.
            last = (rule.last_promotion() for rule in self._rules.values() if isinstance(rule, _Asha))
            chosen = next((trial for trial in last if trial is not None), None)
        return None if chosen is None else self._begin(chosen)

    # ---- inside

    def _stop(self, trial: Trial, reason: str) -> str:
        """Tell the broker why, before it hears from Tune that the trial ends."""
        ray.get(self._broker.stop.remote(trial.trial_id, reason))
        return str(Decision.STOP)

    def _begin(self, trial: Trial) -> Trial:
        self._ready.pop(trial.trial_id, None)
        self._history.trials[trial.trial_id].paused = False
        if isinstance(rule := self._rules.get(self._bundle_of(trial)), _Asha):
            rule.begin(trial)
        return trial

    def _note(self, trial: Trial, report: dict[str, Any]) -> None:
        """Into the history, as the journal has it."""
        history = self._history.trials[trial.trial_id]
        history.max_steps, history.devices = report["max_steps"], report["devices"]
        if report["step"] > history.step and report["metrics"]:
            event = {"event": "eval", "trial_id": trial.trial_id, "step": report["step"]}
            self._history.apply(event | {"metrics": report["metrics"], "seconds": report["seconds"]})

    def _end(self, trial: Trial, status: str, seconds: float) -> None:
        step = self._history.trials[trial.trial_id].step
        event = {"event": "finished", "trial_id": trial.trial_id, "status": status}
        self._history.apply(event | {"steps": step, "train_seconds": seconds})
        self._ready.pop(trial.trial_id, None)
        self._live.pop(trial.trial_id, None)

    def _end_unwanted(self, controller: Any) -> None:
        """Those that train hear of their end from the broker; those that wait would be chosen once more before."""
        for trial_id in list(self.unwanted):
            if (trial := self._live.get(trial_id)) is not None and trial.status == Trial.PAUSED:
                controller.stop_trial(trial)

    def _give_up_hopeless(self, controller: Any) -> None:
        for rule in self._rules.values():
            if isinstance(rule, _Asha):
                for trial_id in rule.hopeless():
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
        """Whether there are fresh trials, proposed or not, to be tried before others are promoted."""
        return bool(self._ready) or not self.proposals.search_is_over

    def _num_active(self) -> int:
        return sum(trial.status in (Trial.PENDING, Trial.RUNNING) for trial in self._live.values())

    def _bundle_of(self, trial: Trial) -> str:
        return self._history.trials[trial.trial_id].bundle

    def _rule_of(self, trial: Trial) -> Rule:
        bundle = self._bundle_of(trial)
        if bundle not in self._rules:
            self._rules[bundle] = self._build(bundle)
        return self._rules[bundle]

    def _view(self, controller: Any, trial: Trial) -> Any:
        return self._view_of_rule(controller, self._rule_of(trial))

    def _view_of_rule(self, controller: Any, rule: Rule) -> Any:
        return _View(controller, lambda: [t for t in self._trials.values() if self._is_of(t, rule)])

    def _is_of(self, trial: Trial, rule: Rule) -> bool:
        history = self._history.trials[trial.trial_id]
        return history.purpose == "search" and self._rules.get(history.bundle) is rule

    def _build(self, bundle: str) -> Rule:
        sweep, scheduler = self._sweep, self._sweep.scheduler
        known = {"metric": sweep.metric, "mode": sweep.mode}
        earlier = [e for e in self._events if self._is_search_of(e["trial_id"], bundle)]
        match scheduler:
            case FifoConfig():
                return _Fifo()
            case AshaConfig():
                return _Asha(sweep, self._trials, earlier, self._history, self._more_to_come)
            case MedianConfig():
                rule = MedianStoppingRule(
                    time_attr="step",
                    **known,
                    grace_period=scheduler.grace_steps,
                    min_samples_required=scheduler.min_trials,
                )
                return _Median(rule, sweep.metric, earlier)
            case HyperBandConfig():
                # Tune's variant for BOHB waits until a bracket is filled; the plain one halves what is there.
                return _HyperBand(
                    time_attr="evaluation",
                    **known,
                    max_t=self.proposals.num_evaluations,
                    reduction_factor=scheduler.reduction_factor,
                )
            case PbtConfig():
                return _Pbt(scheduler, sweep, self._exploited, self._restored_population(bundle))
            case Pb2Config():
                return _pb2(scheduler, sweep, self._exploited, self._restored_population(bundle))

    def _is_search_of(self, trial_id: str, bundle: str) -> bool:
        trial = self._history.trials[trial_id]
        return trial.bundle == bundle and trial.purpose == "search"

    def _restored_population(self, bundle: str) -> dict[str, TrialHistory]:
        return {t.trial_id: t for t in self._history.trials.values() if t.bundle == bundle and t.metrics}

    def _exploited(self, trial: Trial, donor: Trial) -> None:
        """Tune has decided that a trial goes on from another's state, with the settings now in its config."""
        params = plain(trial.config)
        step = ray.get(self._broker.fork.remote(trial.trial_id, donor.trial_id, params))
        forked = {"event": "forked", "trial_id": trial.trial_id, "donor": donor.trial_id}
        self._history.apply(forked | {"step": step, "params": params})
        self._history.trials[trial.trial_id].paused = True
        _log.info("trial %s goes on from %s: %s", trial.trial_id, donor.trial_id, describe(params))


class Proposer(SearchAlgorithm):
    """Tune's search algorithm: proposals as Tune's trials, paused until the conductor gives them a turn."""

    def __init__(self, conductor: Conductor, num_trials: int) -> None:
        """Proposals for that conductor."""
        self._conductor, self._num_trials = conductor, num_trials
        self._spec: dict[str, Any] = {}
        self._parser: Any = None
        self.searcher = _NoSearcher()

    def __reduce__(self) -> Any:
        return (SearchAlgorithm, ())

    @property
    def total_samples(self) -> int:
        """Trials at most."""
        return self._num_trials

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Metric and mode are the sweep's."""
        return True

    def add_configurations(self, experiments: Any) -> None:
        """Called once by Tune with the experiment that trials belong to."""
        (experiment,) = experiments
        self._spec, self._parser = experiment.spec, _make_parser()

    def next_trial(self) -> Trial | None:
        """A trial, if one is wanted now."""
        proposals = self._conductor.proposals
        while not proposals.is_exhausted and self._conductor.wants_trial():
            proposal = proposals.next()
            if proposal is None:
                return None
            if proposal.known is not None:
                self._conductor.add_known(proposal.trial_id, proposal.params, proposal.known)
                continue
            if proposal.trial_id not in proposals.history.trials:
                bundle = proposals.sweep.bundle_of(proposal.params)
                event = {"event": "submitted", "trial_id": proposal.trial_id, "params": proposal.params}
                proposals.history.apply(event | {"bundle": bundle, "purpose": proposal.purpose})
                # Known before it has reported, so that its cost counts from the start.
                proposals.history.trials[proposal.trial_id].max_steps = proposals.max_steps
            trial = _create_trial_from_spec(
                {**self._spec, "config": dict(proposal.params)},
                self._parser,
                evaluated_params=proposal.params,
                experiment_tag=proposal.trial_id,
                trial_id=proposal.trial_id,
            )
            trial.init_local_path()  # which Tune asks for at the end, of a trial that had no turn too
            trial.status = Trial.PAUSED  # a pending one Tune would start by itself
            return trial
        return None

    def is_finished(self) -> bool:
        """Whether no more trials will come."""
        return self._conductor.proposals.is_exhausted

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The conductor has heard it."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The conductor has heard it."""

    def has_checkpoint(self, dirpath: str) -> bool:
        """The journal has it all."""
        return False

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        """The journal has it all."""

    def restore_from_dir(self, dirpath: str) -> None:
        """The journal has it all."""


class _NoSearcher:
    """HyperBandForBOHB tells a searcher of pauses, to free its places; proposals here do not count places."""

    def on_pause(self, trial_id: str) -> None:
        """Nothing to do."""

    def on_unpause(self, trial_id: str) -> None:
        """Nothing to do."""


class _View:
    """Tune's controller as one bundle's rule sees it: only its trials."""

    def __init__(self, controller: Any, trials: Callable[[], list[Trial]]) -> None:
        self._controller, self._mine = controller, trials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)

    def get_trials(self) -> list[Trial]:
        return self._mine()

    def get_live_trials(self) -> set[Trial]:
        return {trial for trial in self._mine() if not trial.is_finished()}


class _Fifo:
    """Every trial runs to its end."""

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        pass

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        return str(Decision.CONTINUE)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        pass

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        pass

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        return None


class _Asha:
    """`Rungs` for Tune."""

    def __init__(
        self,
        sweep: SweepConfig,
        trials: dict[str, Trial],
        events: list[dict[str, Any]],
        history: History,
        more_to_come: Callable[[], bool],
    ) -> None:
        self._sweep, self._trials, self._history = sweep, trials, history
        self._more_to_come = more_to_come
        self._rungs: Rungs | None = None
        self._answers: tuple[bool, str | None, list[str]] | None = None
        """(more to come, next promotion, hopeless ones), until something changes: Tune asks many times a second."""
        self._events = events
        if max_steps := next((e["max_steps"] for e in events if e["event"] == "started"), None):
            self._start(max_steps)

    def _start(self, max_steps: int) -> Rungs:
        """Learn again what the journal's trials had reported."""
        assert isinstance(self._sweep.scheduler, AshaConfig)
        scheduler = self._sweep.scheduler
        rungs = self._rungs = Rungs(
            scheduler.grace_steps,
            scheduler.reduction_factor,
            max_steps,
            self._sweep.mode,
            patient=not self._sweep.is_model_based,
        )
        for event in self._events:
            trial_id = event["trial_id"]
            if event["event"] in ("started", "log", "eval") and trial_id in rungs.waiting:
                rungs.promote(trial_id)  # it went on
            if event["event"] == "submitted":
                rungs.add(trial_id)
            elif event["event"] == "eval" and self._sweep.metric in event["metrics"]:
                rungs.report(trial_id, event["step"], event["metrics"][self._sweep.metric], more_to_come=True)
            elif event["event"] == "finished":
                rungs.remove(trial_id)
        for trial_id in rungs.waiting:
            self._history.trials[trial_id].paused = True  # a crash came between its evaluation and the word to pause
        self._events = []
        return rungs

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        if self._rungs is not None and trial.trial_id not in self._rungs.waiting:
            self._rungs.add(trial.trial_id)
            self._answers = None

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        rungs = self._rungs
        if rungs is None:
            rungs = self._start(json.loads(result["report"])["max_steps"])
            for other in controller.get_trials():
                rungs.add(other.trial_id)
        self._answers = None
        decision = rungs.report(trial.trial_id, result["step"], result[self._sweep.metric], self._more_to_come())
        return str(Decision.PAUSE if decision == "pause" else Decision.CONTINUE)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self.on_trial_remove(controller, trial)

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        if self._rungs is not None:
            self._rungs.remove(trial.trial_id)
            self._answers = None

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        chosen = self._ask()[1]
        trial = None if chosen is None else self._trials.get(chosen)
        # Tune is still writing its note of the pause; a moment later it is paused.
        return trial if trial is not None and trial.status == Trial.PAUSED else None

    def last_promotion(self) -> Trial | None:
        """Who would go on if no trial were to come."""
        chosen = None if self._rungs is None else self._rungs.next_promotion(more_to_come=False)
        trial = None if chosen is None else self._trials.get(chosen)
        return trial if trial is not None and trial.status == Trial.PAUSED else None

    def begin(self, trial: Trial) -> None:
        """The trial has been given a turn."""
        if self._rungs is not None and trial.trial_id in self._rungs.waiting:
            self._rungs.promote(trial.trial_id)
            self._answers = None

    def hopeless(self) -> list[str]:
        """See `Rungs.hopeless`; only trials that Tune has paused already."""
        return [name for name in self._ask()[2] if name in self._trials and self._trials[name].status == Trial.PAUSED]

    def _ask(self) -> tuple[bool, str | None, list[str]]:
        more = self._more_to_come()
        if self._answers is None or self._answers[0] != more:
            rungs = self._rungs
            promotion, hopeless = (None, []) if rungs is None else (rungs.next_promotion(more), rungs.hopeless(more))
            self._answers = (more, promotion, hopeless)
        return self._answers


class _Median(_Fifo):
    """Tune's median rule, which learns again what trials before a restart had reported."""

    def __init__(self, rule: MedianStoppingRule, metric: str, events: list[dict[str, Any]]) -> None:
        self._rule = rule
        self._earlier: dict[str, list[dict[str, Any]]] = {}
        for event in events:
            if event["event"] == "eval" and metric in event["metrics"]:
                result = {"step": event["step"], metric: event["metrics"][metric]}
                self._earlier.setdefault(event["trial_id"], []).append(result)

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        # Asked about a result, the rule may want to stop; told of an end, it only takes note.
        for result in self._earlier.pop(trial.trial_id, []):
            self._rule.on_trial_complete(controller, trial, result)

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        return str(self._rule.on_trial_result(controller, trial, result))

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._rule.on_trial_complete(controller, trial, result)


class _HyperBand(HyperBandForBOHB):
    """Tune's HyperBand. Brackets that the search left half filled are halved only when nothing else can be done."""

    def choose_trial_to_run(self, tune_controller: Any, allow_recurse: bool = True) -> Trial | None:
        """A trial of a bracket that has been halved."""
        for band in self._hyperbands:
            for bracket in band:
                for trial in bracket.current_trials() if bracket is not None else ():
                    if trial.status == Trial.PAUSED and trial in bracket.trials_to_unpause:
                        return trial
        return None

    def halve_unfilled(self, controller: Any) -> None:
        """No more trials will fill the brackets."""
        for band in self._hyperbands:
            for bracket in band:
                if bracket is not None and bracket.current_trials():
                    self._process_bracket(controller, bracket)


class _Population:
    """What population-based schedulers share: an exploit copies the donor's checkpoint, a restart is made up for."""

    _exploited: Callable[[Trial, Trial], None]
    _population: dict[str, TrialHistory]

    def _exploit(self, controller: Any, trial: Trial, donor: Trial) -> None:
        super()._exploit(controller, trial, donor)  # type: ignore[misc]
        self._exploited(trial, donor)

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        super().on_trial_add(controller, trial)  # type: ignore[misc]
        self._remember(trial)

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """Whoever is behind the next exchange. The last to come holds it; if that one has ended, there is none."""
        live = controller.get_live_trials()
        if live and all(t.status == Trial.PAUSED for t in live):
            behind = min(self._trial_state[t].last_train_time for t in live)  # type: ignore[attr-defined]
            while behind >= self._next_perturbation_sync:
                self._next_perturbation_sync += self._perturbation_interval  # type: ignore[attr-defined]
        chosen: Trial | None = super().choose_trial_to_run(controller)  # type: ignore[misc]
        return chosen

    def _remember(self, trial: Trial) -> None:
        """The state that a trial of a continued sweep had."""
        past = self._population.get(trial.trial_id)
        interval = self._perturbation_interval  # type: ignore[attr-defined]
        alive = [t.step for t in self._population.values() if t.status is None]
        if alive:
            self._next_perturbation_sync = (min(alive) // interval + 1) * interval
        if past is None or (value := past.value(self._metric)) is None:  # type: ignore[attr-defined]
            return
        state = self._trial_state[trial]  # type: ignore[attr-defined]
        state.last_score = self._metric_op * value  # type: ignore[attr-defined]
        state.last_train_time = past.step
        state.last_perturbation_time = past.step // interval * interval


class _Pbt(_Population, PopulationBasedTraining):
    """Tune's PBT, in step."""

    def __init__(
        self,
        scheduler: PbtConfig,
        sweep: SweepConfig,
        exploited: Callable[[Trial, Trial], None],
        population: dict[str, TrialHistory],
    ) -> None:
        from ray import tune

        random.seed(sweep.seed)  # Tune draws from the global generators
        np.random.seed(sweep.seed)
        ranges = {n: axis for n, axis in sweep.space.items() if isinstance(axis, Uniform | LogUniform)}
        mutations: dict[str, Any] = {
            name: (tune.loguniform if isinstance(axis, LogUniform) else tune.uniform)(axis.low, axis.high)
            for name, axis in ranges.items()
        }
        mutations |= {n: list(axis.values) for n, axis in sweep.space.items() if isinstance(axis, Choice)}

        def within(config: dict[str, Any]) -> dict[str, Any]:
            """A factor may lead out of an axis."""
            return config | {n: min(max(config[n], a.low), a.high) for n, a in ranges.items()}

        super().__init__(
            time_attr="step",
            metric=sweep.metric,
            mode=sweep.mode,
            perturbation_interval=scheduler.interval_steps,
            hyperparam_mutations=mutations,
            quantile_fraction=scheduler.quantile,
            resample_probability=scheduler.resample_probability,
            custom_explore_fn=within,
            log_config=False,
            synch=True,
        )
        self._exploited, self._population = exploited, population


@dataclass(frozen=True, slots=True)
class _Shown:
    """What PB2 sees of a trial."""

    name: str
    config: dict[str, Any]

    def __str__(self) -> str:
        return self.name


def _as_shown(config: dict[str, Any], axes: dict[str, Uniform | LogUniform]) -> dict[str, Any]:
    return config | {n: math.log(config[n]) for n, axis in axes.items() if isinstance(axis, LogUniform) and n in config}


def _drawn(axis: Uniform | LogUniform) -> float:
    if isinstance(axis, LogUniform):
        return math.exp(random.uniform(math.log(axis.low), math.log(axis.high)))
    return random.uniform(axis.low, axis.high)


def _pb2(
    scheduler: Pb2Config,
    sweep: SweepConfig,
    exploited: Callable[[Trial, Trial], None],
    population: dict[str, TrialHistory],
) -> Rule:
    """Tune's PB2, in step. Its libraries are loaded only for it."""
    from ray.tune.schedulers.pb2 import PB2

    axes = {n: axis for n, axis in sweep.space.items() if isinstance(axis, Uniform | LogUniform)}

    class Pb2(_Population, PB2):
        """It models what an evaluation gained over the one before: it is shown all of them, log axes as logarithms."""

        def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
            state, step = self._trial_state[trial], result["step"]
            if step - state.last_perturbation_time < self._perturbation_interval:
                self._save_trial_state(state, step, result, trial)  # PB2 itself notes only those at exchanges
            return str(super().on_trial_result(controller, trial, result))

        def _save_trial_state(self, state: Any, time: int, result: dict[str, Any], trial: Trial) -> None:
            super()._save_trial_state(state, time, result, _Shown(str(trial), _as_shown(trial.config, axes)))

        def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
            donor = _Shown(str(trial_to_clone), _as_shown(trial_to_clone.config, axes))
            shown, operations = super()._get_new_config(trial, donor)
            if all(shown[name] == donor.config[name] for name in axes):
                # Nothing is known of the donor's gain yet, and PB2 would run its settings twice.
                return trial_to_clone.config | {name: _drawn(axis) for name, axis in axes.items()}, operations
            return trial_to_clone.config | {
                name: min(
                    max(math.exp(shown[name]) if isinstance(axis, LogUniform) else shown[name], axis.low), axis.high
                )
                for name, axis in axes.items()
            }, operations

    random.seed(sweep.seed)
    np.random.seed(sweep.seed)
    rule = Pb2(
        time_attr="step",
        metric=sweep.metric,
        mode=sweep.mode,
        perturbation_interval=scheduler.interval_steps,
        hyperparam_bounds={n: [_as_shown({n: end}, axes)[n] for end in (a.low, a.high)] for n, a in axes.items()},
        quantile_fraction=scheduler.quantile,
        log_config=False,
        synch=True,
    )
    rule._exploited, rule._population = exploited, population
    return rule
