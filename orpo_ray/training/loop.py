"""The training loop of one trial on one rank, with torch and a DeepSpeed engine. It does not depend on Ray."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch.distributed as dist

from orpo_ray.config import ExperimentConfig
from orpo_ray.storage.events import Status
from orpo_ray.storage.generations import GENERATIONS_FILE
from orpo_ray.storage.pair_scores import PAIRS_FILE
from orpo_ray.training.checkpoint import Checkpoints
from orpo_ray.training.collectives import any_rank, broadcast, gather
from orpo_ray.training.engine import destroy
from orpo_ray.training.metrics import PairSums, Throughput, kind_of
from orpo_ray.training.schedule import learning_rate, num_steps
from orpo_ray.training.steps import TrialRun
from orpo_ray.training.trial import Decision, Diverged, Progress, RankContext, TrialResult

_STATUS = {Decision.STOP: Status.STOPPED_EARLY, Decision.PAUSE: Status.PAUSED}


def train(config: ExperimentConfig, ctx: RankContext) -> TrialResult:
    """Run one trial to its end, from its start or its last checkpoint. Every rank of the process group calls this.

    Args:
        config: one trial's config (its `sweep` is ignored).
        ctx: this rank's surroundings.

    Raises:
        DataError, ModelError, CheckpointError: the trial's data, model or checkpoint cannot be used.
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
    is_first_rank = dist.get_rank() == 0
    progress, done = Progress(), 0

    def is_due(at: int, every: int | None) -> bool:
        return at == max_steps or (every is not None and at % every == 0)

    def end(status: Status, at: int, error: str | None = None) -> TrialResult:
        checkpoints.wait()
        return TrialResult(status, at, progress.metrics, checkpoints.committed, progress.train_seconds, error)

    def save(at: int, with_retry: bool = False) -> None:
        progress.sums = sums.totals()
        (checkpoints.save_with_retry if with_retry else checkpoints.save)(run.engine, at, asdict(progress))

    try:
        if found is not None:
            done, saved = checkpoints.load(run.engine, found)
            progress = Progress(**saved)
        earlier_seconds = progress.train_seconds
        if is_first_rank:
            ctx.on_start(done, max_steps, run.facts)
        if done and is_due(done, config.train.eval_every) and progress.metrics:
            # A crash may have come after this checkpoint and before the decision on its evaluation.
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
            if is_due(at, config.train.log_every):
                metrics = sums.averages("train", steps=at - progress.logged)
                metrics |= {"train/grad_norm": grad_norm, "train/lr": lr} | clock.averages(run.engine.device)
                progress.logged = at
                if is_first_rank:
                    ctx.on_log(at, metrics)
            evaluates = is_due(at, config.train.eval_every)
            if evaluates:
                progress.metrics = run.evaluate(at, ctx)
                if is_first_rank:
                    written = (PAIRS_FILE, *([GENERATIONS_FILE] if config.writes_answers else []))
                    checkpoints.publish(*(ctx.trial_dir / name for name in written))
            progress.train_seconds = earlier_seconds + time.perf_counter() - started
            if at == max_steps:
                save(at, with_retry=True)
            elif is_due(at, config.train.checkpoint_every or config.train.eval_every):
                save(at)
            if evaluates:
                decision = _decide(ctx, at, progress, checkpoints.committed)
                if decision is not Decision.CONTINUE and at < max_steps:
                    if decision is Decision.PAUSE:
                        save(at, with_retry=True)
                    return end(_STATUS[decision], at)
            if at < max_steps and any_rank(ctx.is_preempted(), ctx.control):
                save(at, with_retry=True)
                return end(Status.PREEMPTED, at)
            clock.start()
        return end(Status.FINISHED, done)
    except Diverged as error:
        pair_ids = [pair_id for ids in gather(error.pair_ids, ctx.control) for pair_id in ids]
        everywhere = Diverged(error.step, pair_ids, error.batch_ids)
        progress.train_seconds = earlier_seconds + time.perf_counter() - started
        return end(Status.DIVERGED, error.step, str(everywhere))
    finally:
        destroy(run.engine)


def _decide(ctx: RankContext, at: int, progress: Progress, checkpoint: str | None) -> Decision:
    """Ask the trial's owner on rank 0 how to continue, and tell all ranks."""
    decision = None
    if dist.get_rank() == 0:
        decision = ctx.on_eval(at, progress.metrics, checkpoint, progress.train_seconds)
    return Decision(broadcast(decision, ctx.control))
