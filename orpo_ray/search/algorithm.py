"""The Ray Tune search algorithm that proposes trials."""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.search import SearchAlgorithm

from orpo_ray.search.scheduler import SweepScheduler
from orpo_ray.storage.events import Submitted


class SweepSearch(SearchAlgorithm):
    """Tune's search algorithm: turns proposals into Tune trials, paused until the scheduler starts them."""

    def __init__(self, scheduler: SweepScheduler, num_trials: int) -> None:
        """Propose trials to this scheduler, `num_trials` at most."""
        self._scheduler, self._num_trials = scheduler, num_trials
        self._spec: dict[str, Any] = {}
        self._parser: Any = None
        self.searcher = _NoSearcher()

    def __reduce__(self) -> Any:
        return (SearchAlgorithm, ())

    @property
    def total_samples(self) -> int:
        """Largest number of trials."""
        return self._num_trials

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Ignore Tune's settings: metric and mode come from the sweep's config."""
        return True

    def add_configurations(self, experiments: Any) -> None:
        """Called once by Tune with the experiment of the trials."""
        (experiment,) = experiments
        self._spec, self._parser = experiment.spec, _make_parser()

    def next_trial(self) -> Trial | None:
        """The next trial; None if the scheduler wants none now."""
        proposals = self._scheduler.proposals
        while not proposals.is_exhausted and self._scheduler.wants_trial():
            proposal = proposals.next()
            if proposal is None:
                return None
            if proposal.known is not None:
                self._scheduler.add_known(proposal.trial_id, proposal.params, proposal.known)
                continue
            if proposal.trial_id not in proposals.history.trials:
                bundle = proposals.sweep.bundle_of(proposal.params)
                trial_id, params, purpose = proposal.trial_id, proposal.params, proposal.purpose
                proposals.history.apply(Submitted(trial_id=trial_id, params=params, bundle=bundle, purpose=purpose))
                # Set before its first report, so that its cost counts from the start.
                proposals.history.trials[proposal.trial_id].max_steps = proposals.max_steps
            trial = _create_trial_from_spec(
                {**self._spec, "config": dict(proposal.params)},
                self._parser,
                evaluated_params=proposal.params,
                experiment_tag=proposal.trial_id,
                trial_id=proposal.trial_id,
            )
            trial.init_local_path()  # Tune needs the path at the end, even of a trial that never started
            trial.status = Trial.PAUSED  # Tune would start a pending trial by itself
            return trial
        return None

    def is_finished(self) -> bool:
        """Whether no more trials will come."""
        return self._scheduler.proposals.is_exhausted

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: the scheduler gets the result."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: the scheduler gets the result."""

    def has_checkpoint(self, dirpath: str) -> bool:
        """Do nothing: the journal has all state."""
        return False

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        """Do nothing: the journal has all state."""

    def restore_from_dir(self, dirpath: str) -> None:
        """Do nothing: the journal has all state."""


class _NoSearcher:
    """Stand-in for the searcher that HyperBandForBOHB notifies of pauses; proposals here need no such notice."""

    def on_pause(self, trial_id: str) -> None:
        """Do nothing."""

    def on_unpause(self, trial_id: str) -> None:
        """Do nothing."""
