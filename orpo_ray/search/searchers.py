"""The searchers: each proposes the next setting, given the results of the trials so far.

Searchers are functions of the sweep's seed, the number of the proposal and the history, so that a killed sweep
continues as if it had not been killed. Only Optuna keeps state of its own, in a file that survives kills as the journal
does.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from orpo_ray.config import (
    METRIC_MODES,
    HyperOptConfig,
    LadderConfig,
    OptunaConfig,
    RandomConfig,
    SweepConfig,
)
from orpo_ray.config.space import Axis, Bundle, Choice, Grid, LogUniform, Uniform, grid_cells, to_optuna
from orpo_ray.errors import MissingExtraError
from orpo_ray.search.ladder import Ladder
from orpo_ray.search.searcher import Exhausted, Searcher, SearcherError, Size, trial_id_of
from orpo_ray.storage.events import Status
from orpo_ray.storage.sweep_state import SweepState, TrialState

OPTUNA_FILE = "optuna.journal"
_MAX_REPEATS = 50
"""After this many repeated proposals in a row, a space of discrete axes counts as exhausted."""


def build(sweep: SweepConfig, run_dir: Path, sizes: dict[str, Size], max_steps: int | None) -> Searcher:
    """The searcher that `sweep.searcher` names.

    Args:
        sweep: with its searcher.
        run_dir: where Optuna keeps its study.
        sizes: bundle label -> size; used only by searcher ladder.
        max_steps: of a whole trial; required by searcher ladder.

    Raises:
        MissingExtraError: its library is not installed.
        SearcherError: the ladder's trials have no length in steps.
        LadderError: all of a ladder's bundles have the same size.
    """
    match sweep.searcher:
        case RandomConfig():
            return RandomSearcher(sweep)
        case OptunaConfig():
            return OptunaSearcher(sweep, run_dir / OPTUNA_FILE)
        case HyperOptConfig():
            return HyperOptSearcher(sweep)
        case LadderConfig():
            parameters = {label: size.parameters for label, size in sizes.items()}
            devices = {label: size.devices for label, size in sizes.items()}
            if max_steps is None:
                raise SearcherError("searcher ladder plans its budget by the length of trials: set train.max_steps")
            return Ladder(sweep, parameters, devices, max_steps)


def key(params: dict[str, Any]) -> str:
    """Canonical text of the params: equal for equal settings."""
    return json.dumps(params, sort_keys=True, default=str)


def draw(axis: Axis, rng: np.random.Generator) -> Any:
    """A random value of an axis."""
    match axis:
        case Uniform():
            return float(rng.uniform(axis.low, axis.high))
        case LogUniform():
            return float(np.exp(rng.uniform(np.log(axis.low), np.log(axis.high))))
        case Grid() | Choice() | Bundle():
            candidates = axis.candidates()
            return candidates[int(rng.integers(len(candidates)))]


class RandomSearcher:
    """Cycles through the grid's cells and draws all other axes at random."""

    def __init__(self, sweep: SweepConfig) -> None:
        """Prepare `sweep.num_trials` proposals."""
        self._sweep = sweep
        self._cells = grid_cells(sweep.space)
        self._sampled = {n: axis for n, axis in sweep.space.items() if not isinstance(axis, Grid | Bundle)}

    def propose(self, index: int, history: SweepState) -> dict[str, Any] | None:
        """See `Searcher`."""
        if index >= self._sweep.num_trials:
            raise Exhausted(f"all {self._sweep.num_trials} trials have been proposed")
        cell = self._cells[index % len(self._cells)]
        rng = np.random.default_rng([self._sweep.seed, index])
        drawn = {name: draw(axis, rng) for name, axis in self._sampled.items()}
        return {name: (cell | drawn)[name] for name in self._sweep.space}


class OptunaSearcher:
    """Ask-and-tell interface to an Optuna study, kept in Optuna's own journal file."""

    def __init__(self, sweep: SweepConfig, path: Path) -> None:
        """Open the study in `path`, or create it."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        assert isinstance(sweep.searcher, OptunaConfig)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep, self._searcher = sweep, sweep.searcher
        self._metrics = sweep.searcher.objectives or (sweep.metric,)
        self._distributions = to_optuna(sweep.space)
        # An open-file lock is released when its owner dies; the default lock, a link, would survive a kill.
        backend = JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))
        self._study = optuna.create_study(
            storage=JournalStorage(backend),
            study_name="sweep",
            load_if_exists=True,
            directions=["maximize" if METRIC_MODES[m] == "max" else "minimize" for m in self._metrics],
        )
        self._study.sampler = self._sampler(seed=sweep.seed + len(self._study.get_trials(deepcopy=False)))

    def propose(self, index: int, history: SweepState) -> dict[str, Any] | None:
        """See `Searcher`."""
        from optuna.trial import TrialState

        if index >= self._sweep.num_samples:
            raise Exhausted(f"all {self._sweep.num_samples} trials have been proposed")
        self._update_study(history)
        tried = {key(trial.params): trial for trial in history.trials.values()}
        for _ in range(_MAX_REPEATS):
            trial = self._study.ask(self._distributions)
            params = {name: trial.params[name] for name in self._sweep.space}
            known = tried.get(key(params))
            if known is None:
                trial.set_user_attr("trial_id", trial_id_of(index))
                return params
            values = self._values(known, history)
            if values is None:
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                self._study.tell(trial, values)
        raise Exhausted(f"{_MAX_REPEATS} proposals in a row had been tried before: the space seems exhausted")

    def _update_study(self, history: SweepState) -> None:
        """Bring the study up to date: trials that ended, trials of a warm start, and trials lost in a crash."""
        import optuna
        from optuna.trial import TrialState

        known = set()
        for frozen in self._study.get_trials(deepcopy=False):
            trial_id = frozen.user_attrs.get("trial_id")
            known.add(trial_id)
            if frozen.state is not TrialState.RUNNING:
                continue
            ours = history.trials.get(trial_id) if trial_id else None
            if ours is None:
                self._study.tell(
                    frozen.number, state=TrialState.FAIL
                )  # a crash came before the proposed trial was submitted
            elif ours.status.has_ended:
                self._tell_result(frozen, ours, history)
        for trial_id, ours in history.trials.items():
            # Trials of a warm start, or of a sweep started by an earlier version.
            if trial_id in known or not ours.status.has_ended or (values := self._values(ours, history)) is None:
                continue
            if ours.purpose != "search" or set(self._distributions) - set(ours.params):
                continue
            self._study.add_trial(
                optuna.trial.create_trial(
                    params={name: ours.params[name] for name in self._distributions},
                    distributions=self._distributions,
                    values=values,
                    user_attrs={"trial_id": trial_id},
                )
            )

    def _tell_result(self, frozen: Any, ours: TrialState, history: SweepState) -> None:
        import optuna
        from optuna.trial import TrialState

        values = self._values(ours, history)
        if values is None:
            self._study.tell(frozen.number, state=TrialState.FAIL)
        elif ours.status is Status.STOPPED_EARLY and len(values) == 1:
            optuna.Trial(self._study, frozen._trial_id).report(values[0], ours.evaluated_step)
            self._study.tell(frozen.number, state=TrialState.PRUNED)
        else:
            self._study.tell(frozen.number, values)

    def _values(self, trial: TrialState, history: SweepState) -> list[float] | None:
        """One value per objective, for a diverged trial the worst of any trial; None if a value is missing."""
        values = [trial.value(metric) for metric in self._metrics]
        if trial.status is Status.DIVERGED:
            values = [worst(metric, history) for metric in self._metrics]
        return None if any(value is None for value in values) else [float(v) for v in values if v is not None]

    def _sampler(self, seed: int) -> Any:
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            match self._searcher.sampler:
                case "tpe":
                    # With `constant_liar`, pending trials count as bad, so that no two workers try similar settings.
                    return optuna.samplers.TPESampler(
                        seed=seed, n_startup_trials=self._searcher.startup_trials, constant_liar=True
                    )
                case "gp":
                    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=self._searcher.startup_trials)
                case "cmaes":
                    return optuna.samplers.CmaEsSampler(
                        seed=seed, n_startup_trials=self._searcher.startup_trials, warn_independent_sampling=False
                    )
                case "nsga2":
                    return optuna.samplers.NSGAIISampler(
                        seed=seed, population_size=max(self._searcher.startup_trials, 2)
                    )
                case "random":
                    return optuna.samplers.RandomSampler(seed=seed)


class HyperOptSearcher:
    """HyperOpt's TPE, over a table of results that is rebuilt for each proposal."""

    def __init__(self, sweep: SweepConfig) -> None:
        """Prepare `sweep.num_samples` proposals.

        Raises:
            MissingExtraError: hyperopt is not installed.
        """
        try:
            from hyperopt import Domain, hp
        except ImportError as error:
            raise MissingExtraError("searcher hyperopt needs its library: pip install 'orpo-ray[hyperopt]'") from error

        def convert(name: str, axis: Axis) -> Any:
            match axis:
                case Uniform():
                    return hp.uniform(name, axis.low, axis.high)
                case LogUniform():
                    return hp.loguniform(name, math.log(axis.low), math.log(axis.high))
                case Grid() | Choice() | Bundle():
                    return hp.choice(name, list(range(len(axis.candidates()))))

        assert isinstance(sweep.searcher, HyperOptConfig)
        self._sweep, self._startup = sweep, sweep.searcher.startup_trials
        self._domain = Domain(lambda _: 0.0, {name: convert(name, axis) for name, axis in sweep.space.items()})

    def propose(self, index: int, history: SweepState) -> dict[str, Any] | None:
        """See `Searcher`."""
        import hyperopt

        if index >= self._sweep.num_samples:
            raise Exhausted(f"all {self._sweep.num_samples} trials have been proposed")
        table, documents = hyperopt.Trials(), []
        sign = -1.0 if self._sweep.mode == "max" else 1.0
        observed = list(observations(self._sweep, history))
        for number, (params, value) in enumerate(observed):
            values = {name: [self._encode(name, params[name])] for name in self._sweep.space}
            misc = {
                "tid": number,
                "cmd": ("domain_attachment", "FMinIter_Domain"),
                "idxs": {name: [number] for name in values},
                "vals": values,
            }
            result = {"status": hyperopt.STATUS_OK, "loss": sign * value}
            (document,) = table.new_trial_docs([number], [None], [result], [misc])
            document["state"] = hyperopt.JOB_STATE_DONE
            documents.append(document)
        table.insert_trial_docs(documents)
        table.refresh()
        tried = {key(trial.params) for trial in history.trials.values()}
        for attempt in range(_MAX_REPEATS):
            # The seed depends only on the proposal's number, so that a restart proposes the same.
            seed = int(np.random.default_rng([self._sweep.seed, index, attempt]).integers(2**31))
            (document,) = hyperopt.tpe.suggest([len(observed)], self._domain, table, seed, n_startup_jobs=self._startup)
            values = document["misc"]["vals"]
            params = {name: self._decode(name, values[name][0]) for name in self._sweep.space}
            if key(params) not in tried:
                return params
        raise Exhausted(f"{_MAX_REPEATS} proposals in a row had been tried before: the space seems exhausted")

    def _encode(self, name: str, value: Any) -> Any:
        axis = self._sweep.space[name]
        return value if isinstance(axis, Uniform | LogUniform) else axis.candidates().index(value)

    def _decode(self, name: str, value: Any) -> Any:
        axis = self._sweep.space[name]
        return float(value) if isinstance(axis, Uniform | LogUniform) else axis.candidates()[int(value)]


def observations(sweep: SweepConfig, history: SweepState) -> Iterable[tuple[dict[str, Any], float]]:
    """(params, metric) of each ended trial; a diverged one gets the worst metric of any trial."""
    for trial in history.trials.values():
        if not trial.status.has_ended or trial.purpose != "search" or set(sweep.space) - set(trial.params):
            continue
        value = worst(sweep.metric, history) if trial.status is Status.DIVERGED else trial.value(sweep.metric)
        if value is not None:
            yield {name: trial.params[name] for name in sweep.space}, value


def worst(metric: str, history: SweepState) -> float | None:
    """The worst final value of trials that neither failed nor diverged; None if there is none."""
    values = [v for t in history.trials.values() if not t.status.is_lost and (v := t.value(metric)) is not None]
    if not values:
        return None
    return min(values) if METRIC_MODES[metric] == "max" else max(values)
