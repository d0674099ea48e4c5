"""From a micro-batch to log-probabilities: a causal language model as a module that a DeepSpeed engine can wrap.

Shape suffixes: P pairs, R rows, T tokens of a row, N counted targets, D hidden width, V vocabulary, K = 3P sums.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from orpo_ray.data.dataset import Pair
from orpo_ray.models import attention
from orpo_ray.models import precision as precisions
from orpo_ray.models.lm_head import Head
from orpo_ray.models.logps import PairLogps, ReferenceLogps
from orpo_ray.models.packing import Batch, LossMask, collate


@dataclass(frozen=True, slots=True)
class ForwardMode:
    """How a model is fed and read; what it cannot do is found by trying (see `form_of`)."""

    shares_prompt: bool
    """One row [prompt | chosen | rejected | ...]; otherwise padded rows."""
    chunks_head: bool
    """Logits only where they count, in chunks; otherwise the model's own [R, T, V]."""
    reason: str = ""
    """Why not, where one of them is False."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to be answered."""

    input_ids_RT: torch.Tensor
    """int64, padded on the left."""
    attention_mask_RT: torch.Tensor
    """int64, 0 at padding."""
    pad_token_id: int
    eos_token_id: int
    max_new_tokens: int
    in_step: bool
    """All ranks run as many passes as the slowest, which ZeRO-3 needs."""
    temperature: float = 0.0
    """Answers are drawn from the whole distribution at this temperature; 0 takes the likeliest token each time."""
    answers_each: int = 1
    """To every prompt, one after the other: row r · answers_each + a is answer a to prompt r."""

    @classmethod
    def padded(cls, prompts: Sequence[np.ndarray], pad_token_id: int, **rest: Any) -> Prompts:
        """Token ids of each prompt, side by side with their ends together, and at least two columns of them: whether
        there is something before the last must not differ between ranks (`PairModel._read`)."""
        longest = max(2, *map(len, prompts))
        input_ids_RT = torch.full((len(prompts), longest), pad_token_id)
        attention_mask_RT = torch.zeros_like(input_ids_RT)
        for row, ids in enumerate(prompts):
            input_ids_RT[row, longest - len(ids) :] = torch.from_numpy(ids.astype(np.int64))
            attention_mask_RT[row, longest - len(ids) :] = 1
        return cls(input_ids_RT, attention_mask_RT, pad_token_id, **rest)

    def to(self, device: torch.device) -> Prompts:
        """A copy there."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids_RT", "attention_mask_RT")}
        return replace(self, **moved)


class PairModel(torch.nn.Module):
    """A causal language model that maps a `Batch` to sums of log-probabilities, and `Prompts` to answers; or a reward
    model (`model.build_reward_model`) that maps a `Batch` to rewards.

    Everything happens inside `forward`, so that an engine around this module gathers partitioned weights (the head's
    too) and switches precision in one place.

    Args:
        lm: a transformers model, with or without peft adapters; its attention function is changed where
            `form.shares_prompt`.
        form: how it is fed and read.
        autocast: bf16 for matrix products in it (see `product_type`), or None for the weights' own type.
    """

    def __init__(self, lm: torch.nn.Module, form: ForwardMode, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.forward_mode = form
        self.autocast = autocast
        if self._has_bf16_products:
            precisions.bound_kernel_caches()
        elif autocast is not None:
            for module in self._products():
                precisions.use_fp32_product(module)
        if form.shares_prompt:
            causal_lm(lm).set_attn_implementation(attention.NAME)

    def frozen(self) -> PairModel:
        """Itself, made ready to be read from only. Where products run in bf16, its linear layers' weights are kept in
        bf16: autocast would make the same of them anew in every pass, and in generation a pass is a token."""
        self.eval().requires_grad_(False)
        if self._has_bf16_products:
            for module in self._products():  # a tied head parts with its embedding, which stays fp32
                module.weight = torch.nn.Parameter(module.weight.to(self.autocast), requires_grad=False)
        return self

    def _products(self) -> list[torch.nn.Linear]:
        """The plain linear layers whose products `autocast` is for: all but a reward model's score."""
        score = getattr(causal_lm(self.lm), "score", None)
        apart = set() if score is None else set(score.modules())
        return [module for module in self.lm.modules() if type(module) is torch.nn.Linear and module not in apart]

    @property
    def _has_bf16_products(self) -> bool:
        return self.autocast is not None and (torch.cuda.is_available() or precisions.has_bf16_units())

    @property
    def outside_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters of inner modules that `forward` reads itself; ZeRO-3 must be told to gather them for it."""
        if not self.forward_mode.chunks_head or self.is_reward:
            return []
        linear = _head(causal_lm(self.lm)).linear
        return list(linear.parameters(recurse=False)) if type(linear) is torch.nn.Linear else []

    @property
    def is_reward(self) -> bool:
        """Whether it gives answers rewards rather than log-probabilities."""
        return hasattr(causal_lm(self.lm), "score")

    @property
    def ends(self) -> set[int]:
        """Tokens that the model itself ends an answer with."""
        known = causal_lm(self.lm).generation_config.eos_token_id
        return set(known if isinstance(known, list) else [] if known is None else [known])

    @property
    def max_positions(self) -> int:
        """Tokens that a row may have."""
        return int(getattr(causal_lm(self.lm).config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)

    def collate(self, pairs: Sequence[Pair], loss_mask: LossMask, pad_token_id: int) -> Batch:
        """A micro-batch in this model's form, on the host."""
        multiple = 1
        if next(self.parameters()).is_cuda:
            multiple = attention.FLEX_BLOCK
        elif self._has_bf16_products:
            multiple = precisions.BLOCK
        return collate(
            pairs,
            loss_mask,
            share_prompt=self.forward_mode.shares_prompt,
            pad_token_id=pad_token_id,
            multiple_of=multiple,
        )

    def forward(self, batch: Batch | Prompts) -> torch.Tensor:
        """fp32 [K]: the sums that `batch.weights_KN` asks for; or int64 [R, T]: answers, padded on the right."""
        device = batch.input_ids_RT.device.type
        with torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext():
            if isinstance(batch, Prompts):
                return self._answers(batch)
            logps_N = self._rewards(batch) if self.is_reward else self._logps(batch)
        # Not a matrix product: there, 0 · inf would make one pair's divergence everybody's.
        return torch.where(batch.weights_KN == 0, 0.0, batch.weights_KN * logps_N).sum(1)

    def _logps(self, batch: Batch) -> torch.Tensor:
        causal = causal_lm(self.lm)
        if not self.forward_mode.chunks_head:
            logits_RTV = self.lm(input_ids=batch.input_ids_RT, use_cache=False, **_sight(batch)).logits
            logits_NV = logits_RTV.flatten(0, 1)[batch.source_N].float()
            return -cross_entropy(logits_NV, batch.target_N, reduction="none")
        return _head(causal).logps(_hidden(causal, batch), batch.target_N)

    def _rewards(self, batch: Batch) -> torch.Tensor:
        causal = causal_lm(self.lm)
        hidden_ND = _hidden(causal, batch)
        # One number per answer: bf16 would save nothing, and leave rewards of 2 to 4 steps of 1/64.
        with torch.autocast(hidden_ND.device.type, enabled=False):
            rewards_N1: torch.Tensor = causal.score(hidden_ND.float())
        return rewards_N1.squeeze(1)

    def _answers(self, prompts: Prompts) -> torch.Tensor:
        causal = causal_lm(self.lm)
        ends = self.ends | {prompts.eos_token_id}
        how = {"do_sample": True, "temperature": prompts.temperature, "top_k": 0, "top_p": 1.0}
        settings = GenerationConfig(
            **(how if prompts.temperature else {"do_sample": False}),
            max_new_tokens=prompts.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=prompts.pad_token_id,
        )
        kernel, own = causal.config._attn_implementation, causal.generation_config
        if self.forward_mode.shares_prompt:  # it knows nothing of a cache
            causal.set_attn_implementation("sdpa" if causal._supports_sdpa else "eager")
        try:
            rows = self._read(prompts)
            tokens_RT: torch.Tensor = self._generate(settings, prompts.in_step, **rows)
        finally:
            causal.generation_config = own
            if self.forward_mode.shares_prompt:
                causal.set_attn_implementation(kernel)
        return tokens_RT[:, prompts.input_ids_RT.shape[1] :]

    def _read(self, prompts: Prompts) -> dict[str, Any]:
        """Rows for `_generate`, each prompt as often as it is answered. Where all layers are known to be attention, a
        prompt is read here, once, except for its last token, and what is known of it is copied."""
        ids_RT, mask_RT, each = prompts.input_ids_RT, prompts.attention_mask_RT, prompts.answers_each
        rows = {"input_ids": ids_RT.repeat_interleave(each, 0), "attention_mask": mask_RT.repeat_interleave(each, 0)}
        if each == 1 or not self.forward_mode.shares_prompt:
            return rows
        first = GenerationConfig(
            do_sample=False, max_new_tokens=1, pad_token_id=prompts.pad_token_id, return_dict_in_generate=True
        )
        read = self._generate(first, prompts.in_step, input_ids=ids_RT[:, :-1], attention_mask=mask_RT[:, :-1])
        read.past_key_values.batch_repeat_interleave(each)
        return rows | {"past_key_values": read.past_key_values}

    def _generate(self, settings: GenerationConfig, in_step: bool, **rows: Any) -> Any:
        # What the model's own file sets (temperature, top_k) is for sampling, and greedy decoding would warn of it.
        causal_lm(self.lm).generation_config = settings
        return self.lm.generate(**rows, generation_config=settings, synced_gpus=in_step)  # type: ignore[operator]


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


def _sight(batch: Batch) -> dict[str, Any]:
    """What a model is told of which token sees which."""
    if batch.layout is not None:
        return {"position_ids": batch.position_ids_RT, "layout": batch.layout}
    return {"attention_mask": batch.attention_mask_RT}


def _hidden(causal: Any, batch: Batch) -> torch.Tensor:
    """The last layer's output at the places that count, [N, D]."""
    hidden_RTD = causal.base_model(input_ids=batch.input_ids_RT, use_cache=False, **_sight(batch)).last_hidden_state
    hidden_ND: torch.Tensor = hidden_RTD.flatten(0, 1).index_select(0, batch.source_N)
    return hidden_ND


def causal_lm(lm: Any) -> Any:
    """The transformers model inside peft's wrappers."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def _head(causal: Any) -> Head:
    config = causal.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(causal.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))
