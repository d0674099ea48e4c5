"""The training loop of one trial on one rank. It knows torch and a DeepSpeed engine; it knows nothing of Ray."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict

import torch
import torch.distributed as dist

from orpo_ray.config import ExperimentConfig
from orpo_ray.storage.events import Status
from orpo_ray.storage.generations import GENERATIONS_FILE
from orpo_ray.storage.pair_scores import PAIRS_FILE
from orpo_ray.training.checkpoint import Checkpoints
from orpo_ray.training.engine import destroy
from orpo_ray.training.metrics import PairSums, Throughput, kind_of
from orpo_ray.training.schedule import learning_rate, num_steps
from orpo_ray.training.steps import TrialRun
from orpo_ray.training.trial import Decision, Diverged, Progress, RankContext, TrialResult

_log = logging.getLogger(__name__)


_STATUS = {Decision.STOP: Status.STOPPED_EARLY, Decision.PAUSE: Status.PAUSED}


def train(config: ExperimentConfig, ctx: RankContext) -> TrialResult:
    """Run one trial from its start or its last checkpoint to its end. Every rank of the process group calls this.

    Args:
        config: one trial's config (its `sweep` is not looked at).
        ctx: this rank's surroundings.

    Raises:
        DataError, ModelError, CheckpointError: what the trial was given cannot be used.
    """
    started = time.perf_counter()
    checkpoints = Checkpoints(ctx.trial_dir, config.checkpoint, ctx.remote, ctx.control, ctx.on_commit, ctx.on_problem)
    try:
        return _train(config, ctx, checkpoints, started)
    finally:
        checkpoints.close()


def _train(config: ExperimentConfig, ctx: RankContext, checkpoints: Checkpoints, started: float) -> TrialResult:
    found = checkpoints.find()
    run = TrialRun.build(config)
    max_steps = num_steps(config, len(run.train_pairs))
    progress, done = Progress(), 0

    def end(status: Status, at: int, error: str | None = None) -> TrialResult:
        checkpoints.wait()
        return TrialResult(status, at, progress.metrics, checkpoints.committed, progress.train_seconds, error)

    def save(at: int, surely: bool = False) -> None:
        progress.sums = sums.totals()
        (checkpoints.save_surely if surely else checkpoints.save)(run.engine, at, asdict(progress))

    try:
        if found is not None:
            done, saved = checkpoints.load(run.engine, found)
            progress = Progress(**saved)
        earlier_seconds = progress.train_seconds
        if dist.get_rank() == 0:
            ctx.on_start(done, max_steps, run.facts)
        if done and _is_due(done, config.train.eval_every, max_steps) and progress.metrics:
            # A crash may have come between the checkpoint and the owner's word on its evaluation.
            decision = _decide(ctx, done, progress, checkpoints.committed)
            if decision is not Decision.CONTINUE and done < max_steps:
                return end(_STATUS[decision], done)
        sums = PairSums.restored(run.engine.device, progress.sums, kind_of(config.loss))
        clock = Throughput()
        clock.start()
        for at, batch in run.batches(done + 1, max_steps):
            lr = learning_rate(config.optim, at, max_steps)
            grad_norm = run.step(batch, lr, sums, at)
            clock.stop(len(batch.indices), run.num_tokens(batch.indices))
            done = at
            if _is_due(at, config.train.log_every, max_steps):
                metrics = sums.averages("train", steps=at - progress.logged)
                metrics |= {"train/grad_norm": grad_norm, "train/lr": lr} | clock.averages(run.engine.device)
                progress.logged = at
                if dist.get_rank() == 0:
                    ctx.on_log(at, metrics)
            evaluates = _is_due(at, config.train.eval_every, max_steps)
            if evaluates:
                progress.metrics = run.evaluate(at, ctx)
                if dist.get_rank() == 0:
                    made = (PAIRS_FILE, *([GENERATIONS_FILE] if config.writes_answers else []))
                    checkpoints.publish(*(ctx.trial_dir / name for name in made))
            progress.train_seconds = earlier_seconds + time.perf_counter() - started
            if at == max_steps:
                save(at, surely=True)
            elif _is_due(at, config.train.checkpoint_every or config.train.eval_every, max_steps):
                save(at)
            if evaluates:
                decision = _decide(ctx, at, progress, checkpoints.committed)
                if decision is not Decision.CONTINUE and at < max_steps:
                    if decision is Decision.PAUSE:
                        save(at, surely=True)
                    return end(_STATUS[decision], at)
            if at < max_steps and _any_rank(ctx.is_preempted(), ctx):
                save(at, surely=True)
                return end(Status.PREEMPTED, at)
            clock.start()
        return end(Status.FINISHED, done)
    except Diverged as error:
        everywhere = Diverged(error.step, _gather(error.pair_ids, ctx), error.batch_ids)
        progress.train_seconds = earlier_seconds + time.perf_counter() - started
        return end(Status.DIVERGED, error.step, str(everywhere))
    finally:
        destroy(run.engine)


def _is_due(at: int, every: int | None, max_steps: int) -> bool:
    return at == max_steps or (every is not None and at % every == 0)


def _decide(ctx: RankContext, at: int, progress: Progress, path: str | None) -> Decision:
    """Rank 0 asks the trial's owner; all ranks hear the answer."""
    box: list[Decision | None] = [None]
    if dist.get_rank() == 0:
        box = [ctx.on_eval(at, progress.metrics, path, progress.train_seconds)]
    dist.broadcast_object_list(box, src=0, group=ctx.control)
    assert box[0] is not None
    return box[0]


def _any_rank(flag: bool, ctx: RankContext) -> bool:
    """Whether one rank says so. On the host, so the device is not waited for."""
    if dist.get_world_size() == 1:
        return flag
    said = torch.tensor([int(flag)])
    dist.all_reduce(said, op=dist.ReduceOp.MAX, group=ctx.control)
    return bool(said.item())


def _gather(pair_ids: list[str], ctx: RankContext) -> list[str]:
    """The ids found by all ranks, in rank order."""
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, pair_ids, group=ctx.control)
    return [pair_id for ids in everyone for pair_id in ids]
