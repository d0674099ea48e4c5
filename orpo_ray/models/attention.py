"""Attention over rows of [prompt | chosen | rejected] pairs, as an attention function of transformers.

A causal language model that gets its attention from transformers' interface runs on such rows unchanged: it receives
position ids and passes `layout` on to this function. On CUDA one FlexAttention call per layer skips the fully masked
blocks. On other devices each pair takes two dense calls, [prompt | chosen] on itself and the rejected answer on
[prompt | rejected], so that no masked scores are computed there either.

Shape suffixes: H heads, T tokens of the row, D head width; Q queries and S keys of one call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from orpo_ray.models.packing import SharedPrompt

windows_seen: set[int | None] = set()
"""Sliding windows that models passed in this process. A model that has its window in masks only passes none."""
NAME = "shared_prompt"
"""Name under which transformers knows this attention function."""
FLEX_BLOCK = 128
"""FlexAttention works on blocks of this many tokens; rows for it are padded to a multiple."""


@dataclass(frozen=True, slots=True)
class _Scores:
    """How the model computes attention scores."""

    scaling: float | None
    dropout: float
    window: int | None
    softcap: float | None


def shared_prompt_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1HTD: torch.Tensor,
    value_1HTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: SharedPrompt | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Called by every attention layer of a model; the signature is transformers' (`AttentionInterface`).

    Returns:
        [1, T, H, D], and None for the attention weights, which are not computed.

    Raises:
        ValueError: the model did not pass `layout` on, or asks for something that this function does not support.
    """
    if layout is None:
        raise ValueError(f"{type(module).__name__} does not pass keyword arguments on to its attention function")
    unknown = {name for name, value in others.items() if value is not None} & {
        "position_bias",
        "s_aux",
        "sinks",
        "cache",
    }
    if unknown or attention_mask is not None:
        raise ValueError(f"{type(module).__name__} wants attention with {', '.join(sorted(unknown)) or 'its own mask'}")
    windows_seen.add(sliding_window)
    scores = _Scores(scaling, dropout, sliding_window, softcap)
    attend = _flex if query_1HTD.is_cuda else _pair_by_pair
    device = query_1HTD.device.type
    if torch.is_autocast_enabled(device):
        # Rotary embeddings leave fp32 queries beside bf16 values, and autocast does not cast for FlexAttention.
        result = torch.get_autocast_dtype(device)
        # With AVX-512 BF16, attention was no faster than in fp32. Its shapes are the pairs' lengths, which cannot be
        # padded: each would cost a kernel (`precision.BLOCK`). With AMX it may be faster; that was not measured.
        inside = torch.float32 if device == "cpu" else result
        with torch.autocast(device, enabled=False):
            query, key, value = (x.to(inside) for x in (query_1HTD, key_1HTD, value_1HTD))
            attended = attend(query, key, value, layout, scores).to(result)
    else:
        attended = attend(query_1HTD, key_1HTD, value_1HTD, layout, scores)
    return attended.transpose(1, 2).contiguous(), None


def _pair_by_pair(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SharedPrompt, scores: _Scores
) -> torch.Tensor:
    cuts = [length for prompt, chosen, rejected in layout.lengths for length in (prompt + chosen, rejected)]
    padding = query.shape[2] - sum(cuts)
    # One split of the whole row: its backward is one concatenation. Each slice's would fill a whole row with zeros.
    queries, keys, values = (list(x.split([*cuts, padding], dim=2)) for x in (query, key, value))
    outputs = []
    for index, (prompt, _, _) in enumerate(layout.lengths):
        first, second = 2 * index, 2 * index + 1
        outputs.append(_attend(queries[first], keys[first], values[first], scores))
        seen_keys, seen_values = (torch.cat([x[first][:, :, :prompt], x[second]], dim=2) for x in (keys, values))
        outputs.append(_attend(queries[second], seen_keys, seen_values, scores))
    return torch.cat([*outputs, torch.zeros_like(queries[-1])], dim=2)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: _Scores) -> torch.Tensor:
    """Causal attention of the last Q of S tokens to all S."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    window = scores.window if scores.window is not None and num_keys > scores.window else None
    causal = num_queries == num_keys and window is None
    if scores.softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            None if causal else _causal_mask(num_queries, num_keys, window, query.device),
            scores.dropout,
            is_causal=causal,
            scale=scores.scaling,
            enable_gqa=True,
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scores.scaling is None else scores.scaling)
    logits = scores.softcap * torch.tanh(logits / scores.softcap)
    logits = logits.masked_fill(~_causal_mask(num_queries, num_keys, window, query.device), -torch.inf)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(value.dtype)
    return F.dropout(weights, scores.dropout) @ value


def _causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [Q, S]: the last Q of S tokens attend to themselves and to the tokens before them."""
    mask_QS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return mask_QS if window is None else mask_QS.triu(num_keys - num_queries - window + 1)


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SharedPrompt, scores: _Scores
) -> torch.Tensor:
    if scores.dropout:
        raise ValueError(
            f"FlexAttention has no attention dropout, but the model's configuration asks for {scores.dropout}"
        )
    attended: torch.Tensor = _compiled_flex()(
        query,
        key,
        value,
        score_mod=None if scores.softcap is None else _softcapped(scores.softcap),
        block_mask=_block_mask(layout, scores.window),
        scale=scores.scaling,
        enable_gqa=True,
    )
    return attended


def try_flex(heads: int, key_heads: int, width: int, softcap: float | None, layout: SharedPrompt) -> None:
    """Run one forward and backward pass of FlexAttention on the GPU, with a model's shapes; raises its errors."""
    shapes = [(1, count, len(layout.pair_T), width) for count in (heads, key_heads, key_heads)]
    query, key, value = (torch.randn(s, dtype=torch.bfloat16, device="cuda", requires_grad=True) for s in shapes)
    _flex(query, key, value, layout, _Scores(None, 0.0, None, softcap)).sum().backward()


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@cache
def _softcapped(softcap: float) -> Callable[..., torch.Tensor]:
    def score_mod(score, batch, head, query, key):  # type: ignore[no-untyped-def]
        return softcap * torch.tanh(score / softcap)

    return score_mod


_newest_mask: tuple[SharedPrompt | None, dict[int | None, BlockMask]] = (None, {})


def _block_mask(layout: SharedPrompt, window: int | None) -> BlockMask:
    """The mask of a row, built once for all layers of a pass and their recomputation in the backward pass."""
    global _newest_mask
    if _newest_mask[0] is not layout:
        _newest_mask = (layout, {})
    masks = _newest_mask[1]
    if window not in masks:
        width = len(layout.pair_T)
        masks[window] = create_block_mask(
            lambda batch, head, query, key: layout.sees(query, key, window),
            *(None, None, width, width),
            device=layout.pair_T.device,
            BLOCK_SIZE=FLEX_BLOCK,
        )
    return masks[window]


# Only the attention function is registered, no mask function, so transformers builds no T × T mask.
AttentionInterface.register(NAME, shared_prompt_attention)
