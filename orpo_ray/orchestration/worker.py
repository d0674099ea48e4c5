"""What runs in every process of a worker group: take trials from the broker, one after another."""

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
from orpo_ray.orchestration.broker_state import Assignment
from orpo_ray.storage.object_store import Storage, StorageError

_log = logging.getLogger(__name__)

_POLL_S = 10.0
"""How long rank 0 waits for work before it tells the others that it still waits."""
_LOCK = ".lock"
_LOG_PATIENCE_S = 10.0
"""Log lines are not worth keeping a group waiting for an object store that is away."""
_PEER_TIMEOUT_S = 60.0
"""A rank that failed alone waits this long for the others, which hang in a collective, then brings the group down."""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What a worker group is told at its start."""

    group: str
    resource_class: str
    broker: str
    namespace: str
    trials_dir: str | None
    """Folder on storage that all nodes share; None where `remote` keeps what must not be lost."""
    remote: Storage | None
    """The sweep's folder in an object store."""
    proof: str | None
    """A file that this node must see, since nodes share trials_dir; None where they need not."""
    threads: int
    """Intra-op threads per worker."""


class GroupBrokenError(RuntimeError):
    """Ranks of the group no longer agree; only a restart of its processes helps."""


def run_group(spec: GroupSpec) -> None:
    """Train loop per worker of the group's TorchTrainer. Returns when the broker says that the group may end."""
    if spec.proof is not None and not Path(spec.proof).is_file():
        raise FileNotFoundError(
            f"{spec.proof} is not seen on {socket.gethostname()}: output_dir must be on a file system that all nodes "
            "mount, or storage be set"
        )
    # DeepSpeed compiles ops at first use and looks for ninja on PATH, where that of an inactive environment is not.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    import torch
    import torch.distributed as dist

    # Ray sets OMP_NUM_THREADS to the CPUs it reserved, but only where it was not set before.
    torch.set_num_threads(spec.threads)
    rank = ray.train.get_context().get_world_rank()
    node = ray.get_runtime_context().get_node_id()
    broker = ray.get_actor(spec.broker, namespace=spec.namespace)
    # Host-side messages need gloo: over NCCL they would spin the GPU while rank 0 waits for work.
    control = dist.new_group(backend="gloo")
    roll_call = dist.new_group(backend="gloo", timeout=timedelta(seconds=_PEER_TIMEOUT_S))
    with _home(spec, control) as home:
        logs = home if spec.trials_dir is None else home.parent
        log_file = worker_logs.configure(logs / worker_logs.LOGS_DIR, spec.group, rank, node)
        here = f"{socket.gethostname()}:{os.getpid()}", node
        ranks: list[tuple[str, str]] = [here] * dist.get_world_size()
        dist.all_gather_object(ranks, here, group=control)
        if rank == 0:
            processes, nodes = [process for process, _ in ranks], [node for _, node in ranks]
            ray.get(broker.join.remote(spec.group, spec.resource_class, processes, nodes))
        while (assignment := _next_assignment(spec, broker, control, rank)) is not None:
            with preemption.at_work(), worker_logs.trial(assignment.trial_id, assignment.attempt):
                goes_on = _run_trial(assignment, spec, home, log_file, broker, control, roll_call, rank)
            if not goes_on:
                return


def _next_assignment(spec: GroupSpec, broker: Any, control: Any, rank: int) -> Assignment | None:
    import torch.distributed as dist

    while True:
        box: list[Any] = [ray.get(broker.take.remote(spec.group, _POLL_S)) if rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=control)
        if box[0] == "end":
            return None
        if isinstance(box[0], Assignment):
            return box[0]


def _scratch(spec: GroupSpec) -> Path:
    """The node's own folder: several nodes may be on one machine."""
    return Path(tempfile.gettempdir()) / "orpo_ray" / f"{spec.group}-{ray.get_runtime_context().get_node_id()[:8]}"


@contextmanager
def _home(spec: GroupSpec, control: Any) -> Iterator[Path]:
    """The folder that trials' folders are in. On a node's own disk, what crashed groups left there is removed first."""
    import torch.distributed as dist

    if spec.trials_dir is not None:
        yield Path(spec.trials_dir)
        return
    home = _scratch(spec)
    if int(os.environ["LOCAL_RANK"]) != 0:
        dist.barrier(group=control)
        yield home
        return
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home.parent / _LOCK):  # else a folder could be removed between being made and being locked
        home.mkdir(exist_ok=True)
        in_use = FileLock(home / _LOCK).acquire()  # ends with its process, and says until then that somebody is here
        for other in home.parent.iterdir():
            if other != home:
                with suppress(Timeout, OSError), FileLock(other / _LOCK, timeout=0):
                    shutil.rmtree(other)
    with in_use:
        dist.barrier(group=control)
        yield home
        shutil.rmtree(home, ignore_errors=True)


def _run_trial(
    assignment: Assignment,
    spec: GroupSpec,
    home: Path,
    log_file: Path,
    broker: Any,
    control: Any,
    roll_call: Any,
    rank: int,
) -> bool:
    """Run one trial. An exception that every rank meets is its result; one that only some meet breaks the group.

    Returns:
        Whether the group can take another one; not when its machine is about to be taken away.

    Raises:
        GroupBrokenError: ranks disagree about how the trial ended.
    """
    import torch
    import torch.distributed as dist

    from orpo_ray.storage.events import Status
    from orpo_ray.training.loop import train
    from orpo_ray.training.trial import Decision, RankContext, TrialResult

    worker_logs.adopt_libraries()
    trial_id, attempt = assignment.trial_id, assignment.attempt
    trial_dir = home / trial_id
    remote = None if spec.remote is None else spec.remote / "trials" / trial_id

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
        control=control,
    )
    _log.info("takes the trial up")
    try:
        outcome = train(assignment.config, ctx)
    except Exception as error:
        _log.exception("the trial failed")
        trial_dir.mkdir(parents=True, exist_ok=True)
        (trial_dir / f"error-rank-{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        if remote is not None:
            with suppress(StorageError):  # it may be why the trial failed
                remote.upload(trial_dir / f"error-rank-{rank}.txt", f"error-rank-{rank}.txt")
        outcome = TrialResult(Status.FAILED, 0, {}, None, 0.0, f"{type(error).__name__}: {error}")
    else:
        level = logging.WARNING if outcome.error else logging.INFO
        _log.log(level, "the trial is %s at step %d%s", outcome.status, outcome.steps, _reason(outcome.error))
    if outcome.status is Status.FAILED:
        gc.collect()  # the traceback that held the engine's tensors is gone only now
        torch.cuda.empty_cache()
    if spec.remote is not None:
        _keep_log(log_file, spec.remote)  # before the sweep can hear of the end and look for what there is
    outcomes: list[TrialResult | None] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(outcomes, outcome, group=roll_call)
    except RuntimeError as error:
        raise _broken(spec, broker, rank, outcome.error or "the other ranks did not end the trial") from error
    failed = [o for o in outcomes if o is not None and o.status is Status.FAILED]
    if failed and len(failed) < len(outcomes):
        raise _broken(spec, broker, rank, f"only some ranks failed: {failed[0].error}")
    if rank == 0:
        ray.get(broker.finished.remote(trial_id, attempt, outcome))
    if failed and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            # After a device-side fault every later trial of these processes would fail too.
            raise _broken(spec, broker, rank, "the GPU is unusable after a failed trial") from error
    if spec.remote is not None and outcome.status is not Status.PAUSED and int(os.environ["LOCAL_RANK"]) == 0:
        shutil.rmtree(trial_dir, ignore_errors=True)  # the object store has it
    return outcome.status is not Status.PREEMPTED


def _keep_log(file: Path, remote: Storage) -> None:
    """Put this rank's lines so far into the object store, as `GROUP-rank-N-NODE.jsonl`: its own disk is scratch.

    A group that is restarted on another node begins a new file there; hence the node in the name.
    """
    name = f"{file.stem}-{ray.get_runtime_context().get_node_id()[:8]}{file.suffix}"
    try:
        Storage(remote.uri, _LOG_PATIENCE_S).upload(file, f"{worker_logs.LOGS_DIR}/{name}")
    except (StorageError, FileNotFoundError) as error:
        _log.warning("log lines stay on this node for now: %s", error)


def _reason(error: str | None) -> str:
    return f": {error}" if error else ""


def _broken(spec: GroupSpec, broker: Any, rank: int, reason: str) -> GroupBrokenError:
    """Tell the broker why, since Ray only tells it that the processes are new; then the caller raises."""
    _log.error("the worker group ends: %s", reason)
    ray.get(broker.complain.remote(spec.group, f"rank {rank}: {reason}"))
    return GroupBrokenError(f"rank {rank}: {reason}")
