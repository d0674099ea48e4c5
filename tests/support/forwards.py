"""Run pairs through a model in one of its forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orpo_ray.data.dataset import Pair
from orpo_ray.models.logps import PairLogps
from orpo_ray.models.packing import LossMask, collate
from orpo_ray.models.pair_model import ForwardMode, PairModel, pair_logps

PLAIN = ForwardMode(shares_prompt=False, chunks_head=False)
"""Padded rows, all logits: what every other code does."""
CHUNKED = ForwardMode(shares_prompt=False, chunks_head=True)
FAST = ForwardMode(shares_prompt=True, chunks_head=True)
FORMS = {"plain": PLAIN, "chunked": CHUNKED, "shared": FAST}
ALL = LossMask("prompt_and_response")


def logps(
    model: torch.nn.Module,
    pairs: Sequence[Pair],
    counting: LossMask = ALL,
    form: ForwardMode = FAST,
    autocast: torch.dtype | None = None,
    pad_token_id: int = 0,
) -> PairLogps:
    """`pair_logps` of one micro-batch. The model's attention function is put back, unless it will be run again."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = causal.config._attn_implementation
    batch = collate(pairs, counting, share_prompt=form.shares_prompt, pad_token_id=pad_token_id)
    found = pair_logps(PairModel(model, form, autocast), batch)
    if before != causal.config._attn_implementation and not causal.is_gradient_checkpointing:
        causal.set_attn_implementation(before)
    return found


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """Of all parameters that have one, flat; and cleared."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat
