"""Ways to search that `benchmarks.search_quality` compares, and the discrete-event simulator that drives them.

All draw from the same space. Baselines decide by the classes that a user would run: Optuna's TPESampler and Ray Tune's
AsyncHyperBandScheduler, one for each size, told what Ray Tune's OptunaSearch would tell (a stopped trial's last value).
Ours are `orpo_ray.search.ladder.Ladder` and `orpo_ray.search.asha.Rungs`, fed by a journal's events as in a sweep.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import numpy as np

from benchmarks.surfaces import EVAL_EVERY, LAMBDA, LARGEST, LR, LR_HIGH, LR_LOW, MAX_STEPS, PARAMETERS, SIZE, Surface
from orpo_ray.config import SweepConfig
from orpo_ray.search.asha import Rungs
from orpo_ray.search.ladder import Ladder
from orpo_ray.search.searcher import Exhausted
from orpo_ray.storage.events import Evaluated, Finished, Paused, Started, Status, Submitted
from orpo_ray.storage.sweep_state import SweepState, TrialState

METRIC = "eval/preference_accuracy"
DEVICES = 4
GRACE_STEPS, REDUCTION_FACTOR = 10, 3.0
STARTUP_TRIALS = 10
"""Of TPE, Optuna's default."""
_DIVERGES_WITHIN = MAX_STEPS // 4

Decision = Literal["continue", "pause", "stop"]


@dataclass(frozen=True, slots=True)
class Start:
    """Begin a trial."""

    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on with a paused one."""

    trial_id: str


class Method(Protocol):
    """A searcher with its scheduler."""

    def next(self, history: SweepState) -> Start | Resume | None:
        """What a free device should do; None: nothing, until another trial has reported."""

    def evaluated(self, trial: TrialState, history: SweepState) -> Decision:
        """After each evaluation but the last."""

    def ended(self, trial: TrialState) -> None:
        """It has finished, diverged or been stopped."""


@dataclass(slots=True)
class Run:
    """A simulated sweep."""

    incumbents: list[tuple[float, float, float]] = field(default_factory=list)
    """(device-hours, hours on the clock, quality) whenever the best finished trial changed."""
    device_hours: float = 0.0
    trials: int = 0
    hours_by_size: dict[str, float] = field(default_factory=dict)

    def reaches(self, quality: float) -> float:
        """Device-hours until the incumbent first had that quality; infinite if it never had."""
        return next((hours for hours, _, q in self.incumbents if q >= quality), math.inf)

    def quality_at(self, device_hours: float) -> float:
        """Of the incumbent then; 0, a median random setting's, before the first."""
        return next((q for hours, _, q in reversed(self.incumbents) if hours <= device_hours), 0.0)


def simulate(surface: Surface, method: Method, budget_hours: float) -> Run:
    """Run `DEVICES` devices, one trial each, until the budget is spent or the method has nothing more to do.

    The incumbent is the finished trial of the best measured value, of any size; its quality is noise-free.
    """
    history, run = SweepState(), Run()
    queue: list[tuple[float, int, str]] = []  # (when, order, trial) of the next evaluation
    paces: dict[str, float] = {}
    fatal: dict[str, int] = {}
    trained: dict[str, float] = {}
    now, best = 0.0, -math.inf

    def spend(until: float) -> None:
        nonlocal now
        run.device_hours += len(queue) * (until - now) / 3600.0
        now = until

    def schedule(trial_id: str) -> None:
        trial = history.trials[trial_id]
        steps = min(EVAL_EVERY, MAX_STEPS - trial.evaluated_step)
        if trial.evaluated_step < fatal.get(trial_id, 0) <= trial.evaluated_step + steps:
            steps = fatal[trial_id] - trial.evaluated_step
        heapq.heappush(queue, (now + steps * paces[trial_id], len(history.trials), trial_id))

    def start(trial_id: str) -> None:
        step = history.trials[trial_id].evaluated_step
        history.apply(Started(trial_id=trial_id, attempt=0, group=None, step=step, max_steps=MAX_STEPS))

    def end(trial: TrialState, status: Status, step: int, seconds: float) -> None:
        history.apply(Finished(trial_id=trial.trial_id, status=status, steps=step, train_seconds=seconds))
        method.ended(trial)

    while True:
        while len(queue) < DEVICES:
            action = method.next(history)
            if action is None:
                break
            if isinstance(action, Resume):
                start(action.trial_id)
                schedule(action.trial_id)
                continue
            number = len(history.trials)
            trial_id, size = f"t{number:04d}", action.params[SIZE]
            history.apply(Submitted(trial_id=trial_id, params=action.params, bundle=size))
            start(trial_id)
            rng = np.random.default_rng([surface.seed, 3, number])
            paces[trial_id] = surface.step_seconds(size) * float(np.exp(0.05 * rng.standard_normal()))
            trained[trial_id] = 0.0
            if surface.diverges(action.params):
                fatal[trial_id] = int(rng.integers(1, _DIVERGES_WITHIN + 1))
            schedule(trial_id)
        if not queue:
            break
        when, _, trial_id = queue[0]
        before = run.device_hours
        spend(when)
        heapq.heappop(queue)
        trial = history.trials[trial_id]
        step = min(trial.step + EVAL_EVERY, MAX_STEPS)
        step = fatal[trial_id] if trial.step < fatal.get(trial_id, 0) <= step else step
        trained[trial_id] += (step - trial.evaluated_step) * paces[trial_id]
        size = trial.params[SIZE]
        run.hours_by_size[size] = (
            run.hours_by_size.get(size, 0.0) + (step - trial.evaluated_step) * paces[trial_id] / 3600.0
        )
        if run.device_hours > budget_hours:
            run.device_hours = max(before, budget_hours)
            break
        if step == fatal.get(trial_id):
            end(trial, Status.DIVERGED, step, trained[trial_id])
            continue
        value = surface.observed(trial.params, int(trial_id[1:]), step)
        found = {METRIC: value}
        history.apply(Evaluated(trial_id=trial_id, step=step, metrics=found, seconds=trained[trial_id]))
        if step == MAX_STEPS:
            end(trial, Status.FINISHED, step, trained[trial_id])
            if value > best:
                best = value
                run.incumbents.append((run.device_hours, now / 3600.0, surface.quality(trial.params)))
            continue
        decision = method.evaluated(trial, history)
        if decision == "continue":
            schedule(trial_id)
        elif decision == "pause":
            history.apply(Paused(trial_id=trial_id, step=step))
        else:
            end(trial, Status.STOPPED_EARLY, step, trained[trial_id])
    run.trials = len(history.trials)
    return run


def space(sizes: list[str]) -> dict[str, Any]:
    """The search space, as a sweep's section."""
    return {
        LAMBDA: {"type": "uniform", "low": 0.0, "high": 1.0},
        LR: {"type": "loguniform", "low": LR_LOW, "high": LR_HIGH},
        SIZE: {"type": "bundle", "values": {label: {"model.path": label} for label in sizes}},
    }


class Baseline:
    """Random or TPE's proposals, with or without Ray Tune's ASHA for each size; neither ever waits."""

    def __init__(self, seed: int, *, tpe: bool, asha: bool, sizes: list[str]) -> None:
        """`sizes`: all of them, or the largest alone."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if tpe:
            sampler: Any = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        else:
            sampler = optuna.samplers.RandomSampler(seed=seed)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._sizes = sizes
        self._asked: list[Any] = []
        self._schedulers: dict[str, Any] = {}
        if asha:
            from ray.tune.schedulers import AsyncHyperBandScheduler

            for size in sizes:
                self._schedulers[size] = AsyncHyperBandScheduler(
                    time_attr="step",
                    metric=METRIC,
                    mode="max",
                    max_t=MAX_STEPS,
                    grace_period=GRACE_STEPS,
                    reduction_factor=REDUCTION_FACTOR,
                )

    def next(self, history: SweepState) -> Start:
        """A fresh trial."""
        trial = self._study.ask()
        params = {LAMBDA: trial.suggest_float(LAMBDA, 0.0, 1.0), LR: trial.suggest_float(LR, LR_LOW, LR_HIGH, log=True)}
        params[SIZE] = trial.suggest_categorical(SIZE, self._sizes) if len(self._sizes) > 1 else self._sizes[0]
        self._asked.append(trial)
        if self._schedulers:
            stand_in = SimpleNamespace(trial_id=f"t{len(history.trials):04d}")
            self._schedulers[params[SIZE]].on_trial_add(None, stand_in)
        return Start(params)

    def evaluated(self, trial: TrialState, history: SweepState) -> Decision:
        """As Ray Tune's ASHA decides."""
        if not self._schedulers:
            return "continue"
        result = {"step": trial.step, METRIC: trial.metrics[trial.step][METRIC]}
        stand_in = SimpleNamespace(trial_id=trial.trial_id)
        decision = self._schedulers[trial.bundle].on_trial_result(None, stand_in, result)
        return "stop" if decision == "STOP" else "continue"

    def ended(self, trial: TrialState) -> None:
        """Tell the sampler; a diverged trial counts as accuracy 0, the worst there is."""
        value = trial.last_metrics[METRIC] if trial.metrics and not trial.status.is_lost else 0.0
        self._study.tell(self._asked[int(trial.trial_id[1:])], value)
        if self._schedulers and trial.status == "finished":
            result = {"step": trial.step, METRIC: value}
            self._schedulers[trial.bundle].on_trial_complete(None, SimpleNamespace(trial_id=trial.trial_id), result)


class Ours:
    """The ladder, with rungs within each size or without."""

    def __init__(self, seed: int, budget_hours: float, *, rungs: bool) -> None:
        """`budget_hours`: the sweep's budget, which the ladder plans with."""
        sweep = SweepConfig.model_validate(
            {
                "metric": METRIC,
                "seed": seed,
                "num_samples": 1000,
                "searcher": {"type": "ladder"},
                "budget": {"device_hours": budget_hours},
                "space": space(list(PARAMETERS)),
            }
        )
        self.ladder = Ladder(sweep, PARAMETERS, dict.fromkeys(PARAMETERS, 1), MAX_STEPS)
        self._rungs: dict[str, Rungs] = {}
        if rungs:
            self._rungs = {
                s: Rungs(GRACE_STEPS, REDUCTION_FACTOR, MAX_STEPS, "max", depth_last=False) for s in PARAMETERS
            }
        self._more_to_come = True

    def next(self, history: SweepState) -> Start | Resume | None:
        """A promotion if one is due, else a proposal; where the ladder has none, whoever is best of those that wait."""
        promoted = self._promotion(more_to_come=True)
        if promoted is not None:
            return promoted
        if self._more_to_come:
            try:
                params = self.ladder.propose(len(history.trials), history)
            except Exhausted:
                self._more_to_come = False
            else:
                if params is not None:
                    if self._rungs:
                        self._rungs[params[SIZE]].add(f"t{len(history.trials):04d}")
                    return Start(params)
                if any(t.status is None and not t.paused for t in history.trials.values()):
                    return None
        return self._promotion(more_to_come=False)

    def evaluated(self, trial: TrialState, history: SweepState) -> Decision:
        """The ladder may give a trial up; rungs may pause it."""
        if self.ladder.reason_to_stop(trial, history) is not None:
            return "stop"
        if not self._rungs:
            return "continue"
        value = trial.metrics[trial.step][METRIC]
        decision = self._rungs[trial.bundle].report(trial.trial_id, trial.step, value, self._more_to_come)
        return "pause" if decision == "pause" else "continue"

    def ended(self, trial: TrialState) -> None:
        """Nothing but the rungs needs to know."""
        if self._rungs:
            self._rungs[trial.bundle].remove(trial.trial_id)

    def _promotion(self, *, more_to_come: bool) -> Resume | None:
        for size in reversed(PARAMETERS):
            if size in self._rungs:
                trial_id = self._rungs[size].next_promotion(more_to_come)
                if trial_id is not None:
                    self._rungs[size].promote(trial_id)
                    return Resume(trial_id)
        return None


LARGEST_ONLY = [LARGEST]
METHODS = {
    "random": lambda seed, budget: Baseline(seed, tpe=False, asha=False, sizes=list(PARAMETERS)),
    "asha": lambda seed, budget: Baseline(seed, tpe=False, asha=True, sizes=list(PARAMETERS)),
    "tpe": lambda seed, budget: Baseline(seed, tpe=True, asha=False, sizes=list(PARAMETERS)),
    "asha + tpe": lambda seed, budget: Baseline(seed, tpe=True, asha=True, sizes=list(PARAMETERS)),
    "random, largest only": lambda seed, budget: Baseline(seed, tpe=False, asha=False, sizes=LARGEST_ONLY),
    "asha, largest only": lambda seed, budget: Baseline(seed, tpe=False, asha=True, sizes=LARGEST_ONLY),
    "tpe, largest only": lambda seed, budget: Baseline(seed, tpe=True, asha=False, sizes=LARGEST_ONLY),
    "asha + tpe, largest only": lambda seed, budget: Baseline(seed, tpe=True, asha=True, sizes=LARGEST_ONLY),
    "ladder": lambda seed, budget: Ours(seed, budget, rungs=False),
    "ladder + rungs": lambda seed, budget: Ours(seed, budget, rungs=True),
}
"""Name -> how it is made, from a seed and the budget in device-hours."""
