"""Pack pairs into micro-batches: [prompt | chosen | rejected] rows, or padded rows where a model needs them.

Shape suffixes: P pairs of a micro-batch, T tokens of a row, R rows, N targets, K = 3P sums over them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from orpo_ray.config import LossConfig
from orpo_ray.data.dataset import Pair, PairDataset

NllScope = Literal["prompt_and_response", "response"]
_OUTSIDE = -1
"""Pair and part of a padding token."""


@dataclass(frozen=True, slots=True)
class LossMask:
    """Which tokens the loss counts (law 1); `LossConfig` explains each setting."""

    nll_scope: NllScope
    nll_eos: bool = True
    answer_padding: bool = False
    eos_token_id: int = -1
    """Needed only if `nll_eos` is off or `answer_padding` is on."""
    rewards: bool = False
    """For reward models: no token is predicted, the reward is read at each answer's last token, there is no NLL."""

    @classmethod
    def of(cls, loss: LossConfig, eos_token_id: int) -> LossMask:
        """The mask that an experiment's loss asks for."""
        return cls(loss.nll_scope, loss.nll_eos, loss.answer_padding, eos_token_id, loss.is_reward)

    def nll_tokens(self, pairs: PairDataset, indices_B: np.ndarray) -> int:
        """Number of tokens that the NLL of these pairs counts. Every rank can compute it for the whole global batch."""
        if self.rewards:
            return 0
        tokens = int(pairs.chosen_lengths_N[indices_B].sum())
        if self.nll_scope == "prompt_and_response":
            tokens += int(np.maximum(pairs.prompt_lengths_N[indices_B] - 1, 0).sum())
        return tokens if self.nll_eos else tokens - sum(self._eos_targets(pairs[int(i)]) for i in indices_B)

    def _eos_targets(self, pair: Pair) -> int:
        found = np.count_nonzero(pair.chosen_ids == self.eos_token_id)
        if self.nll_scope == "prompt_and_response":
            found += np.count_nonzero(pair.prompt_ids[1:] == self.eos_token_id)
        return int(found)


@dataclass(frozen=True, slots=True)
class SharedPrompt:
    """Layout of pairs in one row: pair after pair, each as prompt, chosen, rejected.

    A token attends to the tokens before it in its own pair, except that rejected tokens do not attend to chosen ones.
    """

    lengths: tuple[tuple[int, int, int], ...]
    """(prompt, chosen, rejected) tokens of each pair."""
    pair_T: torch.Tensor
    """int32: index of the pair that a token belongs to; -1 for padding."""
    part_T: torch.Tensor
    """int32: 0 prompt, 1 chosen, 2 rejected, -1 padding."""
    position_T: torch.Tensor
    """int32: position in its own sequence, [prompt | chosen] or [prompt | rejected]."""

    def sees_TT(self, window: int | None = None) -> torch.Tensor:
        """The full mask, bool [T queries, T keys]: the definition that faster implementations are tested against.

        Args:
            window: a query attends to keys less than this far before it; None for no limit.
        """
        at_T = torch.arange(len(self.pair_T), device=self.pair_T.device)
        return self.sees(at_T[:, None], at_T[None, :], window)

    def sees(self, query: torch.Tensor, key: torch.Tensor, window: int | None = None) -> torch.Tensor:
        """Whether the tokens at `query` attend to those at `key`; broadcasts (FlexAttention's `mask_mod`)."""
        own = self.pair_T[query] == self.pair_T[key]
        hidden = (self.part_T[query] == 2) & (self.part_T[key] == 1)
        seen = own & (query >= key) & ~hidden
        return seen if window is None else seen & (self.position_T[query] - self.position_T[key] < window)


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of P pairs, the N targets whose log-probabilities it asks for, and the weights of K sums."""

    input_ids_RT: torch.Tensor
    position_ids_RT: torch.Tensor | None
    """None for padded rows: the model then counts from 0."""
    attention_mask_RT: torch.Tensor | None
    """1 where a token is real; None for rows with a `layout`."""
    layout: SharedPrompt | None
    """None: one sequence per row, padded on the right; chosen sequences first."""
    source_N: torch.Tensor
    """int64: place in the flattened rows whose output predicts the target, or gives an answer's reward. 0 in padding
    targets."""
    target_N: torch.Tensor
    """int64: token id; 0 where rewards are read, and in padding targets."""
    weights_KN: torch.Tensor
    """fp32: rows 0..P-1 average the chosen answers' targets, P..2P-1 the rejected ones', 2P..3P-1 sum the NLL's."""
    tokens_K: torch.Tensor
    """fp32: number of targets that each of those rows counts."""
    reference_P2: torch.Tensor | None = None
    """fp32: the reference model's means of chosen and rejected, for the losses that compare with it."""
    rewards_P2: torch.Tensor | None = None
    """fp32: the reward model's rewards of both answers, for rloo."""

    def mask_arguments(self) -> dict[str, Any]:
        """Attention-mask arguments for the model."""
        if self.layout is not None:
            return {"position_ids": self.position_ids_RT, "layout": self.layout}
        return {"attention_mask": self.attention_mask_RT}

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        layout = None if self.layout is None else replace(self.layout, **_tensors_on(self.layout, device))
        return replace(self, layout=layout, **_tensors_on(self, device))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while the host continues."""

        def pin(holder: Batch | SharedPrompt) -> dict[str, Any]:
            fields = {name: getattr(holder, name) for name in holder.__slots__}
            return {name: t.pin_memory() for name, t in fields.items() if isinstance(t, torch.Tensor)}

        return replace(self, layout=self.layout and replace(self.layout, **pin(self.layout)), **pin(self))


def _tensors_on(holder: Batch | SharedPrompt, device: torch.device) -> dict[str, Any]:
    fields = {name: getattr(holder, name) for name in holder.__slots__}
    return {name: t.to(device, non_blocking=True) for name, t in fields.items() if isinstance(t, torch.Tensor)}


def collate(
    pairs: Sequence[Pair], loss_mask: LossMask, *, share_prompt: bool, pad_token_id: int = 0, multiple_of: int = 1
) -> Batch:
    """Lay P pairs out for one forward pass.

    Args:
        pairs: at least one; prompts and answers have at least one token each.
        loss_mask: which tokens count.
        share_prompt: one row [prompt | chosen | rejected | prompt | ...]; otherwise 2P padded rows.
        pad_token_id: pads rows; any id will do, padding is masked everywhere.
        multiple_of: a shared row is padded to a multiple of this many tokens, and N with targets that no sum counts.
    """
    num = len(pairs)
    width = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    tokens = 0
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    counted: list[tuple[int, int, int]] = []  # row of weights, first target, end
    nll_targets: list[np.ndarray] = []
    at = 0

    def count(source: np.ndarray, target: np.ndarray, answer_row: int | None, nll_row: int | None) -> None:
        nonlocal at
        sources.append(source)
        targets.append(target)
        if answer_row is not None:
            counted.append((answer_row, at, at + len(target)))
        if nll_row is not None:
            kept = np.arange(at, at + len(target))
            nll_targets.append(
                np.stack([np.full(len(kept), nll_row), kept])[:, loss_mask.nll_eos | (target != loss_mask.eos_token_id)]
            )
        at += len(target)

    for index, pair in enumerate(pairs):
        prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
        first = tokens if share_prompt else index * width
        chosen_from = first + prompt
        rejected_prompt_end = chosen_from - 1 if share_prompt else (num + index) * width + prompt - 1
        rejected_from = chosen_from + chosen if share_prompt else rejected_prompt_end + 1
        tokens += prompt + chosen + rejected
        if loss_mask.rewards:
            for end, row in ((chosen_from + chosen, index), (rejected_from + rejected, num + index)):
                count(np.array([end - 1]), np.zeros(1, dtype=np.int64), row, None)
            continue
        if loss_mask.nll_scope == "prompt_and_response":
            count(np.arange(first, first + prompt - 1), pair.prompt_ids[1:], None, 2 * num + index)
        count(np.arange(chosen_from - 1, chosen_from + chosen - 1), pair.chosen_ids, index, 2 * num + index)
        rejected_sources = np.arange(rejected_from - 1, rejected_from + rejected - 1)
        rejected_sources[0] = rejected_prompt_end
        count(rejected_sources, pair.rejected_ids, num + index, None)
        if loss_mask.answer_padding:
            eos = np.array([loss_mask.eos_token_id])
            count(np.array([chosen_from + chosen - 1]), eos, index, None)
            count(np.array([rejected_from + rejected - 1]), eos, num + index, None)

    padding = np.zeros(-at % multiple_of, dtype=np.int64)  # place 0 and token id 0
    weights_KN = np.zeros((3 * num, at + len(padding)), dtype=np.float32)
    for row, start, end in counted:
        weights_KN[row, start:end] = 1.0
    for places in nll_targets:
        weights_KN[tuple(places)] = 1.0
    tokens_K = weights_KN.sum(1)
    weights_KN[: 2 * num] /= tokens_K[: 2 * num, None]
    rows = (
        _shared_row(pairs, tokens, pad_token_id, multiple_of) if share_prompt else _padded(pairs, width, pad_token_id)
    )
    return Batch(
        **rows,
        source_N=torch.from_numpy(np.concatenate([*sources, padding])),
        target_N=torch.from_numpy(np.concatenate([*targets, padding]).astype(np.int64)),
        weights_KN=torch.from_numpy(weights_KN),
        tokens_K=torch.from_numpy(tokens_K),
    )


def _shared_row(pairs: Sequence[Pair], tokens: int, pad_token_id: int, multiple_of: int) -> dict[str, Any]:
    width = -(-tokens // multiple_of) * multiple_of
    ids_T = np.full(width, pad_token_id, dtype=np.int64)
    pair_T, part_T = np.full(width, _OUTSIDE, dtype=np.int32), np.full(width, _OUTSIDE, dtype=np.int32)
    position_T = np.zeros(width, dtype=np.int32)
    lengths, at = [], 0
    for index, pair in enumerate(pairs):
        prompt = len(pair.prompt_ids)
        for part, ids in enumerate((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)):
            here = slice(at, at + len(ids))
            ids_T[here], pair_T[here], part_T[here] = ids, index, part
            position_T[here] = np.arange(len(ids)) + (prompt if part else 0)
            at += len(ids)
        lengths.append((prompt, len(pair.chosen_ids), len(pair.rejected_ids)))
    layout = SharedPrompt(tuple(lengths), *(torch.from_numpy(array) for array in (pair_T, part_T, position_T)))
    return {
        "input_ids_RT": torch.from_numpy(ids_T)[None],
        "position_ids_RT": layout.position_T[None].long(),
        "attention_mask_RT": None,
        "layout": layout,
    }


def _padded(pairs: Sequence[Pair], width: int, pad_token_id: int) -> dict[str, Any]:
    sequences = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    ids_RT = np.full((len(sequences), width), pad_token_id, dtype=np.int64)
    real_RT = np.zeros((len(sequences), width), dtype=np.int64)
    for row, parts in enumerate(sequences):
        ids = np.concatenate(parts)
        ids_RT[row, : len(ids)] = ids
        real_RT[row, : len(ids)] = 1
    return {
        "input_ids_RT": torch.from_numpy(ids_RT),
        "position_ids_RT": None,
        "attention_mask_RT": torch.from_numpy(real_RT),
        "layout": None,
    }


def micro_batches(
    lengths_B3: np.ndarray, world: int, *, max_pairs: int | None, max_tokens: int, share_prompt: bool
) -> list[list[np.ndarray]]:
    """Cut a global batch into micro-batches so that the ranks do equal work at the same time.

    A pure function of the lengths, so every rank computes the same cut. How a batch is cut does not change its gradient
    (law 2).

    Args:
        lengths_B3: int [pairs of the global batch, 3]: prompt, chosen, rejected tokens.
        world: ranks.
        max_pairs: most pairs per micro-batch; None for no limit.
        max_tokens: most tokens per micro-batch, padding included; a longer pair gets a micro-batch of its own.
        share_prompt: layout of the rows (see `collate`).

    Returns:
        [passes][ranks] arrays of indices into the global batch. Every rank makes the same number of passes (ZeRO
        partitions communicate in each); with fewer pairs than passes × ranks, some arrays are empty.
    """
    prompt_B, chosen_B, rejected_B = lengths_B3.T
    limit = max_pairs or len(lengths_B3)
    if share_prompt:
        bins = _balanced(prompt_B + chosen_B + rejected_B, world, limit, max_tokens)
    else:
        bins = _similar_lengths(2 * (prompt_B + np.maximum(chosen_B, rejected_B)), world, limit, max_tokens)
    return [bins[first : first + world] for first in range(0, len(bins), world)]


def _balanced(size_B: np.ndarray, world: int, max_pairs: int, max_tokens: int) -> list[np.ndarray]:
    """Distribute pairs over as few rounds as possible, the longest pair first into the emptiest bin.

    The largest load is at most 4/3 of the best possible (Graham 1969). Bins are sorted by load, so that the ranks'
    passes of one round take equally long.
    """
    most = -(-len(size_B) // world)
    rounds = min(most, max(-(-int(size_B.sum()) // (max_tokens * world)), -(-len(size_B) // (max_pairs * world))))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * world)]
        loads = [0] * len(bins)
        emptiest_first = [(0, i) for i in range(len(bins))]  # a heap
        for pair in np.argsort(-size_B, kind="stable"):
            load, i = heapq.heappop(emptiest_first)
            bins[i].append(int(pair))
            loads[i] = load + int(size_B[pair])
            if len(bins[i]) < max_pairs:
                heapq.heappush(emptiest_first, (loads[i], i))
        if rounds == most or all(load <= max_tokens or len(b) == 1 for load, b in zip(loads, bins, strict=True)):
            return [np.array(bins[i], dtype=np.int64) for i in sorted(range(len(bins)), key=lambda i: -loads[i])]
        rounds += 1


def _similar_lengths(size_B: np.ndarray, world: int, max_pairs: int, max_tokens: int) -> list[np.ndarray]:
    """Put pairs of similar length into one bin, so that little is padded; longest first."""
    order = np.argsort(-size_B, kind="stable")
    cuts = [0]
    while cuts[-1] < len(order):
        cuts.append(
            cuts[-1] + max(1, min(max_tokens // int(size_B[order[cuts[-1]]]), max_pairs, len(order) - cuts[-1]))
        )
    bins = np.split(order, cuts[1:-1])
    while len(bins) % world:  # every rank needs a bin: halve the fullest one
        fullest = max(range(len(bins)), key=lambda i: len(bins[i]))
        bins[fullest : fullest + 1] = np.array_split(bins[fullest], 2)
    return bins
