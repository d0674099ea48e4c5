"""Choose the next trial: first unfinished ones of an earlier run, then the search, then confirmation. No Ray."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orpo_ray.config import ExperimentConfig, SweepConfig
from orpo_ray.search.searcher import Exhausted, Searcher, trial_id_of
from orpo_ray.search.searchers import key
from orpo_ray.storage.events import Purpose, Status
from orpo_ray.storage.sweep_state import SweepState, TrialState

_SEED = "train.seed"
CONFIRMATIONS = "c"
"""Prefix of the ids of confirmation trials: they sort after those of the search."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A trial to run."""

    trial_id: str
    params: dict[str, Any]
    purpose: Purpose
    known: TrialState | None = None
    """A finished trial of a warm start with the same settings; its result is used instead of training."""


class Proposals:
    """The order of a sweep's trials; its answers depend only on the history and the constructor's arguments."""

    def __init__(
        self,
        config: ExperimentConfig,
        sweep: SweepConfig,
        searcher: Searcher,
        history: SweepState,
        earlier: dict[str, TrialState],
        committed_hours: Callable[[SweepState], float],
    ) -> None:
        """Continue a sweep where its history ends.

        Args:
            config: the experiment.
            sweep: its sweep.
            searcher: proposes the search's trials.
            history: state of the sweep; its owner keeps it up to date.
            earlier: finished trials of a warm start, by ids of their own.
            committed_hours: device-hours that running trials are expected to need to their end.
        """
        self._sweep = sweep
        self._config, self._searcher, self.history = config, searcher, history
        self._earlier, self._committed_hours = earlier, committed_hours
        # A trial that was submitted but has not ended is proposed again, under its id.
        self._again = [t for t in history.trials.values() if not t.status.has_ended]
        self._next_index = 0
        self._confirmations: list[dict[str, Any]] | None = None
        self.why_over: str | None = None
        """Why the search has ended; None while it has not."""
        self.is_exhausted = False
        """Whether nothing will be proposed any more."""

    @property
    def sweep(self) -> SweepConfig:
        """The sweep's settings."""
        return self._sweep

    @property
    def searcher(self) -> Searcher:
        """The searcher that proposes the search's trials."""
        return self._searcher

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps of a whole trial; None if its length is set in epochs."""
        return self._config.train.max_steps

    @property
    def num_evaluations(self) -> int:
        """Evaluations of a whole trial."""
        train = self._config.train
        assert train.max_steps is not None  # the config requires it for schedulers that plan by it
        return math.ceil(train.max_steps / (train.eval_every or train.max_steps))

    @property
    def search_is_over(self) -> bool:
        """Whether no more search trials will be proposed."""
        return self.why_over is not None and not self._again

    def next(self) -> Proposal | None:
        """The next trial; None: not now, or never again (`is_exhausted`)."""
        if self._again:
            trial = self._again.pop(0)
            return Proposal(trial.trial_id, trial.params, trial.purpose)
        if self.why_over is None:
            if self.over_budget(planned=True):
                assert self._sweep.budget is not None
                self.why_over = f"the budget of {self._sweep.budget.device_hours:g} device-hours is spent or committed"
            else:
                try:
                    return self._search()
                except Exhausted as reason:
                    self.why_over = str(reason)
        if any(not t.status.has_ended for t in self.history.trials.values() if t.purpose == "search"):
            return None
        return self._confirm()

    def over_budget(self, planned: bool) -> bool:
        """Whether the budget is spent; with `planned`, counting running trials' remaining cost and confirmation."""
        if self._sweep.budget is None:
            return False
        hours = self.history.device_hours
        if planned:
            hours += self._committed_hours(self.history) + self._confirmation_hours()
        return hours >= self._sweep.budget.device_hours

    def _search(self) -> Proposal | None:
        # The lowest missing number: drivers submit in any order, and a crash may have come between two submissions.
        while (trial_id := trial_id_of(self._next_index)) in self.history.trials:
            self._next_index += 1
        everything = SweepState()
        everything.trials = {**self._earlier, **self.history.trials}
        params = self._searcher.propose(self._next_index, everything)
        if params is None:
            return None
        return Proposal(trial_id, params, "search", self._known(params))

    def _known(self, params: dict[str, Any]) -> TrialState | None:
        return next((t for t in self._earlier.values() if key(t.params) == key(params)), None)

    def _confirm(self) -> Proposal | None:
        if self._confirmations is None:
            done = {key(t.params) for t in self.history.trials.values() if t.purpose == "confirm"}
            self._confirmations = [params for params in self._planned_confirmations() if key(params) not in done]
        if not self._confirmations or self.over_budget(planned=False):
            self.is_exhausted = True
            return None
        number = sum(t.purpose == "confirm" for t in self.history.trials.values())
        return Proposal(f"{CONFIRMATIONS}{number:05d}", self._confirmations.pop(0), "confirm")

    def _planned_confirmations(self) -> list[dict[str, Any]]:
        """Seed by seed, so that finalists have equally many trials when the budget ends early."""
        confirm = self._sweep.confirm
        if confirm is None:
            return []
        first = self._config.train.seed
        finalists = self.finalists()
        return [{**t.params, _SEED: first + n} for n in range(1, confirm.seeds) for t in finalists]

    def finalists(self) -> list[TrialState]:
        """The search's best finished trials, best first, at most `sweep.confirm.top`."""
        assert self._sweep.confirm is not None
        finished = [
            (value, t)
            for t in self._finished()
            if t.purpose == "search" and (value := t.value(self._sweep.metric)) is not None
        ]
        finished.sort(key=lambda pair: pair[0], reverse=self._sweep.mode == "max")
        return [trial for _, trial in finished[: self._sweep.confirm.top]]

    def _finished(self) -> list[TrialState]:
        return [t for t in self.history.trials.values() if t.status is Status.FINISHED]

    def _confirmation_hours(self) -> float:
        """Device-hours that confirmation will need, estimated from the longest trial so far."""
        longest = max((t.device_seconds for t in self._finished()), default=0.0)
        return self._sweep.num_confirmations * longest / 3600.0
