"""From preference pairs to log-probabilities: one padded pass over [prompt | chosen] and [prompt | rejected].

Shape suffixes: P pairs, S = 2P sequences (chosen first), T tokens of the longest sequence, N counted positions,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from orpo_ray.data import Pair
from orpo_ray.loss import PairLogps

NllScope = Literal["prompt_and_response", "response"]


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch, right-padded."""

    input_ids_ST: torch.Tensor
    attention_mask_ST: torch.Tensor
    answer_mask_ST: torch.Tensor
    """True where the token is an answer's."""
    nll_mask_PT: torch.Tensor
    """True where the token of [prompt | chosen] counts in the NLL. The first is never predicted, so never counts."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__slots__))


def nll_tokens(prompt_lengths_N: np.ndarray, chosen_lengths_N: np.ndarray, scope: NllScope) -> np.ndarray:
    """How many tokens of each pair the NLL counts, from the lengths alone.

    Every rank can thus count the global batch without asking the others.
    """
    return (
        chosen_lengths_N + np.maximum(prompt_lengths_N - 1, 0) if scope == "prompt_and_response" else chosen_lengths_N
    )


def collate(pairs: Sequence[Pair], pad_token_id: int, scope: NllScope) -> Batch:
    """Pad P pairs into 2P rows.

    Args:
        pairs: at least one; each answer has at least one token.
        pad_token_id: any id; padding is masked.
        scope: which tokens of [prompt | chosen] the NLL counts.
    """
    answers = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    prompts = [pair.prompt_ids for pair in pairs] * 2
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids_ST = np.full((len(answers), width), pad_token_id, dtype=np.int64)
    present_ST = np.zeros((len(answers), width), dtype=bool)
    answer_ST = np.zeros((len(answers), width), dtype=bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids_ST[row, : len(prompt)] = prompt
        ids_ST[row, len(prompt) : end] = answer
        present_ST[row, :end] = True
        answer_ST[row, len(prompt) : end] = True
    nll_PT = (present_ST if scope == "prompt_and_response" else answer_ST)[: len(pairs)].copy()
    nll_PT[:, 0] = False
    return Batch(*(torch.from_numpy(array) for array in (ids_ST, present_ST.astype(np.int64), answer_ST, nll_PT)))


def pair_logps(model: torch.nn.Module, batch: Batch) -> PairLogps:
    """Run the model once over a micro-batch.

    Vocabulary logits are turned to fp32 log-probabilities only at the N positions that count.

    Args:
        model: a causal language model (or a DeepSpeed engine around one) returning `.logits` [S, T, V].
        batch: on the model's device.
    """
    num_pairs = len(batch.nll_mask_PT)
    logits_STV = model(input_ids=batch.input_ids_ST, attention_mask=batch.attention_mask_ST, use_cache=False).logits
    counted_ST = batch.answer_mask_ST.clone()
    counted_ST[:num_pairs] |= batch.nll_mask_PT
    counted_ST = counted_ST[:, 1:]  # position t predicts token t + 1
    logps_N = -F.cross_entropy(
        logits_STV[:, :-1][counted_ST].float(), batch.input_ids_ST[:, 1:][counted_ST], reduction="none"
    )
    logps_ST = torch.zeros(counted_ST.shape, dtype=torch.float32, device=logps_N.device)
    logps_ST = logps_ST.masked_scatter(counted_ST, logps_N)
    answer_ST = batch.answer_mask_ST[:, 1:]
    means_S = (logps_ST * answer_ST).sum(1) / answer_ST.sum(1)
    nll_PT = batch.nll_mask_PT[:, 1:]
    return PairLogps(
        chosen_logps_P=means_S[:num_pairs],
        rejected_logps_P=means_S[num_pairs:],
        nll_sums_P=-(logps_ST[:num_pairs] * nll_PT).sum(1),
        nll_tokens_P=nll_PT.sum(1),
    )
