"""What runs in every process of a worker group: take trials from the broker, one after another."""

from __future__ import annotations

import gc
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train

from orpo_ray.broker import Assignment

_POLL_S = 10.0
"""How long rank 0 waits for work before it tells the others that it still waits."""
_PEER_TIMEOUT_S = 60.0
"""A rank that failed alone waits this long for the others, which hang in a collective, then brings the group down."""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What a worker group is told at its start."""

    group: str
    lane: str
    broker: str
    namespace: str
    trials_dir: str
    threads: int
    """Intra-op threads per worker."""


class GroupBrokenError(RuntimeError):
    """Ranks of the group no longer agree; only a restart of its processes helps."""


def run_group(spec: GroupSpec) -> None:
    """Train loop per worker of the group's TorchTrainer. Returns when the broker says that the group may end."""
    # DeepSpeed compiles ops at first use and looks for ninja on PATH, where that of an inactive environment is not.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    import torch
    import torch.distributed as dist

    # Ray sets OMP_NUM_THREADS to the CPUs it reserved, but only where it was not set before.
    torch.set_num_threads(spec.threads)
    rank = ray.train.get_context().get_world_rank()
    broker = ray.get_actor(spec.broker, namespace=spec.namespace)
    # Host-side messages need gloo: over NCCL they would spin the GPU while rank 0 waits for work.
    control = dist.new_group(backend="gloo")
    roll_call = dist.new_group(backend="gloo", timeout=timedelta(seconds=_PEER_TIMEOUT_S))
    processes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(processes, f"{socket.gethostname()}:{os.getpid()}", group=control)
    if rank == 0:
        ray.get(broker.join.remote(spec.group, spec.lane, processes))
    while (assignment := _next_assignment(spec, broker, control, rank)) is not None:
        _run_trial(assignment, spec, broker, control, roll_call, rank)


def _next_assignment(spec: GroupSpec, broker: Any, control: Any, rank: int) -> Assignment | None:
    import torch.distributed as dist

    while True:
        box: list[Any] = [ray.get(broker.take.remote(spec.group, _POLL_S)) if rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=control)
        if box[0] == "end":
            return None
        if isinstance(box[0], Assignment):
            return box[0]


def _run_trial(assignment: Assignment, spec: GroupSpec, broker: Any, control: Any, roll_call: Any, rank: int) -> None:
    """Run one trial. An exception that every rank meets is its result; one that only some meet breaks the group.

    Raises:
        GroupBrokenError: ranks disagree about how the trial ended.
    """
    import torch
    import torch.distributed as dist

    from orpo_ray.loop import Decision, RankContext, Status, TrialResult, train

    trial_id, attempt = assignment.trial_id, assignment.attempt
    trial_dir = Path(spec.trials_dir) / trial_id

    def on_eval(step: int, metrics: dict[str, float], checkpoint: str | None, seconds: float) -> Decision:
        return Decision(ray.get(broker.evaluated.remote(trial_id, attempt, step, metrics, checkpoint, seconds)))

    ctx = RankContext(
        trial_dir=trial_dir,
        on_start=lambda step, max_steps, facts: broker.started.remote(trial_id, attempt, step, max_steps, facts),
        on_log=lambda step, metrics: broker.log.remote(trial_id, attempt, step, metrics),
        on_eval=on_eval,
        control=control,
    )
    try:
        outcome = train(assignment.config, ctx)
    except Exception as error:
        trial_dir.mkdir(parents=True, exist_ok=True)
        (trial_dir / f"error-rank-{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        outcome = TrialResult(Status.FAILED, 0, {}, None, 0.0, f"{type(error).__name__}: {error}")
    if outcome.status is Status.FAILED:
        gc.collect()  # the traceback that held the engine's tensors is gone only now
        torch.cuda.empty_cache()
    outcomes: list[TrialResult | None] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(outcomes, outcome, group=roll_call)
    except RuntimeError as error:
        raise _broken(spec, broker, rank, outcome.error or "the other ranks did not end the trial") from error
    failed = [o for o in outcomes if o is not None and o.status is Status.FAILED]
    if failed and len(failed) < len(outcomes):
        raise _broken(spec, broker, rank, f"only some ranks failed: {failed[0].error}")
    if rank == 0:
        end = outcome.steps, outcome.metrics, outcome.checkpoint, outcome.train_seconds, outcome.error
        ray.get(broker.finished.remote(trial_id, attempt, str(outcome.status), *end))
    if failed and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            # After a device-side fault every later trial of these processes would fail too.
            raise _broken(spec, broker, rank, "the GPU is unusable after a failed trial") from error


def _broken(spec: GroupSpec, broker: Any, rank: int, reason: str) -> GroupBrokenError:
    """Tell the broker why, since Ray only tells it that the processes are new; then the caller raises."""
    ray.get(broker.complain.remote(spec.group, f"rank {rank}: {reason}"))
    return GroupBrokenError(f"rank {rank}: {reason}")
