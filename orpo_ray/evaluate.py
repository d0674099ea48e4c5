"""The held-out pass: metrics that λ cannot move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orpo_ray.config import ExperimentConfig
from orpo_ray.data import PairDataset
from orpo_ray.forward import pair_logps
from orpo_ray.loss import BatchCounts, LossFn
from orpo_ray.metrics import PairSums
from orpo_ray.packing import Counting, micro_batches


@torch.no_grad()
def evaluate(
    engine: Any,
    pairs: PairDataset,
    config: ExperimentConfig,
    loss_fn: LossFn,
    counting: Counting,
    pad_token_id: int,
    reference_N2: np.ndarray | None = None,
) -> dict[str, float]:
    """Metrics over all held-out pairs, the same on every rank. A collective.

    Args:
        engine: around a `PairModel`.
        pairs: the held-out pairs.
        config: the trial's.
        loss_fn: its objective.
        counting: which tokens that counts.
        pad_token_id: fills rows up.
        reference_N2: the reference model's means of chosen and rejected, where the loss compares with them.

    Returns:
        `eval/loss`, `eval/nll` (the objective's own scope and reduction), `eval/odds_ratio_loss`, `eval/log_odds`,
        `eval/chosen_logp`, `eval/rejected_logp`, `eval/preference_accuracy` (share of pairs whose chosen answer has
        the higher length-normalised log-probability, ties half), and `eval/nll_per_byte`: nats per UTF-8 byte of the
        chosen answers, comparable across tokenizers and NLL scopes.
    """
    everyone = np.arange(len(pairs))
    counts = BatchCounts(pairs=len(pairs), nll_tokens=counting.nll_tokens(pairs, everyone))
    sums = PairSums.zeros(engine.device)
    answer_sums = torch.zeros(2, dtype=torch.float64, device=engine.device)  # nats, bytes
    engine.eval()
    for ranks in micro_batches(
        pairs.lengths_N3,
        dist.get_world_size(),
        max_pairs=config.train.micro_batch_size,
        max_tokens=config.train.max_tokens_per_micro_batch,
        share_prompt=engine.module.form.shares_prompt,
    ):
        mine = ranks[dist.get_rank()]
        # A rank without pairs in this round runs one anyway, uncounted: ZeRO-3 gathers parameters in every pass.
        chosen = mine if len(mine) else everyone[:1]
        members = [pairs[int(i)] for i in chosen]
        batch = engine.module.collate(members, counting, pad_token_id)
        if reference_N2 is not None:
            batch = replace(batch, reference_P2=torch.from_numpy(reference_N2[chosen]))
        logps = pair_logps(engine, batch.to(engine.device))
        if len(mine):
            sums.add(logps, loss_fn(logps, counts))
            answer_sums[0] -= (logps.chosen_logps_P.double() * logps.chosen_tokens_P).sum()
            answer_sums[1] += sum(pair.chosen_bytes for pair in members)
    engine.train()
    if dist.get_world_size() > 1:
        dist.all_reduce(answer_sums)
    return sums.averages("eval") | {"eval/nll_per_byte": float(answer_sums[0] / answer_sums[1])}
