"""Model size as a fidelity: trials of small models guide the search for large ones, within a budget of device-hours.

The next trial is the one with the most information per device-second about the best value of the largest size:
multi-fidelity max-value entropy search (Takeno et al. 2020, arXiv 1901.08275) on the Gaussian process of
`search.surrogate`, whose learned length scale over size measures how much sizes have in common. Where sizes have
nothing in common, small models are uninformative however cheap they are, and the largest size is searched directly.

A trial in training is stopped early only by comparing its curve with curves of its own size. A small model that is
ahead at an equal step is no reason to stop a larger one, which often is slower at first and better at the end.

No Ray, no torch.

Shape suffixes: N settings or evaluations, D axes, C candidates, K draws.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import norm, qmc
from scipy.stats import t as student_t

from orpo_ray.config import LadderConfig, SweepConfig
from orpo_ray.errors import UserError
from orpo_ray.planning.cost import CostModel
from orpo_ray.search.searcher import Exhausted
from orpo_ray.search.size_space import Evaluations, SizeSpace, running_trials
from orpo_ray.search.surrogate import Array, Expected, Surrogate, information
from orpo_ray.storage.events import Status
from orpo_ray.storage.sweep_state import SweepState, TrialState

STOP_BELOW = 0.05
"""A trial is stopped when its probability of beating the best of its size is below this."""
MIN_CURVES = 3
"""Finished trials that a size needs before its trials are stopped by their curves."""
START_ABOVE = 0.05
"""A setting is started at the largest size only if its probability of beating the setting expected to be best there is
at least this."""
RESERVED_TRIALS = 2
"""Whole trials of the largest size for which budget is reserved."""
MIN_SIZES = 2
"""Sizes with a finished trial that are needed to predict another size."""
PREDICTED_BELOW = 0.8
"""A size is predicted if the posterior standard deviation of the best setting's gain over an average one is at most
this share of the prior's."""
MIN_INFORMATION = 1e-3
"""Nats about the best value of the largest size; the search ends when no trial is expected to yield more."""
_SMALL_TRIALS, _SMALL_RATIO = 0.75, 0.3
"""Device-seconds of all smaller sizes together: at most this many whole trials of the largest size, plus this share of
the largest size's own device-seconds."""
_FINISHED_PER_SLOT = 3
"""One trial of the largest size trains at a time, plus one for each such number of finished ones."""
_NUM_RANDOM, _NUM_CENTRES, _NUM_NEAR, _NEAR = 192, 4, 64, 0.06
"""Candidate settings: random ones, and for the most promising of them, points nearby (in fractions of an axis's
range)."""
_NUM_BEST, _NUM_DRAWS = 64, 16


class LadderError(UserError, ValueError):
    """The ladder cannot plan within its budget; the message says what to change."""


class Ladder:
    """Proposes settings and sizes, and which trials to stop; a pure function of the history."""

    def __init__(self, sweep: SweepConfig, parameters: dict[str, int], devices: dict[str, int], max_steps: int) -> None:
        """Prepare the search.

        Args:
            sweep: with searcher `ladder`, a budget, a bundle axis and continuous axes.
            parameters: bundle label -> parameters of the model.
            devices: bundle label -> workers of a trial.
            max_steps: optimizer steps of a whole trial.

        Raises:
            ValueError: the sweep lacks one of these.
            LadderError: all bundles have the same size.
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
        self._bundle_axis = sweep.bundle_axis
        self._space = SizeSpace(sweep, parameters, max_steps)
        self._cost = CostModel(parameters, devices)
        self._parameters = parameters
        self._max_steps = max_steps
        self._sizes = self._space.labels
        self._largest = self._sizes[-1]
        self._sign = 1.0 if sweep.mode == "max" else -1.0
        sobol = qmc.Sobol(self._space.num_axes, rng=np.random.default_rng(sweep.seed))
        self._spread_ND = sobol.random(max(64, 2 ** math.ceil(math.log2(self._startup))))
        self._fitted: tuple[bytes, Surrogate] | None = None

    def propose(self, index: int, history: SweepState) -> dict[str, Any] | None:
        """Params of the next trial, including the bundle axis; None: wait for results of a trial in training.

        None is returned only while a trial is in training.

        Args:
            index: number of the trial to propose, from 0.
            history: all earlier trials.

        Raises:
            Exhausted: the budget does not cover another trial, `num_samples` is reached, or no trial would be
                informative.
            LadderError: the budget does not cover one trial of the largest size.
        """
        if index >= self._sweep.num_samples:
            raise Exhausted(f"sweep.num_samples ({self._sweep.num_samples}) trials have been proposed")
        affordable = self._affordable(history)
        if not affordable:
            return None
        data = self._space.evaluations(history)
        if index < self._startup or not len(data.places):
            if index >= self._startup and running_trials(history):
                return None
            return self._space.params(self._spread_ND[index % len(self._spread_ND)], self._sizes[0])
        worthwhile = self._within_share(history, affordable)
        return self._choose(index, history, data, worthwhile) if worthwhile else None

    def reason_to_stop(self, trial: TrialState, history: SweepState) -> str | None:
        """Why a trial should be stopped at its last evaluation; None: it should continue.

        Its final value is predicted from the gains of the finished trials of its size from this step to their end:
        their mean, with Student's t (the predictive distribution of a further normal draw). Other sizes are ignored.
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
        if chance >= STOP_BELOW:
            return None
        return (
            f"{metric} is {value:.4g} at step {step}; by the curves of {n} finished trials of {trial.bundle} it will "
            f"end at {self._sign * expected:.4g}, with a probability of {chance:.1%} of beating the best, "
            f"{self._sign * best:.4g}"
        )

    def expectations(self, history: SweepState) -> list[dict[str, Any]]:
        """The best setting expected at every size, smallest size first.

        Returns:
            Per size `bundle`, `parameters`, `finished` (trials), `status` (`measured`: a trial has finished there;
            `predicted`; `cannot tell`), `params` (the setting expected to be best), `mean`, `std` and `interval`
            (95 %) of its metric over seeds, all None where the data cannot tell, `narrowed` (posterior over prior
            standard deviation of that setting's gain over an average one) and `says`, a summary sentence.
        """
        data = self._space.evaluations(history)
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
        expected = surrogate.at(self._space.ends(candidate_ND, bundle))
        where = int(np.argmax(expected.mean_M))
        mean, std = float(expected.mean_M[where]), float(expected.std_M[where])
        narrowed = self._narrowed(surrogate, candidate_ND[where], bundle)
        shared = surrogate.correlation_over_size(
            min((self._space.distance(b, bundle) for b in known if b != bundle), default=0.0)
        )
        entry["narrowed"] = narrowed
        if not finished[bundle] and narrowed > PREDICTED_BELOW:
            return entry | {
                "says": f"{bundle}: cannot tell. What is known of {', '.join(known)} leaves {narrowed:.0%} of the "
                f"prior uncertainty about which setting is best (a prediction needs {PREDICTED_BELOW:.0%} or less); "
                f"a setting's effect there and here is correlated by {shared:.2f}."
            }
        status = "measured" if finished[bundle] else "predicted"
        centre = self._sign * mean
        interval = [centre - 1.96 * std, centre + 1.96 * std]
        params = self._space.params(candidate_ND[where], bundle)
        del params[self._bundle_axis]
        setting = ", ".join(f"{name}={value:.3g}" for name, value in params.items())
        found = {"params": params, "mean": centre, "std": std, "interval": interval, "status": status}
        says = f"{bundle}: {status}. Best expected at {setting}: {self._sweep.metric} {centre:.4g} ± {1.96 * std:.2g}."
        return entry | found | {"says": says}

    def _narrowed(self, surrogate: Surrogate, x_D: Array, bundle: str) -> float:
        """Posterior over prior standard deviation of a setting's value minus the average over spread-out settings.

        The difference is used because an offset common to all settings of a size does not change which one is best.
        """
        places = self._space.ends(np.concatenate([x_D[None], self._spread_ND]), bundle)
        weight_N = np.full(len(places), -1.0 / len(self._spread_ND))
        weight_N[0] = 1.0
        there = surrogate.at(places)
        posterior = float(weight_N @ surrogate.covariance(there, there) @ weight_N)
        prior = float(weight_N @ surrogate.prior_covariance(places) @ weight_N)
        return math.sqrt(max(posterior, 0.0) / prior)

    def _affordable(self, history: SweepState) -> dict[str, float]:
        """Bundle -> expected device-seconds of a trial, for bundles that the budget covers; empty: wait."""
        costs = {b: self._cost.device_seconds(b, self._max_steps, history) for b in self._sizes}
        largest = costs[self._largest]
        if largest is None:
            return {self._sizes[0]: 1.0}  # no trial has reported its speed yet: start only the cheapest size
        hours = largest.seconds / 3600.0
        if hours > self._budget and (largest.measured or largest.num_sizes >= MIN_SIZES):
            raise LadderError(
                f"a trial of {self._largest} takes about {hours:.3g} device-hours, and sweep.budget.device_hours is "
                f"{self._budget:g}: raise it, shorten trials, or drop that size"
            )
        left = self._cost.remaining(history, self._budget)
        whole = self._num_finished(history, self._largest)
        whole += sum(t.bundle == self._largest for t in running_trials(history))
        reserved = hours * max(RESERVED_TRIALS - whole, 0)
        found = {}
        for bundle, cost in costs.items():
            assert cost is not None
            if cost.seconds / 3600.0 <= left.free - (0.0 if bundle == self._largest else reserved):
                found[bundle] = cost.seconds
        if not found and not running_trials(history):
            raise Exhausted(
                f"{left.spent:.3g} of {self._budget:g} device-hours are spent, and the rest does not cover another "
                "trial"
            )
        return found

    def _within_share(self, history: SweepState, affordable: dict[str, float]) -> dict[str, float]:
        """Bundles without the smaller sizes that have used up their share; empty: wait for a trial in training."""
        step_seconds = {}
        for bundle in self._sizes:
            cost = self._cost.device_seconds(bundle, 1, history)
            assert cost is not None
            step_seconds[bundle] = cost.seconds
        used = dict.fromkeys(self._sizes, 0.0)
        for trial in history.trials.values():
            used[trial.bundle] += trial.device_seconds
        for trial in running_trials(history):
            used[trial.bundle] += step_seconds[trial.bundle] * (self._max_steps - trial.evaluated_step)
        small = sum(seconds for bundle, seconds in used.items() if bundle != self._largest)
        share = _SMALL_TRIALS * step_seconds[self._largest] * self._max_steps + _SMALL_RATIO * used[self._largest]
        found = {b: seconds for b, seconds in affordable.items() if b == self._largest or small + seconds <= share}
        if self._largest_is_full(history) and set(found) == {self._largest}:
            return {}
        return found if found or running_trials(history) else affordable

    def _largest_is_full(self, history: SweepState) -> bool:
        """Whether another trial of the largest size should wait for results of those in training."""
        running = sum(t.bundle == self._largest for t in running_trials(history))
        finished = self._num_finished(history, self._largest)
        return running >= 1 + finished // _FINISHED_PER_SLOT

    def _choose(
        self, index: int, history: SweepState, data: Evaluations, affordable: dict[str, float]
    ) -> dict[str, Any] | None:
        """The setting and size with the most information per device-second.

        Running trials are assumed to end at their expected values.
        """
        rng = np.random.default_rng([self._sweep.seed, index])
        believed = self._surrogate(data).with_pending(self._space.pending_ends(history))
        candidate_ND = self._candidates(rng, believed, self._largest)
        target = believed.at(self._space.ends(candidate_ND, self._largest))
        best_K = self._best_draws(rng, believed, target)
        gamma_KC = (best_K[:, None] - target.mean_M) / target.std_M
        choices = []
        for bundle, seconds in affordable.items():
            seen = target if bundle == self._largest else believed.at(self._space.ends(candidate_ND, bundle))
            rho_C = believed.paired(target, seen) / (target.std_M * np.hypot(seen.std_M, believed.noise_std))
            nats_C = information(np.broadcast_to(rho_C, gamma_KC.shape), gamma_KC).mean(0)
            if bundle == self._largest:
                lead = (target.mean_M.max() - target.mean_M) / target.std_M
                nats_C = np.where(norm.sf(lead) < START_ABOVE, -1.0, nats_C)
            where = int(np.argmax(nats_C))
            choices.append((float(nats_C[where]) / seconds, float(nats_C[where]), bundle, where))
        finished = self._num_finished(history, self._largest)
        if max(nats for _, nats, _, _ in choices) < MIN_INFORMATION and finished >= RESERVED_TRIALS:
            if running_trials(history):
                return None
            raise Exhausted(
                f"no further trial is expected to yield {MIN_INFORMATION:g} nats about the best value of "
                f"{self._largest}"
            )
        _, _, bundle, where = max(choices)
        if bundle == self._largest and self._largest_is_full(history):
            return None
        return self._space.params(candidate_ND[where], bundle)

    def _candidates(self, rng: np.random.Generator, surrogate: Surrogate, bundle: str) -> Array:
        """Settings in [0, 1]^D: random ones, and some near those that are most promising at a size."""
        random_ND = rng.random((_NUM_RANDOM, self._space.num_axes))
        spread = surrogate.at(self._space.ends(random_ND, bundle))
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

    def _surrogate(self, data: Evaluations) -> Surrogate:
        """A surrogate with hyperparameters fitted to ended trials (to all if none has ended), conditioned on all data.

        The fit is cached while the ended trials' evaluations stay the same, which does not change any result.
        """
        chosen = np.flatnonzero(data.ended_N) if data.ended_N.any() else np.arange(len(data.value_N))
        chosen = chosen[
            np.argsort(data.last_N[chosen], kind="stable")
        ]  # last evaluations at the end, which the fit keeps
        places, value_N = data.places[chosen], data.value_N[chosen]
        key = b"".join(array.tobytes() for array in (value_N, places.x_ND, places.size_N, places.step_N))
        if self._fitted is None or self._fitted[0] != key:
            self._fitted = key, Surrogate.fit(places, value_N)
        return self._fitted[1].on(data.places, data.value_N)

    def _num_finished(self, history: SweepState, bundle: str) -> int:
        return sum(trial.bundle == bundle and trial.status is Status.FINISHED for trial in history.trials.values())
