"""The held-out pass: metrics that λ cannot move."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from orpo_ray.config import ExperimentConfig
from orpo_ray.data import PairDataset
from orpo_ray.forward import collate, nll_tokens, pair_logps
from orpo_ray.loss import BatchCounts, LossFn
from orpo_ray.metrics import PairSums


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    pairs: PairDataset,
    config: ExperimentConfig,
    loss_fn: LossFn,
    pad_token_id: int,
    device: torch.device,
) -> dict[str, float]:
    """Metrics over all held-out pairs, the same on every rank. A collective.

    Pairs are sorted by length and dealt to the ranks micro-batch by micro-batch. Every rank runs the same number of
    forward passes (ZeRO-3 gathers parameters in each), the surplus ones uncounted.

    Returns:
        `eval/loss`, `eval/nll` (the objective's own scope and reduction), `eval/odds_ratio_loss`, `eval/log_odds`,
        `eval/chosen_logp`, `eval/rejected_logp`, `eval/preference_accuracy` (share of pairs whose chosen answer has
        the higher length-normalised log-probability, ties half), and `eval/nll_per_byte`: nats per UTF-8 byte of the
        chosen answers, comparable across tokenizers and NLL scopes.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    scope = config.loss.nll_scope
    lengths_N = pairs.prompt_lengths_N + np.maximum(pairs.chosen_lengths_N, pairs.rejected_lengths_N)
    order_N = np.argsort(lengths_N, kind="stable")
    micro_batches = [
        order_N[start : start + config.train.micro_batch_size]
        for start in range(0, len(order_N), config.train.micro_batch_size)
    ]
    counts = BatchCounts(
        pairs=len(pairs),
        nll_tokens=int(nll_tokens(pairs.prompt_lengths_N, pairs.chosen_lengths_N, scope).sum()),
    )
    sums = PairSums.zeros(device)
    answer_sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, bytes
    model.eval()
    for first in range(0, len(micro_batches), world):
        mine = first + rank
        chosen = [pairs[int(i)] for i in micro_batches[min(mine, len(micro_batches) - 1)]]
        batch = collate(chosen, pad_token_id, scope).to(device)
        logps = pair_logps(model, batch)
        if mine < len(micro_batches):
            sums.add(logps, loss_fn(logps, counts), len(chosen))
            chosen_lengths_P = torch.tensor([len(pair.chosen_ids) for pair in chosen], device=device)
            answer_sums[0] -= (logps.chosen_logps_P.double() * chosen_lengths_P).sum()
            answer_sums[1] += sum(pair.chosen_bytes for pair in chosen)
    model.train()
    if world > 1:
        dist.all_reduce(answer_sums)
    return sums.averages("eval") | {"eval/nll_per_byte": float(answer_sums[0] / answer_sums[1])}
