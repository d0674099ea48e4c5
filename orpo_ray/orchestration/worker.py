"""The process of a worker group: take trials from the broker and train them, one after another."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
from filelock import FileLock, Timeout

from orpo_ray.orchestration import preemption, worker_logs
from orpo_ray.orchestration.broker_address import BrokerAddress
from orpo_ray.orchestration.broker_state import Assignment
from orpo_ray.storage.object_store import Storage, StorageError
from orpo_ray.storage.run_dir import SweepFolder

_log = logging.getLogger(__name__)

_POLL_S = 10.0
"""Longest time that rank 0 waits for work before it tells the other ranks to keep waiting."""
_LOCK = ".lock"
_LOG_PATIENCE_S = 10.0
"""Retry time for log uploads; short, because a group should not wait for an unreachable object store to store logs."""
_PEER_TIMEOUT_S = 60.0
"""A rank that failed alone waits this long for the others, which hang in a collective, before it ends the group."""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Settings of a worker group, passed to its processes at their start."""

    group: str
    resource_class: str
    broker: BrokerAddress
    folder: SweepFolder
    threads: int
    """Intra-op threads per worker."""


@dataclass(frozen=True, slots=True)
class _Worker:
    """One process of a worker group."""

    spec: GroupSpec
    rank: int
    broker: Any
    """Actor handle of the broker."""
    home: Path
    """Folder of the trials' folders."""
    log_file: Path
    control: Any
    """Gloo process group for messages between the ranks."""
    roll_call: Any
    """Gloo process group with a short timeout, for the exchange of outcomes."""

    def broken(self, reason: str) -> GroupBrokenError:
        """Report the reason to the broker and return the error to raise: Ray reports only that processes are new."""
        _log.error("the worker group ends: %s", reason)
        ray.get(self.broker.complain.remote(self.spec.group, f"rank {self.rank}: {reason}"))
        return GroupBrokenError(f"rank {self.rank}: {reason}")


class GroupBrokenError(RuntimeError):
    """The ranks of the group no longer agree; its processes must be restarted."""


def run_group(spec: GroupSpec) -> None:
    """Training function of the group's TorchTrainer, run by every rank. Returns when the broker lets the group end."""
    if (proof := spec.folder.proof) is not None and not proof.is_file():
        raise FileNotFoundError(
            f"{proof} is not visible on {socket.gethostname()}: output_dir must be on a file system that all nodes "
            "mount, or storage be set"
        )
    # DeepSpeed compiles ops at first use and needs ninja on PATH, which an inactive environment's is not.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    import torch
    import torch.distributed as dist

    # Ray sets OMP_NUM_THREADS to the reserved CPUs only if it is not set already.
    torch.set_num_threads(spec.threads)
    rank = ray.train.get_context().get_world_rank()
    node = ray.get_runtime_context().get_node_id()
    broker = spec.broker.connect()
    # Host-side messages use gloo: over NCCL they would keep the GPU busy while rank 0 waits for work.
    control = dist.new_group(backend="gloo")
    roll_call = dist.new_group(backend="gloo", timeout=timedelta(seconds=_PEER_TIMEOUT_S))
    with _home(spec, control) as home:
        logs = home if spec.folder.remote else home.parent
        log_file = worker_logs.configure(logs / worker_logs.LOGS_DIR, spec.group, rank, node)
        here = f"{socket.gethostname()}:{os.getpid()}", node
        ranks: list[tuple[str, str]] = [here] * dist.get_world_size()
        dist.all_gather_object(ranks, here, group=control)
        if rank == 0:
            processes, nodes = [process for process, _ in ranks], [node for _, node in ranks]
            ray.get(broker.join.remote(spec.group, spec.resource_class, processes, nodes))
        worker = _Worker(spec, rank, broker, home, log_file, control, roll_call)
        while (assignment := _next_assignment(worker)) is not None:
            with preemption.at_work(), worker_logs.trial(assignment.trial_id, assignment.attempt):
                goes_on = _run_trial(assignment, worker)
            if not goes_on:
                return


def _next_assignment(worker: _Worker) -> Assignment | None:
    import torch.distributed as dist

    while True:
        take = worker.broker.take
        box: list[Any] = [ray.get(take.remote(worker.spec.group, _POLL_S)) if worker.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=worker.control)
        if box[0] == "end":
            return None
        if isinstance(box[0], Assignment):
            return box[0]


def _scratch(spec: GroupSpec) -> Path:
    """Scratch folder of this group on this node; several nodes may share a machine."""
    return Path(tempfile.gettempdir()) / "orpo_ray" / f"{spec.group}-{ray.get_runtime_context().get_node_id()[:8]}"


@contextmanager
def _home(spec: GroupSpec, control: Any) -> Iterator[Path]:
    """The folder of the trials' folders. On a node's own disk, leftovers of crashed groups are removed first."""
    import torch.distributed as dist

    if spec.folder.trials_dir is not None:
        yield spec.folder.trials_dir
        return
    home = _scratch(spec)
    if int(os.environ["LOCAL_RANK"]) != 0:
        dist.barrier(group=control)
        yield home
        return
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home.parent / _LOCK):  # else a folder could be removed between its creation and its locking
        home.mkdir(exist_ok=True)
        in_use = FileLock(home / _LOCK).acquire()  # marks the folder as in use until this process ends
        for other in home.parent.iterdir():
            if other != home:
                with suppress(Timeout, OSError), FileLock(other / _LOCK, timeout=0):
                    shutil.rmtree(other)
    with in_use:
        dist.barrier(group=control)
        yield home
        shutil.rmtree(home, ignore_errors=True)


def _run_trial(assignment: Assignment, worker: _Worker) -> bool:
    """Run one trial. An exception on every rank is the trial's result; one on only some ranks breaks the group.

    Returns:
        Whether the group can take another trial; False when its machine is about to be preempted.

    Raises:
        GroupBrokenError: ranks disagree about how the trial ended.
    """
    import torch
    import torch.distributed as dist

    from orpo_ray.storage.events import Status
    from orpo_ray.training.loop import train
    from orpo_ray.training.trial import Decision, RankContext, TrialResult

    worker_logs.adopt_libraries()
    broker, rank, sweep_remote = worker.broker, worker.rank, worker.spec.folder.remote
    trial_id, attempt = assignment.trial_id, assignment.attempt
    trial_dir = worker.home / trial_id
    remote = None if sweep_remote is None else sweep_remote / "trials" / trial_id

    def on_eval(step: int, metrics: dict[str, float], checkpoint: str | None, seconds: float) -> Decision:
        _log.info("evaluated at step %d: %s", step, {name: round(value, 5) for name, value in metrics.items()})
        return Decision(ray.get(broker.evaluated.remote(trial_id, attempt, step, metrics, checkpoint, seconds)))

    ctx = RankContext(
        trial_dir=trial_dir,
        remote=remote,
        on_start=lambda step, max_steps, facts: broker.started.remote(trial_id, attempt, step, max_steps, facts),
        on_log=lambda step, metrics: broker.log.remote(trial_id, attempt, step, metrics),
        on_eval=on_eval,
        on_commit=lambda: ray.get(broker.flushed.remote()),
        on_problem=lambda message: broker.warn.remote(trial_id, attempt, message),
        is_preempted=preemption.is_preempted,
        control=worker.control,
    )
    _log.info("starts the trial")
    try:
        outcome = train(assignment.config, ctx)
    except Exception as error:
        _log.exception("the trial failed")
        trial_dir.mkdir(parents=True, exist_ok=True)
        (trial_dir / f"error-rank-{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        if remote is not None:
            with suppress(StorageError):  # the store may be the reason for the failure
                remote.upload(trial_dir / f"error-rank-{rank}.txt", f"error-rank-{rank}.txt")
        outcome = TrialResult(Status.FAILED, 0, {}, None, 0.0, f"{type(error).__name__}: {error}")
    else:
        level = logging.WARNING if outcome.error else logging.INFO
        _log.log(level, "the trial is %s at step %d%s", outcome.status, outcome.steps, _reason(outcome.error))
    if outcome.status is Status.FAILED:
        gc.collect()  # the traceback, which held the engine's tensors, is gone only now
        torch.cuda.empty_cache()
    if sweep_remote is not None:
        _upload_log(worker.log_file, sweep_remote)  # before the sweep learns of the end and collects files
    outcomes: list[TrialResult | None] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(outcomes, outcome, group=worker.roll_call)
    except RuntimeError as error:
        raise worker.broken(outcome.error or "the other ranks did not end the trial") from error
    failed = [o for o in outcomes if o is not None and o.status is Status.FAILED]
    if failed and len(failed) < len(outcomes):
        raise worker.broken(f"only some ranks failed: {failed[0].error}")
    if rank == 0:
        ray.get(broker.finished.remote(trial_id, attempt, outcome))
    if failed and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            # After a device-side fault every later trial of these processes would fail too.
            raise worker.broken("the GPU is unusable after a failed trial") from error
    if sweep_remote is not None and outcome.status is not Status.PAUSED and int(os.environ["LOCAL_RANK"]) == 0:
        shutil.rmtree(trial_dir, ignore_errors=True)  # the object store has it
    return outcome.status is not Status.PREEMPTED


def _upload_log(file: Path, remote: Storage) -> None:
    """Upload this rank's log so far as `GROUP-rank-N-NODE.jsonl`, because its own disk is scratch.

    The node is in the name because a group that is restarted on another node begins a new file there.
    """
    name = f"{file.stem}-{ray.get_runtime_context().get_node_id()[:8]}{file.suffix}"
    try:
        Storage(remote.uri, _LOG_PATIENCE_S).upload(file, f"{worker_logs.LOGS_DIR}/{name}")
    except (StorageError, FileNotFoundError) as error:
        _log.warning("cannot upload the log; it stays on this node for now: %s", error)


def _reason(error: str | None) -> str:
    return f": {error}" if error else ""
