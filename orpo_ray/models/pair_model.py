"""`PairModel`: a causal language model, for a DeepSpeed engine, that maps a micro-batch to log-probabilities.

Shape suffixes: P pairs, R rows, T tokens of a row, N counted targets, D hidden width, V vocabulary, K = 3P sums.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from orpo_ray.data.dataset import Pair
from orpo_ray.models import answers, attention, precision
from orpo_ray.models.answers import Prompts
from orpo_ray.models.lm_head import Head
from orpo_ray.models.loading import causal_lm
from orpo_ray.models.logps import PairLogps, ReferenceLogps
from orpo_ray.models.packing import Batch, LossMask, collate


@dataclass(frozen=True, slots=True)
class ForwardMode:
    """Which fast paths the model supports, determined by a numerical probe (`probe.probe_forward_mode`)."""

    shares_prompt: bool
    """True: one row [prompt | chosen | rejected | ...]; False: padded rows."""
    chunks_head: bool
    """True: logits of counted targets only, in chunks; False: the model's own logits [R, T, V]."""
    reason: str = ""
    """Why a fast path is off, where one is."""


class PairModel(torch.nn.Module):
    """A causal language model that maps a `Batch` to sums of log-probabilities and `Prompts` to answers; or a reward
    model (`loading.build_reward_model`) that maps a `Batch` to rewards.

    All computation happens inside `forward`, so that an engine around this module gathers partitioned weights (the
    head's too) and switches precision in one place.

    Args:
        lm: a transformers model, with or without peft adapters. Its attention function is replaced where
            `forward_mode.shares_prompt`.
        forward_mode: which fast paths to use.
        autocast: bf16 to run matrix products in bf16 (see `precision.matmul_dtype`), or None for the weights' own type.
    """

    def __init__(self, lm: torch.nn.Module, forward_mode: ForwardMode, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.forward_mode = forward_mode
        self.autocast = autocast
        if self._has_bf16_kernels:
            precision.bound_kernel_caches()
        elif autocast is not None:
            for module in self._autocast_layers():
                precision.use_fp32_product(module)
        if forward_mode.shares_prompt:
            causal_lm(lm).set_attn_implementation(attention.NAME)

    def frozen(self) -> PairModel:
        """Prepare for inference only; returns itself.

        Where bf16 kernels are used, the linear layers' weights are converted to bf16 once. Autocast would convert them
        in every pass, and generation runs one pass per token.
        """
        self.eval().requires_grad_(False)
        if self._has_bf16_kernels:
            for module in self._autocast_layers():  # a tied head gets weights of its own; the embedding stays fp32
                module.weight = torch.nn.Parameter(module.weight.to(self.autocast), requires_grad=False)
        return self

    def _autocast_layers(self) -> list[torch.nn.Linear]:
        """The plain linear layers that `autocast` is for: all but a reward model's score."""
        score = getattr(causal_lm(self.lm), "score", None)
        apart = set() if score is None else set(score.modules())
        return [module for module in self.lm.modules() if type(module) is torch.nn.Linear and module not in apart]

    @property
    def _has_bf16_kernels(self) -> bool:
        return self.autocast is not None and (torch.cuda.is_available() or precision.has_bf16_units())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def outside_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters of inner modules that `forward` reads directly; ZeRO-3 must be told to gather them for it."""
        if not self.forward_mode.chunks_head or self.is_reward:
            return []
        linear = Head.of(causal_lm(self.lm)).linear
        return list(linear.parameters(recurse=False)) if type(linear) is torch.nn.Linear else []

    @property
    def is_reward(self) -> bool:
        """Whether it gives answers rewards rather than log-probabilities."""
        return hasattr(causal_lm(self.lm), "score")

    @property
    def ends(self) -> set[int]:
        """Tokens with which the model itself ends an answer."""
        return answers.eos_token_ids(self.lm)

    @property
    def max_positions(self) -> int:
        """Most tokens that a row may have."""
        return int(getattr(causal_lm(self.lm).config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)

    def collate(self, pairs: Sequence[Pair], loss_mask: LossMask, pad_token_id: int) -> Batch:
        """Lay out a micro-batch for this model's forward mode, on the host."""
        multiple = 1
        if self.device.type == "cuda":
            multiple = attention.FLEX_BLOCK
        elif self._has_bf16_kernels:
            multiple = precision.BLOCK
        return collate(
            pairs,
            loss_mask,
            share_prompt=self.forward_mode.shares_prompt,
            pad_token_id=pad_token_id,
            multiple_of=multiple,
        )

    def forward(self, batch: Batch | Prompts) -> torch.Tensor:
        """Run one pass over a batch, or answer prompts.

        Returns:
            Of a `Batch`, fp32 [K]: the sums that `batch.weights_KN` asks for. Of `Prompts`, int64 [R, T]: answers,
            padded on the right.
        """
        device = batch.input_ids_RT.device.type
        with torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext():
            if isinstance(batch, Prompts):
                return answers.answer(self.lm, batch, shares_prompt=self.forward_mode.shares_prompt)
            logps_N = self._rewards(batch) if self.is_reward else self._logps(batch)
        # No matrix product: in one, 0 · inf would spread one pair's divergence to all pairs.
        return torch.where(batch.weights_KN == 0, 0.0, batch.weights_KN * logps_N).sum(1)

    def _logps(self, batch: Batch) -> torch.Tensor:
        if not self.forward_mode.chunks_head:
            logits_RTV = self.lm(input_ids=batch.input_ids_RT, use_cache=False, **batch.mask_arguments()).logits
            logits_NV = logits_RTV.flatten(0, 1)[batch.source_N].float()
            return -cross_entropy(logits_NV, batch.target_N, reduction="none")
        causal = causal_lm(self.lm)
        return Head.of(causal).logps(_hidden(causal, batch), batch.target_N)

    def _rewards(self, batch: Batch) -> torch.Tensor:
        causal = causal_lm(self.lm)
        hidden_ND = _hidden(causal, batch)
        # One number per answer: bf16 would save nothing, and round rewards between 2 and 4 to steps of 1/64.
        with torch.autocast(hidden_ND.device.type, enabled=False):
            rewards_N1: torch.Tensor = causal.score(hidden_ND.float())
        return rewards_N1.squeeze(1)


def pair_logps(model: torch.nn.Module, batch: Batch) -> PairLogps:
    """Run the model once over a micro-batch.

    Args:
        model: a `PairModel`, or a DeepSpeed engine around one.
        batch: on the model's device.
    """
    chosen_P, rejected_P, nll_P = model(batch).chunk(3)
    chosen_tokens_P, rejected_tokens_P, nll_tokens_P = batch.tokens_K.chunk(3)
    return PairLogps(
        chosen_logps_P=chosen_P,
        rejected_logps_P=rejected_P,
        nll_sums_P=-nll_P,
        nll_tokens_P=nll_tokens_P,
        chosen_tokens_P=chosen_tokens_P,
        rejected_tokens_P=rejected_tokens_P,
        reference=None if batch.reference_P2 is None else ReferenceLogps(*batch.reference_P2.unbind(1)),
        rewards_P2=batch.rewards_P2,
    )


def _hidden(causal: Any, batch: Batch) -> torch.Tensor:
    """The last layer's output at the places that predict a target, [N, D]."""
    arguments = batch.mask_arguments()
    hidden_RTD = causal.base_model(input_ids=batch.input_ids_RT, use_cache=False, **arguments).last_hidden_state
    hidden_ND: torch.Tensor = hidden_RTD.flatten(0, 1).index_select(0, batch.source_N)
    return hidden_ND
