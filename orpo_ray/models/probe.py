"""Probe numerically which fast forward paths a model supports, and build frozen models that use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from orpo_ray.data.dataset import Pair
from orpo_ray.models import attention
from orpo_ray.models.loading import causal_lm
from orpo_ray.models.packing import LossMask, collate
from orpo_ray.models.pair_model import ForwardMode, PairModel

_LAYERS_UNDERSTOOD = {"full_attention", "sliding_attention"}
_PROBE_TOLERANCE = 1e-3
"""Nats. Correct modes differ from the plain one by rounding only; a wrong mask or position differs by far more."""


@torch.no_grad()
def probe_forward_mode(lm: torch.nn.Module, wanted_attention: str) -> ForwardMode:
    """Find the fastest mode in which the model gives the same log-probabilities, or rewards, as in its plain mode.

    Two short pairs run through the plain mode (padded rows, full logits) and through the candidates. So an architecture
    whose code does something unexpected falls back to slower rows instead of being trained incorrectly.

    Args:
        lm: a transformers causal language model or reward model, with or without adapters, its weights not yet
            partitioned.
        wanted_attention: `model.attention`; any value but `shared_prompt` asks for padded rows.

    Returns:
        The mode; its `reason` says why a fast path is off.
    """
    rng = np.random.default_rng(0)
    highest = min(causal_lm(lm).get_input_embeddings().num_embeddings, 256)
    pairs = [
        Pair("probe", ids[:prompt], ids[prompt:-rejected], ids[-rejected:], chosen_bytes=1)
        for prompt, rejected, ids in (
            (5, 4, rng.integers(0, highest, 12, dtype=np.int32)),
            (2, 2, rng.integers(0, highest, 8, dtype=np.int32)),
        )
    ]
    device, was_training, kernel = next(lm.parameters()).device, lm.training, causal_lm(lm).config._attn_implementation
    lm.eval()
    try:

        def sums(mode: ForwardMode) -> torch.Tensor:
            model = PairModel(lm, mode)
            loss_mask = LossMask("prompt_and_response", rewards=model.is_reward)
            return model(collate(pairs, loss_mask, share_prompt=mode.shares_prompt).to(device))

        if causal_lm(lm)._supports_attention_backend:  # other kernels may need a GPU; the model is on the CPU
            causal_lm(lm).set_attn_implementation("eager")
        expected = sums(ForwardMode(shares_prompt=False, chunks_head=False))
        chunked = _try(sums, ForwardMode(shares_prompt=False, chunks_head=True), expected)
        head = not chunked
        if wanted_attention != "shared_prompt":
            return ForwardMode(
                False, head, "; ".join(filter(None, (f"model.attention is {wanted_attention}", chunked)))
            )
        attention.windows_seen.clear()
        shared = _layers_not_understood(causal_lm(lm)) or _try(sums, ForwardMode(True, head), expected)
        shared = shared or _window_not_passed(causal_lm(lm)) or _flex_does_not_run(causal_lm(lm), pairs)
        return ForwardMode(not shared, head, "; ".join(filter(None, (shared, chunked))))
    finally:
        lm.train(was_training)
        if causal_lm(lm).config._attn_implementation != kernel:
            causal_lm(lm).set_attn_implementation(kernel)


def frozen_model(lm: torch.nn.Module, wanted_attention: str, autocast: torch.dtype | None) -> PairModel:
    """A model for inference only, on this process's device, in the fastest mode that it supports.

    Args:
        lm: as for `probe_forward_mode`.
        wanted_attention: `model.attention`.
        autocast: as for `PairModel`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return PairModel(lm, probe_forward_mode(lm, wanted_attention), autocast).to(device).frozen()


def _try(sums: Callable[[ForwardMode], torch.Tensor], mode: ForwardMode, expected: torch.Tensor) -> str:
    """Run one mode. Returns an empty string if its sums are as expected, else what is wrong."""
    what = "rows with a shared prompt" if mode.shares_prompt else "logits in chunks"
    try:
        found = sums(mode)
    except Exception as error:  # custom model code may raise anything: the plain mode works, and the reason is shown
        return f"{what}: {type(error).__name__}: {error}"
    off = float((found - expected).abs().max())
    return "" if off <= _PROBE_TOLERANCE else f"{what}: log-probabilities are off by {off:.2g}"


def _layers_not_understood(causal: Any) -> str:
    config = causal.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYERS_UNDERSTOOD
    if kinds:
        return f"rows with a shared prompt: layers of kind {', '.join(sorted(kinds))}"
    if not causal._supports_attention_backend:
        return f"rows with a shared prompt: {type(causal).__name__} implements its attention itself"
    return ""


def _window_not_passed(causal: Any) -> str:
    """Check that a declared sliding window reached the attention function; the probe's pairs are too short to tell."""
    config = causal.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    declared = (
        getattr(config, "sliding_window", None) is not None
        and getattr(config, "use_sliding_window", True)
        and (kinds is None or "sliding_attention" in kinds)
    )
    if declared and attention.windows_seen <= {None}:
        return f"rows with a shared prompt: {type(causal).__name__} has its sliding window in masks only"
    return ""


def _flex_does_not_run(causal: Any, pairs: list[Pair]) -> str:
    """Try FlexAttention where there is a GPU: the probe itself ran on the CPU, with other code."""
    if not torch.cuda.is_available():
        return ""
    config = causal.config.get_text_config()
    dropout = max(getattr(config, name, None) or 0.0 for name in ("attention_dropout", "attn_pdrop"))
    if dropout:
        return f"rows with a shared prompt: FlexAttention has no dropout, but the model's attention has {dropout}"
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    batch = collate(pairs, LossMask("response"), share_prompt=True, multiple_of=attention.FLEX_BLOCK)
    layout = batch.to(torch.device("cuda")).layout
    assert layout is not None
    try:
        with torch.enable_grad():
            attention.try_flex(heads, key_heads, width, getattr(config, "attn_logit_softcapping", None), layout)
    except Exception as error:  # the compiler raises many kinds
        return f"rows with a shared prompt: FlexAttention: {type(error).__name__}: {error}"
    return ""
