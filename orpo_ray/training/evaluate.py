"""The held-out pass: metrics over all held-out pairs, and the scores of each pair that they average."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orpo_ray.config import ExperimentConfig, LossConfig
from orpo_ray.data.dataset import Pair, PairDataset
from orpo_ray.models.logps import PairLogps
from orpo_ray.models.packing import LossMask, micro_batches
from orpo_ray.models.pair_model import pair_logps
from orpo_ray.storage.pair_scores import PairScores
from orpo_ray.training.loss import BatchCounts, LossFn, LossTerms
from orpo_ray.training.metrics import PairSums, held_out_kind_of


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The same on every rank."""

    metrics: dict[str, float]
    """Averages over the pairs."""
    columns_NC: np.ndarray
    """fp64: the scores of each pair; `pair_scores` names the columns."""

    def pair_scores(self, step: int, pairs: PairDataset, loss: LossConfig) -> PairScores:
        """The columns with their names, and the settings needed to compute the metrics from them.

        Args:
            step: optimizer steps done.
            pairs: the held-out pairs.
            loss: the trial's objective.
        """
        chosen, rejected, log_odds, odds_ratio_loss, preference_loss, nll_sum, nll_tokens, nats, num_bytes = (
            self.columns_NC.T
        )
        return PairScores(
            step=step,
            pair_ids_N=_pair_ids(pairs),
            # Computed in fp32, so nothing is lost.
            chosen_logp_N=chosen.astype(np.float32),
            rejected_logp_N=rejected.astype(np.float32),
            log_odds_N=log_odds.astype(np.float32),
            odds_ratio_loss_N=odds_ratio_loss.astype(np.float32),
            preference_loss_N=preference_loss.astype(np.float32),
            nll_sum_N=nll_sum.astype(np.float32),
            nll_tokens_N=nll_tokens.astype(np.int64),
            answer_nats_N=nats,
            answer_bytes_N=num_bytes.astype(np.int64),
            nll_reduction=loss.nll_reduction,
            loss_weights=_loss_weights(loss),
        )


@dataclass(slots=True)
class _Columns:
    """This rank's rows of `Evaluation.columns_NC`; they stay on the device until `gathered`."""

    indices: list[np.ndarray] = field(default_factory=list)
    measured: list[torch.Tensor] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)

    def add(self, indices_P: np.ndarray, members: list[Pair], logps: PairLogps, terms: LossTerms) -> None:
        """Append the pairs of a micro-batch."""
        nats_P = -logps.chosen_logps_P.double() * logps.chosen_tokens_P
        rest = (terms.log_odds_P, terms.odds_ratio_loss_P, terms.preference_loss_P, logps.nll_sums_P)
        columns = (logps.chosen_logps_P, logps.rejected_logps_P, *rest, logps.nll_tokens_P, nats_P)
        self.measured.append(torch.stack([column_P.double() for column_P in columns], dim=1))
        self.indices.append(indices_P)
        self.num_bytes += [pair.chosen_bytes for pair in members]

    def gathered(self, num_pairs: int, device: torch.device) -> np.ndarray:
        """The rows of all ranks, fp64 [N, C]. A collective, with one message and the only wait for the device."""
        rows_NC = torch.zeros(num_pairs, 9, dtype=torch.float64, device=device)
        if self.measured:
            num_bytes_M = torch.tensor(self.num_bytes, dtype=torch.float64, device=device)
            at_M = torch.from_numpy(np.concatenate(self.indices)).to(device)
            rows_NC[at_M] = torch.cat([torch.cat(self.measured), num_bytes_M[:, None]], dim=1)
        if dist.get_world_size() > 1:
            dist.all_reduce(rows_NC)  # each row is zero on all ranks but one
        return rows_NC.cpu().numpy()


@torch.no_grad()
def evaluate(
    engine: Any,
    pairs: PairDataset,
    config: ExperimentConfig,
    loss_fn: LossFn,
    loss_mask: LossMask,
    pad_token_id: int,
    reference_N2: np.ndarray | None = None,
) -> Evaluation:
    """Metrics over all held-out pairs and the scores of each pair, the same on every rank. A collective.

    Args:
        engine: around a `PairModel`.
        pairs: the held-out pairs.
        config: the trial's.
        loss_fn: the objective.
        loss_mask: which tokens it counts.
        pad_token_id: pads rows.
        reference_N2: the reference model's means of chosen and rejected, if the loss compares with them.

    Returns:
        Metrics: `eval/loss`, `eval/nll` (the objective's own scope and reduction), `eval/odds_ratio_loss`,
        `eval/log_odds`, `eval/chosen_logp`, `eval/rejected_logp`, `eval/preference_accuracy` (share of pairs whose
        chosen answer has the higher length-normalised log-probability, ties half), and `eval/nll_per_byte`: nats per
        UTF-8 byte of the chosen answers, comparable across tokenizers and NLL scopes. A reward model has `eval/loss`,
        `eval/chosen_reward`, `eval/rejected_reward`, `eval/reward_margin`, and as accuracy the share of pairs whose
        chosen answer has the higher reward. rloo has no `eval/loss`, as its loss needs sampled answers.
    """
    everyone = np.arange(len(pairs))
    counts = BatchCounts(pairs=len(pairs), nll_tokens=loss_mask.nll_tokens(pairs, everyone))
    sums = PairSums.zeros(engine.device, held_out_kind_of(config.loss))
    answer_sums = torch.zeros(2, dtype=torch.float64, device=engine.device)  # nats, bytes
    columns = _Columns()
    engine.eval()
    for ranks in micro_batches(
        pairs.lengths_N3,
        dist.get_world_size(),
        max_pairs=config.train.micro_batch_size,
        max_tokens=config.train.max_tokens_per_micro_batch,
        share_prompt=engine.module.forward_mode.shares_prompt,
    ):
        mine = ranks[dist.get_rank()]
        # A rank without pairs in this round makes a dummy pass: ZeRO-3 gathers parameters in every pass.
        chosen = mine if len(mine) else everyone[:1]
        members = [pairs[int(i)] for i in chosen]
        batch = engine.module.collate(members, loss_mask, pad_token_id)
        if reference_N2 is not None:
            batch = replace(batch, reference_P2=torch.from_numpy(reference_N2[chosen]))
        logps = pair_logps(engine, batch.to(engine.device))
        if len(mine):
            terms = loss_fn(logps, counts)
            sums.add(logps, terms)
            columns.add(mine, members, logps, terms)
            answer_sums[0] -= (logps.chosen_logps_P.double() * logps.chosen_tokens_P).sum()
            answer_sums[1] += sum(pair.chosen_bytes for pair in members)
    engine.train()
    if dist.get_world_size() > 1:
        dist.all_reduce(answer_sums)
    metrics = sums.averages("eval")
    if not config.loss.is_reward:
        metrics["eval/nll_per_byte"] = float(answer_sums[0] / answer_sums[1])
    if config.loss.name == "rloo":
        del metrics["eval/loss"]
    return Evaluation(metrics, columns.gathered(len(pairs), engine.device))


def _loss_weights(loss: LossConfig) -> tuple[float, float]:
    """Weights of the NLL and of the mean preference term in the objective (`training.loss`)."""
    match loss.name:
        case "orpo" | "sft":
            assert loss.orpo_lambda is not None
            return 1.0, loss.orpo_lambda
        case "cpo":
            assert loss.nll_weight is not None
            return loss.nll_weight, 1.0
        case "dpo" | "ipo" | "simpo" | "reward":
            return 0.0, 1.0
        case "rloo":
            return 0.0, 0.0


@lru_cache(maxsize=2)
def _pair_ids(pairs: PairDataset) -> np.ndarray:
    """UTF-8 ids in order. Cached, like the pairs themselves, between the trials of a warm worker."""
    return np.array([pairs[index].pair_id.encode() for index in range(len(pairs))])
