"""Model size as a fidelity: small models' trials propose and prune for large ones, within a budget of device-hours.

The next trial is the one that tells most about the best value of the largest size per device-second: multi-fidelity
max-value entropy search (Takeno et al. 2020, arXiv 1901.08275) on the process of `search.surrogate`, whose learned
length scale over size says what sizes have in common. Where they have nothing in common a small model tells nothing,
however cheap it is, and the largest is searched directly.

A trial in training is given up by its own curve against curves of its own size alone: that a small model was ahead at
an equal step is no reason, because a larger model often is slower at first and better at the end. No Ray, no torch.

Shape suffixes: N settings or evaluations, D axes, C candidates, K draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, qmc
from scipy.stats import t as student_t

from orpo_ray.config import LadderConfig, SweepConfig
from orpo_ray.config.space import LogUniform, Uniform
from orpo_ray.errors import UserError
from orpo_ray.planning.cost import CostModel
from orpo_ray.search.searcher import Exhausted
from orpo_ray.search.surrogate import (
    Array,
    Expected,
    Places,
    Surrogate,
    information,
    size_coordinate,
    step_coordinate,
    winsorised,
)
from orpo_ray.storage.events import Status
from orpo_ray.storage.sweep_state import SweepState, TrialState

GIVE_UP_BELOW = 0.05
"""A trial goes on while its chance of beating the best of its size is at least this."""
MIN_CURVES = 3
"""Finished trials of a size before its trials are judged by their curves."""
HOPELESS_BELOW = 0.05
"""A setting is not started at the largest size where its chance of beating the setting that is expected to be the best
there is below this."""
RESERVED_TRIALS = 2
"""Whole trials of the largest size for which smaller ones leave the budget."""
MIN_SIZES = 2
"""Sizes with a finished trial before another one is predicted."""
TOLD_BELOW = 0.8
"""A size is predicted where the posterior standard deviation of what the best setting gains over an average one is at
most this share of the prior's."""
LEARNT_BELOW = 1e-3
"""Nats about the best value of the largest size; a search ends when no trial would tell more."""
_SMALL_TRIALS, _SMALL_RATIO = 0.75, 0.3
"""Smaller sizes together may take so many whole trials of the largest size, and this share of what that one takes."""
_TRIALS_PER_LANE = 3
"""One trial of the largest size trains at a time, and one more for every so many that have finished."""
_NUM_RANDOM, _NUM_CENTRES, _NUM_NEAR, _NEAR = 192, 4, 64, 0.06
"""Candidates: spread out, and around the most promising of those, this far (of an axis' range)."""
_NUM_BEST, _NUM_DRAWS = 64, 16
_CURVE_SHARES = (0.125, 0.25, 0.5)
"""Shares of a trial's length at which its curve is kept for the process, besides its last evaluation."""


@dataclass(frozen=True, slots=True)
class _Evaluations:
    """What the process is fitted to."""

    places: Places
    value_N: Array
    """Higher is better, its low tail cut."""
    last_N: np.ndarray[Any, Any]
    """Whether it is its trial's last."""
    ended_N: np.ndarray[Any, Any]
    """Whether its trial has ended."""


class LadderError(UserError, ValueError):
    """The ladder cannot plan within its budget; the message says what to change."""


class Ladder:
    """Proposes settings and sizes, and says which trials to give up. Every answer is a function of the history."""

    def __init__(self, sweep: SweepConfig, parameters: dict[str, int], devices: dict[str, int], max_steps: int) -> None:
        """Prepare the search.

        Args:
            sweep: with searcher `ladder`, a budget, a bundle axis and continuous axes.
            parameters: of the model, by bundle label.
            devices: workers of a trial, by bundle label.
            max_steps: optimizer steps of a whole trial.

        Raises:
            ValueError: the sweep lacks one of these, or all bundles have the same size.
        """
        if not isinstance(sweep.searcher, LadderConfig) or sweep.budget is None or sweep.bundle_axis is None:
            raise ValueError("a ladder needs searcher ladder, sweep.budget and a bundle axis whose labels are sizes")
        if len(set(parameters.values())) < MIN_SIZES:
            raise LadderError(
                f"a ladder needs bundles of at least two sizes, but all have {next(iter(parameters.values()))} "
                "parameters; use searcher optuna for one size"
            )
        self._sweep, self._budget = sweep, sweep.budget.device_hours
        self._startup = sweep.searcher.startup_trials
        self._axis = sweep.bundle_axis
        self._axes = {name: axis for name, axis in sweep.space.items() if isinstance(axis, Uniform | LogUniform)}
        self._cost = CostModel(parameters, devices)
        self._parameters = parameters
        self._max_steps = max_steps
        self._sizes = sorted(parameters, key=lambda label: parameters[label])
        self._largest = self._sizes[-1]
        self._coordinate = {b: size_coordinate(parameters[b], parameters[self._largest]) for b in self._sizes}
        self._sign = 1.0 if sweep.mode == "max" else -1.0
        sobol = qmc.Sobol(len(self._axes), rng=np.random.default_rng(sweep.seed))
        self._spread_ND = sobol.random(max(64, 2 ** math.ceil(math.log2(self._startup))))
        self._fitted: tuple[bytes, Surrogate] | None = None

    def propose(self, index: int, history: SweepState) -> dict[str, Any] | None:
        """The next trial's params, the bundle axis among them; None: wait, a trial in training will tell more.

        None is returned only while a trial is in training.

        Args:
            index: number of the trial to propose, from 0.
            history: of all trials before.

        Raises:
            Exhausted: the budget does not pay for another trial, `num_samples` is reached, or nothing is left to learn.
            ValueError: the budget does not pay for one trial of the largest size.
        """
        if index >= self._sweep.num_samples:
            raise Exhausted(f"sweep.num_samples ({self._sweep.num_samples}) trials have been proposed")
        affordable = self._affordable(history)
        if not affordable:
            return None
        data = self._evaluations(history)
        if index < self._startup or not len(data.places):
            if index >= self._startup and _running(history):
                return None
            return self._params(self._spread_ND[index % len(self._spread_ND)], self._sizes[0])
        worthwhile = self._within_share(history, affordable)
        return self._choose(index, history, data, worthwhile) if worthwhile else None

    def gives_up(self, trial: TrialState, history: SweepState) -> str | None:
        """Why a trial should be stopped at its last evaluation; None: it should go on.

        The rest of its curve is predicted from what the finished trials of its size gained from this step on: their
        mean, with Student's t (the predictive distribution of a further normal draw). No other size is looked at.
        """
        metric, step = self._sweep.metric, trial.evaluated_step
        value = trial.value(metric)
        if value is None or not step or trial.purpose == "confirm":
            return None
        gains, finals = [], []
        for other in history.trials.values():
            if other.bundle == trial.bundle and other.status is Status.FINISHED and other.trial_id != trial.trial_id:
                final, here = other.value(metric), other.metrics.get(step, {}).get(metric, math.nan)
                if final is not None:
                    finals.append(self._sign * final)
                    gains += [self._sign * (final - here)] if math.isfinite(here) else []
        if len(gains) < MIN_CURVES:
            return None
        n, best = len(gains), max(finals)
        expected = self._sign * value + float(np.mean(gains))
        scale = max(float(np.std(gains, ddof=1)) * math.sqrt(1 + 1 / n), 1e-12)
        chance = float(student_t.sf((best - expected) / scale, n - 1))
        if chance >= GIVE_UP_BELOW:
            return None
        return (
            f"{metric} is {value:.4g} at step {step}; by the curves of {n} finished trials of {trial.bundle} it will "
            f"end at {self._sign * expected:.4g}, with a chance of {chance:.1%} to beat the best, "
            f"{self._sign * best:.4g}"
        )

    def expectations(self, history: SweepState) -> list[dict[str, Any]]:
        """What to expect of every size, smallest first.

        Returns:
            Per size `bundle`, `parameters`, `finished` (trials), `status` (`measured`: a trial has finished there;
            `predicted`; `cannot tell`), `params` (the setting expected to be best), `mean`, `std` and `interval`
            (95 %) of its metric over seeds, all None where the data cannot tell, `narrowed` (posterior over prior
            standard deviation of what that setting gains over an average one) and `says`, a sentence.
        """
        data = self._evaluations(history)
        finished = {
            b: sum(t.bundle == b and t.status is Status.FINISHED for t in history.trials.values()) for b in self._sizes
        }
        surrogate = self._surrogate(data) if len(data.places) else None
        return [self._expectation(bundle, finished, surrogate) for bundle in self._sizes]

    def _expectation(self, bundle: str, finished: dict[str, int], surrogate: Surrogate | None) -> dict[str, Any]:
        known = [b for b in self._sizes if finished[b]]
        entry: dict[str, Any] = {
            "bundle": bundle,
            "parameters": self._parameters[bundle],
            "finished": finished[bundle],
            "status": "cannot tell",
            **dict.fromkeys(("params", "mean", "std", "interval", "narrowed")),
        }
        if surrogate is None or (not finished[bundle] and len(known) < MIN_SIZES):
            says = f"{len(known)} sizes have a finished trial; {MIN_SIZES} are needed to say anything about another"
            return entry | {"says": f"{bundle}: cannot tell. {says}."}
        candidate_ND = self._candidates(np.random.default_rng(self._sweep.seed), surrogate, bundle)
        expected = surrogate.at(self._ends(candidate_ND, bundle))
        where = int(np.argmax(expected.mean_M))
        mean, std = float(expected.mean_M[where]), float(expected.std_M[where])
        narrowed = self._narrowed(surrogate, candidate_ND[where], bundle)
        shared = surrogate.correlation_over_size(
            min((abs(self._coordinate[b] - self._coordinate[bundle]) for b in known if b != bundle), default=0.0)
        )
        entry["narrowed"] = narrowed
        if not finished[bundle] and narrowed > TOLD_BELOW:
            return entry | {
                "says": f"{bundle}: cannot tell. What is known of {', '.join(known)} leaves {narrowed:.0%} of the "
                f"prior uncertainty about which setting is best (a prediction needs {TOLD_BELOW:.0%} or less); "
                f"a setting's effect there and here is correlated by {shared:.2f}."
            }
        status = "measured" if finished[bundle] else "predicted"
        centre = self._sign * mean
        interval = [centre - 1.96 * std, centre + 1.96 * std]
        params = {name: v for name, v in self._params(candidate_ND[where], bundle).items() if name != self._axis}
        setting = ", ".join(f"{name}={value:.3g}" for name, value in params.items())
        found = {"params": params, "mean": centre, "std": std, "interval": interval, "status": status}
        says = f"{bundle}: {status}. Best expected at {setting}: {self._sweep.metric} {centre:.4g} ± {1.96 * std:.2g}."
        return entry | found | {"says": says}

    def _narrowed(self, surrogate: Surrogate, x_D: Array, bundle: str) -> float:
        """Posterior over prior standard deviation of a setting's value less the average over spread-out settings.

        A difference, because what all settings of a size have in common may well be unknown where it does not matter.
        """
        places = self._ends(np.concatenate([x_D[None], self._spread_ND]), bundle)
        weight_N = np.full(len(places), -1.0 / len(self._spread_ND))
        weight_N[0] = 1.0
        there = surrogate.at(places)
        posterior = float(weight_N @ surrogate.covariance(there, there) @ weight_N)
        prior = float(weight_N @ surrogate.prior_covariance(places) @ weight_N)
        return math.sqrt(max(posterior, 0.0) / prior)

    def _affordable(self, history: SweepState) -> dict[str, float]:
        """Bundle -> expected device-seconds, of those that a trial may be started of; empty: wait."""
        costs = {b: self._cost.device_seconds(b, self._max_steps, history) for b in self._sizes}
        largest = costs[self._largest]
        if largest is None:
            return {self._sizes[0]: 1.0}  # nothing has reported yet: only the cheapest is started
        hours = largest.seconds / 3600.0
        if hours > self._budget and (largest.measured or largest.num_sizes >= MIN_SIZES):
            raise LadderError(
                f"a trial of {self._largest} takes about {hours:.3g} device-hours, and sweep.budget.device_hours is "
                f"{self._budget:g}: raise it, shorten trials, or drop that size"
            )
        left = self._cost.remaining(history, self._budget)
        whole = self._num_finished(history, self._largest)
        whole += sum(t.bundle == self._largest for t in _running(history))
        reserved = hours * max(RESERVED_TRIALS - whole, 0)
        found = {}
        for bundle, cost in costs.items():
            assert cost is not None
            if cost.seconds / 3600.0 <= left.free - (0.0 if bundle == self._largest else reserved):
                found[bundle] = cost.seconds
        if not found and not _running(history):
            raise Exhausted(
                f"{left.spent:.3g} of {self._budget:g} device-hours are spent, and the rest does not pay for another "
                "trial"
            )
        return found

    def _within_share(self, history: SweepState, affordable: dict[str, float]) -> dict[str, float]:
        """Without the smaller sizes once they have had their share; empty: wait for the largest one in training."""
        step_seconds = {}
        for bundle in self._sizes:
            cost = self._cost.device_seconds(bundle, 1, history)
            assert cost is not None
            step_seconds[bundle] = cost.seconds
        used = dict.fromkeys(self._sizes, 0.0)
        for trial in history.trials.values():
            used[trial.bundle] += trial.device_seconds
        for trial in _running(history):
            used[trial.bundle] += step_seconds[trial.bundle] * (self._max_steps - trial.evaluated_step)
        small = sum(seconds for bundle, seconds in used.items() if bundle != self._largest)
        share = _SMALL_TRIALS * step_seconds[self._largest] * self._max_steps + _SMALL_RATIO * used[self._largest]
        found = {b: seconds for b, seconds in affordable.items() if b == self._largest or small + seconds <= share}
        if self._lanes_are_full(history) and set(found) == {self._largest}:
            return {}
        return found if found or _running(history) else affordable

    def _lanes_are_full(self, history: SweepState) -> bool:
        """Whether another trial of the largest size should wait for what those in training will say."""
        running = sum(t.bundle == self._largest for t in _running(history))
        finished = self._num_finished(history, self._largest)
        return running >= 1 + finished // _TRIALS_PER_LANE

    def _choose(
        self, index: int, history: SweepState, data: _Evaluations, affordable: dict[str, float]
    ) -> dict[str, Any] | None:
        """The setting and size that tell most per device-second, the ends of running trials taken as expected."""
        rng = np.random.default_rng([self._sweep.seed, index])
        believed = self._surrogate(data).with_pending(self._pending(history))
        candidate_ND = self._candidates(rng, believed, self._largest)
        target = believed.at(self._ends(candidate_ND, self._largest))
        best_K = self._best_draws(rng, believed, target)
        gamma_KC = (best_K[:, None] - target.mean_M) / target.std_M
        choices = []
        for bundle, seconds in affordable.items():
            seen = target if bundle == self._largest else believed.at(self._ends(candidate_ND, bundle))
            rho_C = believed.paired(target, seen) / (target.std_M * np.hypot(seen.std_M, believed.noise_std))
            told_C = information(np.broadcast_to(rho_C, gamma_KC.shape), gamma_KC).mean(0)
            if bundle == self._largest:
                lead = (target.mean_M.max() - target.mean_M) / target.std_M
                told_C = np.where(norm.sf(lead) < HOPELESS_BELOW, -1.0, told_C)
            where = int(np.argmax(told_C))
            choices.append((float(told_C[where]) / seconds, float(told_C[where]), bundle, where))
        finished = self._num_finished(history, self._largest)
        if max(told for _, told, _, _ in choices) < LEARNT_BELOW and finished >= RESERVED_TRIALS:
            if _running(history):
                return None
            raise Exhausted(
                f"no further trial would tell more than {LEARNT_BELOW:g} nats about the best value of {self._largest}"
            )
        _, _, bundle, where = max(choices)
        if bundle == self._largest and self._lanes_are_full(history):
            return None
        return self._params(candidate_ND[where], bundle)

    def _candidates(self, rng: np.random.Generator, surrogate: Surrogate, bundle: str) -> Array:
        """Settings in [0, 1]^D: spread out, and around those that promise most at a size."""
        random_ND = rng.random((_NUM_RANDOM, len(self._axes)))
        spread = surrogate.at(self._ends(random_ND, bundle))
        best_ND = random_ND[np.argsort(-(spread.mean_M + spread.std_M))[:_NUM_CENTRES]]
        near_ND = np.repeat(best_ND, _NUM_NEAR // _NUM_CENTRES, axis=0)
        near_ND += _NEAR * rng.standard_normal(near_ND.shape)
        return np.concatenate([random_ND, np.clip(near_ND, 0.0, 1.0)])

    def _best_draws(self, rng: np.random.Generator, surrogate: Surrogate, target: Expected) -> Array:
        """Draws [K] of the best value at the largest size, from the joint posterior of promising candidates."""
        index = np.argsort(-(target.mean_M + 2 * target.std_M))[:_NUM_BEST]
        some = Expected(target.mean_M[index], target.std_M[index], target.places[index], target.solved[:, index])
        values, vectors = np.linalg.eigh(surrogate.covariance(some, some))
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        draws = some.mean_M + rng.standard_normal((_NUM_DRAWS, len(index))) @ root.T
        return np.asarray(draws.max(1))

    def _surrogate(self, data: _Evaluations) -> Surrogate:
        """Hyperparameters from the trials that have ended (or all, where none has); conditioned on everything.

        They are remembered for as long as the ended trials' evaluations are the same, which changes no result.
        """
        chosen = np.flatnonzero(data.ended_N) if data.ended_N.any() else np.arange(len(data.value_N))
        chosen = chosen[np.argsort(data.last_N[chosen], kind="stable")]  # trials' last come last: those are kept
        places, value_N = data.places[chosen], data.value_N[chosen]
        key = b"".join(array.tobytes() for array in (value_N, places.x_ND, places.size_N, places.step_N))
        if self._fitted is None or self._fitted[0] != key:
            self._fitted = key, Surrogate.fit(places, value_N)
        return self._fitted[1].on(data.places, data.value_N)

    def _evaluations(self, history: SweepState) -> _Evaluations:
        """A few evaluations of each trial; a diverged one counts as the worst value seen, at its end."""
        metric, rows, values = self._sweep.metric, [], []
        diverged = []
        for number, trial in enumerate(history.trials.values()):
            if trial.status is Status.DIVERGED:
                diverged.append((number, trial, self._max_steps, True))
            elif trial.status is not Status.FAILED:
                found = {s: m[metric] for s, m in trial.metrics.items() if math.isfinite(m.get(metric, math.nan))}
                for step in _kept(sorted(found), self._max_steps):
                    rows.append((number, trial, step, step == max(found)))
                    values.append(self._sign * found[step])
        value_N = winsorised(np.array(values)) if values else np.zeros(0)
        if values:
            rows += diverged
            value_N = np.concatenate([value_N, np.full(len(diverged), value_N.min())])
        x_ND = np.array([self._scaled(t.params) for _, t, _, _ in rows]).reshape(len(rows), len(self._axes))
        size_N = np.array([self._coordinate[t.bundle] for _, t, _, _ in rows])
        step_N = np.array([step_coordinate(min(step, self._max_steps), self._max_steps) for _, _, step, _ in rows])
        places = Places(x_ND, size_N, step_N, np.array([number for number, _, _, _ in rows], dtype=np.int64))
        last_N = np.array([last for _, _, _, last in rows], dtype=bool)
        ended_N = np.array([trial.status.has_ended for _, trial, _, _ in rows], dtype=bool)
        return _Evaluations(places, value_N, last_N, ended_N)

    def _pending(self, history: SweepState) -> Places:
        """Ends of the trials in training."""
        numbers = {trial_id: number for number, trial_id in enumerate(history.trials)}
        running = _running(history)
        return Places(
            np.array([self._scaled(t.params) for t in running]).reshape(len(running), len(self._axes)),
            np.array([self._coordinate[t.bundle] for t in running]),
            np.zeros(len(running)),
            np.array([numbers[t.trial_id] for t in running], dtype=np.int64),
        )

    def _ends(self, x_ND: Array, bundle: str) -> Places:
        """Ends of trials that have not begun."""
        return Places(x_ND, np.full(len(x_ND), self._coordinate[bundle]), np.zeros(len(x_ND)), np.full(len(x_ND), -1))

    def _num_finished(self, history: SweepState, bundle: str) -> int:
        return sum(trial.bundle == bundle and trial.status is Status.FINISHED for trial in history.trials.values())

    def _scaled(self, params: dict[str, Any]) -> list[float]:
        return [_to_unit(axis, params[name]) for name, axis in self._axes.items()]

    def _params(self, x_D: Array, bundle: str) -> dict[str, Any]:
        values: dict[str, Any] = {n: _from_unit(a, float(x)) for (n, a), x in zip(self._axes.items(), x_D, strict=True)}
        return {name: bundle if name == self._axis else values[name] for name in self._sweep.space}


def _running(history: SweepState) -> list[TrialState]:
    """Trials in training, or about to be."""
    return [trial for trial in history.trials.values() if not trial.status.has_ended and not trial.paused]


def _kept(steps: list[int], max_steps: int) -> list[int]:
    """The last of a trial's evaluations, and the first at or after fixed shares of its length."""
    kept = set(steps[-1:])
    for share in _CURVE_SHARES:
        kept.update([step for step in steps if step >= share * max_steps][:1])
    return sorted(kept)


def _to_unit(axis: Uniform | LogUniform, value: float) -> float:
    if isinstance(axis, LogUniform):
        return math.log(value / axis.low) / math.log(axis.high / axis.low)
    return (value - axis.low) / (axis.high - axis.low)


def _from_unit(axis: Uniform | LogUniform, x: float) -> float:
    if isinstance(axis, LogUniform):
        value = axis.low * math.exp(x * math.log(axis.high / axis.low))
    else:
        value = axis.low + x * (axis.high - axis.low)
    return min(max(value, axis.low), axis.high)
