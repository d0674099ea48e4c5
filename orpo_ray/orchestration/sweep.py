"""Run a sweep from its config to its results: Ray Tune proposes and prunes, worker groups train, MLflow records."""

from __future__ import annotations

import _thread
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from ray import tune
from ray.tune.execution import class_cache

from orpo_ray import provenance
from orpo_ray.config import AshaConfig, ExperimentConfig, SweepConfig
from orpo_ray.orchestration import broker
from orpo_ray.orchestration.auto_scaling import fitted
from orpo_ray.orchestration.broker_address import BrokerAddress
from orpo_ray.orchestration.capacity import Capacity, Resources, SharedFolder, snapshot
from orpo_ray.orchestration.checks import (
    SweepError,
    group_resources,
    require_room,
    require_shared_folders,
    resolve_use_gpu,
)
from orpo_ray.orchestration.claim import claim_run_dir, remove_new_run_dir
from orpo_ray.orchestration.driver import StopAtBroker, TrialDriver
from orpo_ray.orchestration.event_pump import EventPump
from orpo_ray.orchestration.groups import GroupManager
from orpo_ray.planning.architecture import architecture_of
from orpo_ray.planning.cost import CostModel
from orpo_ray.reports import report
from orpo_ray.reports.progress import SweepProgress
from orpo_ray.results import winners
from orpo_ray.search import searchers
from orpo_ray.search.algorithm import SweepSearch
from orpo_ray.search.ladder import Ladder
from orpo_ray.search.proposals import CONFIRMATIONS, Proposals
from orpo_ray.search.scheduler import SweepScheduler
from orpo_ray.search.searcher import Searcher, Size
from orpo_ray.storage import journal, requests, results, sync
from orpo_ray.storage.lease import Lease, LeaseError
from orpo_ray.storage.object_store import Storage
from orpo_ray.storage.run_dir import (
    EVENTS_FILE,
    FITTED_FILE,
    LOCK_FILE,
    RESULTS_FILE,
    SWEEP_FILE,
    SweepFolder,
    write_results,
)
from orpo_ray.storage.sweep_state import SweepState, read_state
from orpo_ray.tracking import warm_start
from orpo_ray.tracking.sweep_tracker import SweepTracker
from orpo_ray.tracking.warm_start import WarmStart

NAMESPACE = "orpo_ray"
_TUNE_DIR = "tune"
_PROBE_TIMEOUT_S = 60
"""Each node starts a process to check that it sees the run directory."""
_DRIVER_RESOURCES = {"node:__internal_head__": 1e-4}
"""Drivers take no CPU, so they never starve the workers, and sit on the head node, which is not preempted."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of a sweep, and where its files are."""

    results: dict[str, Any]
    """Content of results.json."""
    run_dir: Path
    tracking_uri: str
    undelivered: int
    """Events that MLflow did not take in time; the same command delivers them."""
    interrupted: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """A sweep that owns its run directory and fits the cluster."""

    config: ExperimentConfig
    sweep: SweepConfig
    sweep_id: str
    folder: SweepFolder
    capacity: Capacity
    resources: dict[str, Resources]
    """Bundle label -> resources of a worker group."""
    sizes: dict[str, Size]
    """Bundle label -> size, where there is a budget."""
    searcher: Searcher
    shared: SharedFolder | None
    """Asks nodes whether they see the run directory; None where an object store is used."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """The running parts of a sweep besides its search."""

    address: BrokerAddress
    broker: Any
    """Actor handle of the broker."""
    manager: GroupManager
    tracker: SweepTracker
    pump: EventPump
    warm_start: WarmStart | None


def run(config: ExperimentConfig, progress: SweepProgress) -> Outcome:
    """Run a sweep, or continue the one of the same name. A config without `sweep` is a sweep of one trial.

    Ray must be initialised.

    Raises:
        SweepError: the run directory holds another experiment, or a trial would never fit the cluster.
        StorageError: the object store cannot be used.
        TrackingError: MLflow cannot be used.
    """
    config, sweep = config.as_sweep()
    config.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        # With a short timeout, because `orpo-ray watch` takes the lock for a moment to see whether the sweep runs.
        with FileLock(config.run_dir / LOCK_FILE, timeout=0.2):
            if config.storage is None:
                return _run(config, sweep, SweepFolder(config.run_dir), progress)
            return _run_with_lease(config, sweep, progress, Storage(config.storage) / config.name)
    except Timeout:
        raise SweepError(
            f"{config.run_dir}: another process runs this sweep now; wait for it, or choose another name"
        ) from None


def _run_with_lease(config: ExperimentConfig, sweep: SweepConfig, progress: SweepProgress, remote: Storage) -> Outcome:
    """Run a sweep whose journal and checkpoints are in an object store, wherever it ran before."""
    remote.check()
    lost: list[str] = []

    def stop(reason: str) -> None:
        lost.append(reason)
        _thread.interrupt_main()

    try:
        lease = Lease(remote, stop, progress.log)
    except LeaseError as error:
        raise SweepError(str(error)) from None
    try:
        sync.restore(config.run_dir, remote)
        return _run(config, sweep, SweepFolder(config.run_dir, remote), progress)
    except KeyboardInterrupt:
        if lost:
            raise SweepError(lost[0]) from None
        raise
    finally:
        if not lost:
            lease.release()


def _run(config: ExperimentConfig, sweep: SweepConfig, folder: SweepFolder, progress: SweepProgress) -> Outcome:
    """The steps of a sweep: claim and check, start its parts, search, report."""
    inbox = requests.Inbox(folder.run_dir)
    plan = _claim_and_check(config, sweep, folder)
    parts = _start(plan, progress)
    complete = False
    try:
        scheduler = _build_scheduler(plan, parts)
        parts.pump.listen(inbox, scheduler)
        complete = _search(plan, parts.address, scheduler)
    finally:
        # Interrupted trials are left as they are: the next run starts from their checkpoints.
        parts.pump.stop(timeout_s=30 if complete or parts.pump.asked_to_stop else 0)
    outcome = _report(plan, parts.tracker, complete)
    ray.kill(parts.broker)
    return outcome


def _claim_and_check(config: ExperimentConfig, sweep: SweepConfig, folder: SweepFolder) -> _Plan:
    """Claim the run directory and check that the cluster can run the sweep.

    Raises:
        SweepError: the run directory holds another experiment, or a trial would never fit the cluster.
    """
    is_new = not (folder.run_dir / SWEEP_FILE).exists()
    sweep_id = claim_run_dir(config, folder.remote)
    try:
        config, sweep = fitted(config, sweep)
        if folder.remote is not None and (folder.run_dir / FITTED_FILE).exists():
            sync.put(folder.run_dir, folder.remote, FITTED_FILE)
        capacity = snapshot()
        resources = group_resources(config, sweep, resolve_use_gpu(config, sweep, capacity))
        require_room(resources, capacity)
        shared = SharedFolder(folder.proof) if folder.proof else None
        if shared is not None:
            require_shared_folders(config, shared.nodes_without_access(capacity, timeout_s=_PROBE_TIMEOUT_S))
        # Before groups start: an error while they do would take the process with it, see `GroupManager.shutdown`.
        sizes = _sizes(config, sweep)
        searcher = searchers.build(sweep, config.run_dir, sizes, config.train.max_steps)
    except Exception:
        if is_new:
            remove_new_run_dir(folder.run_dir)
        raise
    return _Plan(config, sweep, sweep_id, folder, capacity, resources, sizes, searcher, shared)


def _start(plan: _Plan, progress: SweepProgress) -> _Parts:
    """Start the broker, the worker groups, MLflow's tracker and the event pump."""

    def notify(text: str) -> None:
        progress.console.print(text, markup=False, highlight=False)

    config, sweep = plan.config, plan.sweep
    address = BrokerAddress(f"broker-{plan.sweep_id}", NAMESPACE)
    handle = broker.start(address, plan.folder, sweep.max_failures)
    kinds = set(plan.resources.values())
    manager = GroupManager(handle, address, plan.folder, sweep, kinds, plan.capacity, notify)
    # Worker processes take seconds to come up, so MLflow is opened in that time.
    tracker = SweepTracker(config, plan.sweep_id, provenance.collect())
    tracker.start()
    found = warm_start.load(config, sweep, tracker.uri, tracker.parent_id) if sweep.warm_start else None
    if found is not None:
        notify(found.message)
    pump = EventPump(config, handle, manager, plan.shared, tracker, progress)
    pump.start()
    return _Parts(address, handle, manager, tracker, pump, found)


def _build_scheduler(plan: _Plan, parts: _Parts) -> SweepScheduler:
    """The scheduler of the sweep, continuing where its journal ends."""
    config, sweep = plan.config, plan.sweep
    events = journal.read_events(plan.folder.run_dir / EVENTS_FILE)
    sizes, searcher = plan.sizes, plan.searcher
    cost = CostModel({b: s.parameters for b, s in sizes.items()}, {b: s.devices for b, s in sizes.items()})
    hours = sweep.budget.device_hours if sweep.budget else 0.0
    earlier = {} if parts.warm_start is None else parts.warm_start.trials
    proposals = Proposals(
        config, sweep, searcher, SweepState(events), earlier, lambda state: cost.remaining(state, hours).committed
    )
    # One queued trial per resource class keeps groups from waiting for a driver to start (a process of some 100 MB).
    # Model-based searchers and ASHA get no look-ahead: later decisions use more results.
    decides = sweep.is_model_based or isinstance(sweep.scheduler, AshaConfig)
    lookahead = 0 if decides else len({request.resource_class for request in plan.resources.values()})
    reason_to_stop = searcher.reason_to_stop if isinstance(searcher, Ladder) else None
    return SweepScheduler(proposals, parts.broker, parts.manager.slots, lookahead, reason_to_stop, events)


def _report(plan: _Plan, tracker: SweepTracker, complete: bool) -> Outcome:
    """Summarise the journal into results.json, write the report, and end the MLflow run."""
    config, sweep = plan.config, plan.sweep
    run_dir, remote = plan.folder.run_dir, plan.folder.remote
    tracker.flush()  # so that the last trials' runs have their ids
    if remote is not None:
        sync.pull(run_dir, remote)  # files that workers on other nodes have written
    state = read_state(run_dir)
    summary = results.summarize(config.name, sweep.metric, sweep.mode, state, tracker.run_ids)
    if isinstance(plan.searcher, Ladder):
        summary["expectations"] = plan.searcher.expectations(state)
    summary["winners"] = winners.summarize_winners(summary, run_dir)
    if (winner := summary["winners"]["best"]) is not None:
        # With confirmed finalists, the best score of the search need not belong to the best setting.
        summary["best"] = next(t for t in summary["trials"] if t["trial_id"] == winner["trial_id"])
    summary["interrupted"] = not complete
    write_results(run_dir / RESULTS_FILE, summary)
    files = report.write_report(run_dir, config)
    if remote is not None:
        names = (file.relative_to(run_dir) for file in (run_dir / RESULTS_FILE, *files))
        sync.put(run_dir, remote, *map(str, names))
    tracker.attach([run_dir / RESULTS_FILE, *files])
    undelivered = tracker.close(summary, interrupted=not complete)
    return Outcome(summary, run_dir, tracker.uri, undelivered, interrupted=not complete)


def _sizes(config: ExperimentConfig, sweep: SweepConfig) -> dict[str, Size]:
    """Bundle label -> size. Empty without a budget: only a budget needs the models' sizes here."""
    if sweep.budget is None:
        return {}
    axis = sweep.bundle_axis
    trials = (
        {str(label): config.trial({axis: label}) for label in sweep.space[axis].candidates()}
        if axis
        else {"": config.trial({})}
    )
    return {
        label: Size(architecture_of(trial.model).parameters, trial.scaling.num_workers)
        for label, trial in trials.items()
    }


def _search(plan: _Plan, address: BrokerAddress, scheduler: SweepScheduler) -> bool:
    """Let Tune run the sweep to its end. Returns whether it got there, i.e. was not interrupted."""
    # Tune would warn that it finds no result files of its own; the journal has the results.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    # Tune puts these into the drivers' runtime environment, which Ray writes to command lines and logs (ray 2.60).
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    config, sweep = plan.config, plan.sweep
    trainable = tune.with_resources(
        tune.with_parameters(
            TrialDriver,
            experiment=config,
            resource_classes={bundle: request.resource_class for bundle, request in plan.resources.items()},
            confirmations=CONFIRMATIONS,
            broker=address,
        ),
        tune.PlacementGroupFactory([_DRIVER_RESOURCES]),
    )
    # Tune's files of an earlier run; the journal has everything that is needed.
    shutil.rmtree(config.run_dir / _TUNE_DIR, ignore_errors=True)
    grid = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=SweepSearch(scheduler, sweep.num_trials + sweep.num_confirmations),
            scheduler=scheduler,
            metric=sweep.metric,
            mode=sweep.mode,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=_TUNE_DIR,
            storage_path=str(config.run_dir),
            callbacks=[StopAtBroker(address)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=3),  # of a driver
            verbose=0,
        ),
    ).fit()
    if grid.num_errors:
        raise SweepError(f"internal error: a trial driver failed; please report it: {grid.errors[0]}") from grid.errors[
            0
        ]
    trials = scheduler.proposals.history.trials.values()
    return scheduler.proposals.is_exhausted and all(trial.status.has_ended for trial in trials)
