"""The training loop of one trial on one rank. It knows torch and a DeepSpeed engine; it knows nothing of Ray."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orpo_ray.config.experiment import DataConfig, ExperimentConfig, ModelConfig, OptimConfig
from orpo_ray.data.dataset import Pair, PairDataset, batch_indices, load_pairs
from orpo_ray.models.loading import build_model, build_reward_model, count_parameters, load_tokenizer
from orpo_ray.models.packing import Batch, Counting, micro_batches
from orpo_ray.models.pair_model import Form, PairModel, form_of, name_of, pair_logps, product_type
from orpo_ray.storage.object_store import Storage
from orpo_ray.storage.pair_scores import PAIRS_FILE
from orpo_ray.training import loss, reference
from orpo_ray.training.checkpoint import Checkpoints
from orpo_ray.training.engine import build_engine, destroy, step
from orpo_ray.training.evaluate import evaluate
from orpo_ray.training.generate import GENERATIONS_FILE, generate, keep
from orpo_ray.training.metrics import PairSums, Throughput, kind_of
from orpo_ray.training.rollouts import OnlineAnswers

_log = logging.getLogger(__name__)


class Decision(StrEnum):
    """What the trial's owner says after an evaluation."""

    CONTINUE = "continue"
    PAUSE = "pause"
    """Give the process back and go on later from a checkpoint of this step."""
    STOP = "stop"


class Status(StrEnum):
    """How an assignment ended, in the words of results.json."""

    FINISHED = "finished"
    STOPPED_EARLY = "stopped_early"
    PAUSED = "paused"
    """Not an end: there is a checkpoint to go on from."""
    PREEMPTED = "preempted"
    """Not an end either: the process is about to be taken away."""
    DIVERGED = "diverged"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RankContext:
    """What the loop needs from whoever runs it. The callables are called on rank 0 only."""

    trial_dir: Path
    """Checkpoints are kept here; if there is one, the trial continues from it."""
    remote: Storage | None = None
    """The trial's folder in an object store: `trial_dir` is then on this node's own disk."""
    on_start: Callable[[int, int, dict[str, Any]], None] = lambda step, max_steps, facts: None
    """(steps already done, steps in all, facts such as the model's parameters) when training begins."""
    on_log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    """(step, training metrics)."""
    on_eval: Callable[[int, dict[str, float], str | None, float], Decision] = lambda step, metrics, path, seconds: (
        Decision.CONTINUE
    )
    """(step, held-out metrics, last checkpoint, seconds of training so far) -> whether to go on."""
    on_commit: Callable[[], None] = lambda: None
    """Returns when all that was told so far is written down; asked before a checkpoint counts, in another thread."""
    on_problem: Callable[[str], None] = lambda message: None
    """Something went wrong that does not end the trial. Also called in another thread."""
    is_preempted: Callable[[], bool] = lambda: False
    """Whether this rank's process is about to be taken away. Called on every rank after every step."""
    control: Any = None
    """Process group for small host-side messages; the default group if None."""


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The same on every rank."""

    status: Status
    steps: int
    metrics: dict[str, float]
    """The last evaluation."""
    checkpoint: str | None
    train_seconds: float
    error: str | None = None


@dataclass(slots=True)
class Progress:
    """What a checkpoint remembers of the loop; the sampler is a function of the step, so nothing of it is kept."""

    metrics: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    logged: int = 0
    """Step of the last report of training metrics."""
    sums: list[float] = field(default_factory=list)
    """What has been counted since (`PairSums.totals`), so that the next report is that of an undisturbed run."""


_STATUS = {Decision.STOP: Status.STOPPED_EARLY, Decision.PAUSE: Status.PAUSED}


class Diverged(ArithmeticError):
    """The gradient of a step is not finite. Raised on every rank alike.

    Attributes:
        step: the optimizer step.
        pair_ids: pairs of the global batch whose log-probabilities this rank found not finite.
        batch_ids: all pairs of the global batch.
    """

    def __init__(self, step: int, pair_ids: list[str], batch_ids: list[str]) -> None:
        super().__init__(step, pair_ids, batch_ids)
        self.step, self.pair_ids, self.batch_ids = step, pair_ids, batch_ids

    def __str__(self) -> str:
        if self.pair_ids:
            return f"log-probabilities not finite at step {self.step} for {_listed(self.pair_ids)}"
        return f"gradient not finite at step {self.step}, a batch of {_listed(self.batch_ids)}"


def _listed(pair_ids: list[str]) -> str:
    shown = ", ".join(pair_ids[:8]) + (", ..." if len(pair_ids) > 8 else "")
    return f"{len(pair_ids)} pair(s): {shown}"


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
    run = _Run.build(config)
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


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of this rank within a global batch."""

    members: list[Pair]
    counts: bool
    """Whether they count: a rank that ran out of pairs keeps the others company with one of theirs."""
    batch: Batch | None
    """Laid out on the host; None where the answers are sampled in the step."""


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One optimizer step's pairs, and this rank's share of them as tensors on the host."""

    indices: np.ndarray
    """Which training pairs, over all ranks."""
    counts: loss.BatchCounts
    passes: list[Pass]


@dataclass(frozen=True, slots=True)
class _Run:
    """What one trial works with on this rank."""

    config: ExperimentConfig
    engine: Any
    loss_fn: loss.LossFn
    train_pairs: PairDataset
    eval_pairs: PairDataset
    reference_logps: tuple[np.ndarray, np.ndarray] | None
    """Of the training and of the held-out pairs, fp32 [N, 2], where the loss compares with a reference model."""
    counting: Counting
    pad_token_id: int
    online: OnlineAnswers | None
    """Where the loss is of answers that the model samples itself."""
    facts: dict[str, Any]

    @classmethod
    def build(cls, config: ExperimentConfig) -> _Run:
        world = dist.get_world_size()
        if world != config.scaling.num_workers:
            raise ValueError(
                f"scaling.num_workers ({config.scaling.num_workers}) must equal the size of the process group ({world})"
            )
        tokenizer = load_tokenizer(config.model)
        counting = Counting.of(config.loss, int(tokenizer.eos_token_id))
        train_pairs, eval_pairs = _pairs(config.data, config.model)
        reference_logps = None
        if config.loss.needs_reference:
            train_reference, eval_reference = (
                reference.logps_of(config, pairs, counting, int(tokenizer.pad_token_id))
                for pairs in (train_pairs, eval_pairs)
            )
            reference_logps = train_reference, eval_reference
        build = build_reward_model if config.loss.is_reward else build_model
        lm = build(config.model, config.train.seed)
        parameters, trainable = count_parameters(lm)
        form, products = _agreed(form_of(lm, config.model.attention), product_type(config.train.precision))
        fallback = form.reason if config.model.attention == "shared_prompt" else ""
        if fallback and dist.get_rank() == 0:
            _log.warning("%s runs in a slower form: %s", config.model.path, fallback)
        model = PairModel(lm, form, products)
        torch.manual_seed(config.train.seed + dist.get_rank())  # dropout differs between ranks
        engine = build_engine(model, config)
        engine.train()
        return cls(
            config=config,
            engine=engine,
            loss_fn=loss.from_config(config.loss),
            train_pairs=train_pairs,
            eval_pairs=eval_pairs,
            reference_logps=reference_logps,
            counting=counting,
            pad_token_id=int(tokenizer.pad_token_id),
            online=OnlineAnswers.of(engine, config, products) if config.loss.name == "rloo" else None,
            facts={
                "model/parameters": parameters,
                "model/trainable_parameters": trainable,
                "data/train_pairs": len(train_pairs),
                "data/train_digest": train_pairs.digest,
                "data/eval_pairs": len(eval_pairs),
                "data/eval_digest": eval_pairs.digest,
                "forward/rows": "shared prompt" if form.shares_prompt else "padded",
                "forward/logits": "in chunks" if form.chunks_head else "all at once",
                "forward/products": name_of(products),
                "worker/threads": torch.get_num_threads(),
            }
            | ({"forward/fallback": fallback} if fallback else {}),
        )

    def batches(self, first: int, last: int) -> Iterator[tuple[int, GlobalBatch]]:
        """(step, batch) of the steps first..last. The next one is prepared while the caller trains on this one."""
        pairs, train = self.train_pairs, self.config.train

        def prepare(at: int) -> GlobalBatch:
            return self.prepare(batch_indices(at, len(pairs), train.global_batch_size, train.seed))

        with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
            coming = thread.submit(prepare, first) if first <= last else None
            for at in range(first, last + 1):
                assert coming is not None
                batch = coming.result()
                if at < last:
                    coming = thread.submit(prepare, at + 1)
                yield at, batch

    def prepare(self, indices: np.ndarray) -> GlobalBatch:
        """Cut a global batch into micro-batches, and lay this rank's ones out."""
        pairs, model = self.train_pairs, self.engine.module
        # Every rank knows the lengths of the whole global batch, so neither its counts nor its cut need communication.
        counts = loss.BatchCounts(pairs=len(indices), nll_tokens=self.counting.nll_tokens(pairs, indices))
        passes = []
        for ranks in micro_batches(
            pairs.lengths_N3[indices],
            dist.get_world_size(),
            max_pairs=self.config.train.micro_batch_size,
            max_tokens=self.config.train.max_tokens_per_micro_batch,
            share_prompt=model.form.shares_prompt,
        ):
            mine = indices[ranks[dist.get_rank()]]
            chosen = mine if len(mine) else indices[:1]
            members = [pairs[int(i)] for i in chosen]
            batch = None
            if self.online is None:
                batch = model.collate(members, self.counting, self.pad_token_id)
                if self.reference_logps is not None:
                    batch = replace(batch, reference_P2=torch.from_numpy(self.reference_logps[0][chosen]))
                if self.engine.device.type == "cuda":
                    batch = batch.pinned()
            passes.append(Pass(members, bool(len(mine)), batch))
        return GlobalBatch(indices, counts, passes)

    def step(self, batch: GlobalBatch, lr: float, sums: PairSums, at: int) -> float:
        """One optimizer step; returns the gradient norm before clipping.

        Reading that norm is the only time in a step that the host waits for the device.

        Raises:
            Diverged: that norm is not finite. It is the norm of the global gradient, so every rank raises.
        """
        finite: list[tuple[list[str], torch.Tensor]] = []
        for number, each in enumerate(batch.passes, start=1):
            here = each.batch
            if here is None:
                assert self.online is not None
                here = self.online.batch(each.members, at, number)
            self.engine.set_gradient_accumulation_boundary(number == len(batch.passes))
            logps = pair_logps(self.engine, here.to(self.engine.device))
            terms = self.loss_fn(logps, batch.counts)
            # Shares add up over micro-batches and ranks; DeepSpeed averages over ranks, so each share is scaled up by
            # their number, and told not to divide by the accumulation steps.
            share = dist.get_world_size() if each.counts else 0.0
            self.engine.backward(terms.loss * share, scale_wrt_gas=False)
            if each.counts:
                sums.add(logps, terms)
                pair_ids = [pair.pair_id for pair in each.members]
                finite.append((pair_ids, (logps.chosen_logps_P + logps.rejected_logps_P + logps.nll_sums_P).isfinite()))
        grad_norm = step(self.engine, lr, self.config.optim.max_grad_norm)
        if not math.isfinite(grad_norm):
            lost = [i for ids, flags_P in finite for i, flag in zip(ids, flags_P.tolist(), strict=True) if not flag]
            raise Diverged(at, lost, [self.train_pairs[int(i)].pair_id for i in batch.indices])
        return grad_norm

    def evaluate(self, at: int, ctx: RankContext) -> dict[str, float]:
        """Held-out metrics after step `at`.

        Rank 0 leaves in the trial's directory the pairs that they are averages of, and answers to some prompts.
        """
        found = evaluate(
            self.engine,
            self.eval_pairs,
            self.config,
            loss.held_out_from_config(self.config.loss),
            self.counting,
            self.pad_token_id,
            None if self.reference_logps is None else self.reference_logps[1],
        )
        if dist.get_rank() == 0:
            found.pair_scores(at, self.eval_pairs, self.config.loss).save(ctx.trial_dir / PAIRS_FILE)
        if self.config.writes_answers:
            tokenizer = load_tokenizer(self.config.model)
            rows = generate(self.engine, self.eval_pairs, self.config.generation, tokenizer, at, ctx.control)
            if dist.get_rank() == 0:
                keep(ctx.trial_dir, rows, at)
        return found.metrics

    def num_tokens(self, indices: np.ndarray) -> int:
        """Tokens of the two sequences of each pair: prompts counted twice, padding not."""
        return int((self.train_pairs.lengths_N3[indices] * [2, 1, 1]).sum())


def num_steps(config: ExperimentConfig, num_pairs: int) -> int:
    """Optimizer steps of a trial: `max_steps`, or `epochs` over so many pairs, rounded up."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    assert config.train.epochs is not None
    return math.ceil(config.train.epochs * num_pairs / config.train.global_batch_size)


def learning_rate(optim: OptimConfig, at: int, max_steps: int) -> float:
    """Learning rate of optimizer step `at` (from 1). Linear warm-up reaches `lr` at its last step.

    After it: cosine and linear fall to 0 one step past the end, inverse_sqrt is lr · sqrt(warmup / step).
    """
    warmup = optim.warmup_steps if optim.warmup_steps is not None else round(optim.warmup_ratio * max_steps)
    if at <= warmup:
        return optim.lr * at / warmup
    share = (at - warmup) / (max_steps - warmup + 1)
    match optim.schedule:
        case "cosine":
            return optim.lr * 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            return optim.lr * (1 - share)
        case "inverse_sqrt":
            return optim.lr * math.sqrt(max(warmup, 1) / at)
        case "constant":
            return optim.lr


@lru_cache(maxsize=2)
def _pairs(data: DataConfig, model: ModelConfig) -> tuple[PairDataset, PairDataset]:
    """Kept between the trials of a warm worker."""
    return load_pairs(data, load_tokenizer(model))


def _agreed(form: Form, products: torch.dtype | None) -> tuple[Form, torch.dtype | None]:
    """What all ranks can do: were one alone to pad, it would cut the batch differently from the others."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (form, products))
    forms, types = zip(*everyone, strict=True)
    reason = "; ".join(dict.fromkeys(f.reason for f in forms if f.reason))
    agreed = Form(all(f.shares_prompt for f in forms), all(f.chunks_head for f in forms), reason)
    return agreed, None if None in types else products


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
