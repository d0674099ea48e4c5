"""One trial on one rank: its model, pairs and engine, and the optimizer steps and evaluations it makes with them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orpo_ray.config import DataConfig, ExperimentConfig, ModelConfig
from orpo_ray.data.dataset import Pair, PairDataset, batch_indices, load_pairs
from orpo_ray.models.loading import build_model, build_reward_model, count_parameters, load_tokenizer
from orpo_ray.models.packing import Batch, LossMask, micro_batches
from orpo_ray.models.pair_model import ForwardMode, PairModel, pair_logps
from orpo_ray.models.precision import matmul_dtype, precision_name
from orpo_ray.models.probe import probe_forward_mode
from orpo_ray.storage.generations import keep
from orpo_ray.storage.pair_scores import PAIRS_FILE
from orpo_ray.training import loss, reference
from orpo_ray.training.collectives import gather
from orpo_ray.training.engine import build_engine, step
from orpo_ray.training.evaluate import evaluate
from orpo_ray.training.generate import generate
from orpo_ray.training.metrics import PairSums
from orpo_ray.training.rollouts import Rollouts
from orpo_ray.training.trial import Diverged, RankContext

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of this rank within a global batch."""

    members: list[Pair]
    is_counted: bool
    """False for a dummy pass: a rank without pairs must still join the collectives."""
    batch: Batch | None
    """The pairs as tensors on the host; None where the step itself samples the answers."""


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One optimizer step's pairs, and this rank's share of them as tensors on the host."""

    indices: np.ndarray
    """Indices of the training pairs, over all ranks."""
    counts: loss.BatchCounts
    passes: list[Pass]


@dataclass(frozen=True, slots=True)
class TrialRun:
    """Everything that one trial uses on this rank."""

    config: ExperimentConfig
    engine: Any
    """A DeepSpeed engine around a `PairModel`."""
    loss_fn: loss.LossFn
    train_pairs: PairDataset
    eval_pairs: PairDataset
    reference_logps: tuple[np.ndarray, np.ndarray] | None
    """The reference model's means for the training and the held-out pairs, fp32 [N, 2]; None if the loss needs none."""
    loss_mask: LossMask
    pad_token_id: int
    rollouts: Rollouts | None
    """For a loss of answers that the model samples itself."""
    facts: dict[str, Any]
    """Facts about the trial for the tracker, such as the model's number of parameters."""

    @classmethod
    def build(cls, config: ExperimentConfig) -> TrialRun:
        """Load data and model and start an engine. A collective.

        Raises:
            ValueError: the process group has another size than `scaling.num_workers`.
            DataError, ModelError: the trial's data or model cannot be used.
            ReferenceLogpsError: the reference model's log-probabilities cannot be used.
        """
        world = dist.get_world_size()
        if world != config.scaling.num_workers:
            raise ValueError(
                f"scaling.num_workers ({config.scaling.num_workers}) must equal the size of the process group ({world})"
            )
        tokenizer = load_tokenizer(config.model)
        pad_token_id = int(tokenizer.pad_token_id)
        loss_mask = LossMask.of(config.loss, int(tokenizer.eos_token_id))
        train_pairs, eval_pairs = _pairs(config.data, config.model)
        reference_logps = None
        if config.loss.needs_reference:
            reference_logps = (
                reference.logps_of(config, train_pairs, loss_mask, pad_token_id),
                reference.logps_of(config, eval_pairs, loss_mask, pad_token_id),
            )
        build = build_reward_model if config.loss.is_reward else build_model
        lm = build(config.model, config.train.seed)
        parameters, trainable = count_parameters(lm)
        mode, dtype = _agreed(probe_forward_mode(lm, config.model.attention), matmul_dtype(config.train.precision))
        fallback = mode.reason if config.model.attention == "shared_prompt" else ""
        if fallback and dist.get_rank() == 0:
            _log.warning("%s trains in a slower mode: %s", config.model.path, fallback)
        model = PairModel(lm, mode, dtype)
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
            loss_mask=loss_mask,
            pad_token_id=pad_token_id,
            rollouts=Rollouts.of(engine, config, dtype) if config.loss.name == "rloo" else None,
            facts={
                "model/parameters": parameters,
                "model/trainable_parameters": trainable,
                "data/train_pairs": len(train_pairs),
                "data/train_digest": train_pairs.digest,
                "data/eval_pairs": len(eval_pairs),
                "data/eval_digest": eval_pairs.digest,
                "forward/rows": "shared prompt" if mode.shares_prompt else "padded",
                "forward/logits": "in chunks" if mode.chunks_head else "all at once",
                "forward/products": precision_name(dtype),
                "worker/threads": torch.get_num_threads(),
            }
            | ({"forward/fallback": fallback} if fallback else {}),
        )

    def batches(self, first: int, last: int) -> Iterator[tuple[int, GlobalBatch]]:
        """(step, batch) of the steps first..last. A thread prepares the next batch while the caller trains on this."""
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
        """Cut a global batch into micro-batches, and lay out those of this rank."""
        pairs, model = self.train_pairs, self.engine.module
        # Every rank knows the lengths of the whole global batch, so neither its counts nor its cut need communication.
        counts = loss.BatchCounts(pairs=len(indices), nll_tokens=self.loss_mask.nll_tokens(pairs, indices))
        passes = []
        for ranks in micro_batches(
            pairs.lengths_N3[indices],
            dist.get_world_size(),
            max_pairs=self.config.train.micro_batch_size,
            max_tokens=self.config.train.max_tokens_per_micro_batch,
            share_prompt=model.forward_mode.shares_prompt,
        ):
            mine = indices[ranks[dist.get_rank()]]
            chosen = mine if len(mine) else indices[:1]
            members = [pairs[int(i)] for i in chosen]
            batch = None
            if self.rollouts is None:
                batch = model.collate(members, self.loss_mask, self.pad_token_id)
                if self.reference_logps is not None:
                    batch = replace(batch, reference_P2=torch.from_numpy(self.reference_logps[0][chosen]))
                if self.engine.device.type == "cuda":
                    batch = batch.pinned()
            passes.append(Pass(members, bool(len(mine)), batch))
        return GlobalBatch(indices, counts, passes)

    def step(self, batch: GlobalBatch, lr: float, sums: PairSums, at: int) -> float:
        """Make one optimizer step. A collective.

        Args:
            batch: the pairs.
            lr: learning rate.
            sums: counts the step's pairs.
            at: number of the step, from 1.

        Returns:
            The gradient norm before clipping. Only here does the host wait for the device within a step.

        Raises:
            Diverged: the norm is not finite. It is the norm of the global gradient, so every rank raises.
        """
        finite: list[tuple[list[str], torch.Tensor]] = []
        for number, each in enumerate(batch.passes, start=1):
            here = each.batch
            if here is None:
                assert self.rollouts is not None
                here = self.rollouts.batch(each.members, at, number)
            self.engine.set_gradient_accumulation_boundary(number == len(batch.passes))
            logps = pair_logps(self.engine, here.to(self.engine.device))
            terms = self.loss_fn(logps, batch.counts)
            # Shares add up over micro-batches and ranks. DeepSpeed averages over ranks, so each share is multiplied by
            # their number; it would also divide by the accumulation steps, which is turned off.
            share = dist.get_world_size() if each.is_counted else 0.0
            self.engine.backward(terms.loss * share, scale_wrt_gas=False)
            if each.is_counted:
                sums.add(logps, terms)
                pair_ids = [pair.pair_id for pair in each.members]
                finite.append((pair_ids, (logps.chosen_logps_P + logps.rejected_logps_P + logps.nll_sums_P).isfinite()))
        grad_norm = step(self.engine, lr, self.config.optim.max_grad_norm)
        if not math.isfinite(grad_norm):
            lost = [i for ids, flags_P in finite for i, flag in zip(ids, flags_P.tolist(), strict=True) if not flag]
            raise Diverged(at, lost, [self.train_pairs[int(i)].pair_id for i in batch.indices])
        return grad_norm

    def evaluate(self, at: int, ctx: RankContext) -> dict[str, float]:
        """Held-out metrics after step `at`. A collective.

        Rank 0 writes the scores of every pair, and answers to some prompts, to the trial's directory.
        """
        found = evaluate(
            self.engine,
            self.eval_pairs,
            self.config,
            loss.held_out_from_config(self.config.loss),
            self.loss_mask,
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
        """Tokens in the two sequences of each pair: prompts counted twice, padding not."""
        return int((self.train_pairs.lengths_N3[indices] * [2, 1, 1]).sum())


@lru_cache(maxsize=2)
def _pairs(data: DataConfig, model: ModelConfig) -> tuple[PairDataset, PairDataset]:
    """Training and held-out pairs, cached between the trials of a warm worker."""
    return load_pairs(data, load_tokenizer(model))


def _agreed(mode: ForwardMode, dtype: torch.dtype | None) -> tuple[ForwardMode, torch.dtype | None]:
    """The fastest mode and dtype that all ranks support: in different modes they would cut a batch differently."""
    modes, dtypes = zip(*gather((mode, dtype)), strict=True)
    reason = "; ".join(dict.fromkeys(m.reason for m in modes if m.reason))
    agreed = ForwardMode(all(m.shares_prompt for m in modes), all(m.chunks_head for m in modes), reason)
    return agreed, None if None in dtypes else dtype
