"""A sweep from its config to its results: Ray Tune proposes and prunes, worker groups train, MLflow follows."""

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
from orpo_ray.orchestration.capacity import SharedFolder, snapshot
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
from orpo_ray.storage.run_dir import EVENTS_FILE, FITTED_FILE, LOCK_FILE, RESULTS_FILE, SWEEP_FILE, write_results
from orpo_ray.storage.sweep_state import SweepState, read_state
from orpo_ray.tracking import warm_start
from orpo_ray.tracking.node_metrics import ClusterMonitor
from orpo_ray.tracking.sweep_tracker import SweepTracker
from orpo_ray.tracking.warm_start import WarmStart

NAMESPACE = "orpo_ray"
_TUNE_DIR = "tune"
_PROBE_TIMEOUT_S = 60
"""A node starts a process to say whether it sees the run directory."""
_DRIVER_RESOURCES = {"node:__internal_head__": 1e-4}
"""Drivers take no CPU, so they never starve the workers, and sit on the head node, which is not preempted."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a sweep leaves behind."""

    results: dict[str, Any]
    """As in results.json."""
    run_dir: Path
    report_files: list[Path]
    tracking_uri: str
    undelivered: int
    """Events that MLflow did not take in time; the same command delivers them."""
    interrupted: bool


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
        # Not at once: `orpo-ray watch` holds it for a moment to see whether a sweep does.
        with FileLock(config.run_dir / LOCK_FILE, timeout=0.2):
            if config.storage is None:
                return _run(config, sweep, progress, None)
            return _run_kept(config, sweep, progress, Storage(config.storage) / config.name)
    except Timeout:
        raise SweepError(
            f"{config.run_dir}: another process runs this sweep now; wait for it, or choose another name"
        ) from None


def _run_kept(config: ExperimentConfig, sweep: SweepConfig, progress: SweepProgress, remote: Storage) -> Outcome:
    """Run a sweep whose journal and checkpoints are in an object store, from wherever it was run before."""
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
        return _run(config, sweep, progress, remote)
    except KeyboardInterrupt:
        if lost:
            raise SweepError(lost[0]) from None
        raise
    finally:
        if not lost:
            lease.release()


def _run(config: ExperimentConfig, sweep: SweepConfig, progress: SweepProgress, remote: Storage | None) -> Outcome:
    inbox = requests.Inbox(config.run_dir)
    is_new = not (config.run_dir / SWEEP_FILE).exists()
    sweep_id = claim_run_dir(config, remote)
    # Without a store, what workers write must be seen from here.
    proof = None if remote else config.run_dir / SWEEP_FILE
    try:
        config, sweep = fitted(config, sweep)
        if remote is not None and (config.run_dir / FITTED_FILE).exists():
            sync.put(config.run_dir, remote, FITTED_FILE)
        capacity = snapshot()
        resources = group_resources(config, sweep, resolve_use_gpu(config, sweep, capacity))
        require_room(resources, capacity)
        shared = SharedFolder(proof) if proof else None
        if shared is not None:
            require_shared_folders(config, shared.nodes_without_access(capacity, timeout_s=_PROBE_TIMEOUT_S))
        # Before groups start: an error while they do would take the process with it, see `GroupManager.shutdown`.
        sizes = _sizes(config, sweep)
        searcher = searchers.build(sweep, config.run_dir, sizes, config.train.max_steps)
    except Exception:
        if is_new:
            remove_new_run_dir(config.run_dir)
        raise

    broker_name = f"broker-{sweep_id}"
    handle = broker.start(broker_name, NAMESPACE, config.run_dir, sweep.max_failures, remote)
    manager = GroupManager(
        handle,
        broker_name,
        NAMESPACE,
        config.run_dir,
        remote,
        proof,
        set(resources.values()),
        capacity,
        lambda text: progress.console.print(text, markup=False, highlight=False),
        max_groups=sweep.max_concurrent,
        max_group_trials=sweep.max_group_trials,
    )
    # Worker processes take seconds to come up; MLflow is opened meanwhile.
    tracker = SweepTracker(config, sweep_id, provenance.collect())
    tracker.start()
    known = warm_start.load(config, sweep, tracker.uri, tracker.parent_id) if sweep.warm_start else None
    if known is not None:
        progress.console.print(known.message, markup=False, highlight=False)
    monitor = ClusterMonitor() if config.tracking.system_metrics else None
    follower = EventPump(config, handle, manager, shared, tracker, progress, monitor)
    follower.start()
    complete = False
    try:
        resource_classes = {bundle: request.resource_class for bundle, request in resources.items()}
        cost = CostModel({b: s.parameters for b, s in sizes.items()}, {b: s.devices for b, s in sizes.items()})
        num_classes = len(set(resource_classes.values()))
        conductor = _conductor(config, sweep, searcher, cost, handle, manager.slots, num_classes, known)
        follower.listen(inbox, conductor)
        complete = _fit(config, conductor, broker_name, resource_classes)
    finally:
        # Interrupted trials are left as they are: their checkpoints are what the next run starts from.
        follower.stop(timeout_s=30 if complete or follower.asked_to_stop else 0)
    tracker.flush()  # runs of the last trials get their ids
    if remote is not None:
        sync.pull(config.run_dir, remote)  # what workers on other nodes left
    state = read_state(config.run_dir)
    summary = results.summarize(config.name, sweep.metric, sweep.mode, state, tracker.run_ids)
    if isinstance(searcher, Ladder):
        summary["expectations"] = searcher.expectations(state)
    summary["winners"] = winners.summarize_winners(summary, config.run_dir)
    if (winner := summary["winners"]["best"]) is not None:
        # Where finalists were confirmed, the best score of the search need not be the best setting's.
        summary["best"] = next(t for t in summary["trials"] if t["trial_id"] == winner["trial_id"])
    summary["interrupted"] = not complete
    write_results(config.run_dir / RESULTS_FILE, summary)
    files = report.write_report(config.run_dir, config)
    if remote is not None:
        names = (file.relative_to(config.run_dir) for file in (config.run_dir / RESULTS_FILE, *files))
        sync.put(config.run_dir, remote, *map(str, names))
    tracker.attach([config.run_dir / RESULTS_FILE, *files])
    undelivered = tracker.close(summary, interrupted=not complete)
    ray.kill(handle)
    return Outcome(summary, config.run_dir, files, tracker.uri, undelivered, interrupted=not complete)


def _conductor(
    config: ExperimentConfig,
    sweep: SweepConfig,
    searcher: Searcher,
    cost: CostModel,
    handle: Any,
    slots: int,
    num_resource_classes: int,
    known: WarmStart | None,
) -> SweepScheduler:
    """Take up the sweep where its journal ends."""
    events = journal.read_events(config.run_dir / EVENTS_FILE)
    history = SweepState(events)
    hours = sweep.budget.device_hours if sweep.budget else 0.0
    earlier = {} if known is None else known.trials
    proposals = Proposals(
        config, sweep, searcher, history, earlier, lambda history: cost.remaining(history, hours).committed
    )
    # A trial that waits for each kind of group, so that none has to wait for its driver, a process of some 100 MB. But
    # whoever decides by results decides better the later it does.
    decides = sweep.is_model_based or isinstance(sweep.scheduler, AshaConfig)
    lookahead = 0 if decides else num_resource_classes
    gives_up = searcher.gives_up if isinstance(searcher, Ladder) else None
    return SweepScheduler(proposals, handle, slots, lookahead, gives_up, events)


def _sizes(config: ExperimentConfig, sweep: SweepConfig) -> dict[str, Size]:
    """Bundles by label, where there is a budget, the only reason to read model architectures here."""
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


def _fit(
    config: ExperimentConfig, conductor: SweepScheduler, broker_name: str, resource_classes: dict[str, str]
) -> bool:
    """Let Tune run the sweep to its end. Returns whether it came there, and was not interrupted."""
    # Tune would warn that it finds no result files of its own, which would only repeat the journal.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    # Tune puts these into the drivers' runtime environment, which Ray writes to command lines and logs (ray 2.60).
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    sweep = conductor.proposals.sweep
    trainable = tune.with_resources(
        tune.with_parameters(
            TrialDriver,
            experiment=config,
            resource_classes=resource_classes,
            confirmations=CONFIRMATIONS,
            broker_name=broker_name,
            namespace=NAMESPACE,
        ),
        tune.PlacementGroupFactory([_DRIVER_RESOURCES]),
    )
    shutil.rmtree(config.run_dir / _TUNE_DIR, ignore_errors=True)  # of an earlier run; the journal has what matters
    grid = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=SweepSearch(conductor, sweep.num_trials + sweep.num_confirmations),
            scheduler=conductor,
            metric=sweep.metric,
            mode=sweep.mode,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=_TUNE_DIR,
            storage_path=str(config.run_dir),
            callbacks=[StopAtBroker(broker_name, NAMESPACE)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=3),  # of a driver
            verbose=0,
        ),
    ).fit()
    if grid.num_errors:
        raise SweepError(f"a trial driver failed, which is a defect of orpo_ray: {grid.errors[0]}") from grid.errors[0]
    trials = conductor.proposals.history.trials.values()
    return conductor.proposals.is_exhausted and all(trial.status is not None for trial in trials)
