"""Generation: a batch of prompts, and the model's greedy or sampled answers to it.

Shape suffixes: R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from orpo_ray.models.loading import causal_lm


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to be answered, and how."""

    input_ids_RT: torch.Tensor
    """int64, padded on the left."""
    attention_mask_RT: torch.Tensor
    """int64, 0 at padding."""
    pad_token_id: int
    eos_token_id: int
    max_new_tokens: int
    in_step: bool
    """All ranks run as many forward passes as the slowest one; ZeRO-3 needs this."""
    temperature: float = 0.0
    """Sample from the whole distribution at this temperature; 0 decodes greedily."""
    answers_each: int = 1
    """Answers per prompt. Row r · answers_each + a is answer a to prompt r."""

    @classmethod
    def padded(cls, prompts: Sequence[np.ndarray], pad_token_id: int, **rest: Any) -> Prompts:
        """Pad token ids of prompts on the left, to at least two columns.

        Two, because `_prefill` reads all columns but the last, and must do so on every rank or on none.
        """
        longest = max(2, *map(len, prompts))
        input_ids_RT = torch.full((len(prompts), longest), pad_token_id)
        attention_mask_RT = torch.zeros_like(input_ids_RT)
        for row, ids in enumerate(prompts):
            input_ids_RT[row, longest - len(ids) :] = torch.from_numpy(ids.astype(np.int64))
            attention_mask_RT[row, longest - len(ids) :] = 1
        return cls(input_ids_RT, attention_mask_RT, pad_token_id, **rest)

    def to(self, device: torch.device) -> Prompts:
        """The same prompts on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids_RT", "attention_mask_RT")}
        return replace(self, **moved)


def eos_token_ids(lm: torch.nn.Module) -> set[int]:
    """Tokens with which the model's own generation config ends an answer."""
    known = causal_lm(lm).generation_config.eos_token_id
    return set(known if isinstance(known, list) else [] if known is None else [known])


def answer(lm: Any, prompts: Prompts, *, shares_prompt: bool) -> torch.Tensor:
    """Answer prompts, within `PairModel.forward`.

    Args:
        lm: a transformers causal language model, with or without peft adapters.
        prompts: on the model's device.
        shares_prompt: whether the model uses `attention.shared_prompt_attention`. That function cannot use a cache, so
            another one takes its place meanwhile.

    Returns:
        int64 [R · answers_each, T]: answers without their prompts, padded on the right.
    """
    causal = causal_lm(lm)
    sampling = {"do_sample": True, "temperature": prompts.temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        **(sampling if prompts.temperature else {"do_sample": False}),
        max_new_tokens=prompts.max_new_tokens,
        eos_token_id=sorted(eos_token_ids(lm) | {prompts.eos_token_id}),
        pad_token_id=prompts.pad_token_id,
    )
    kernel, own_settings = causal.config._attn_implementation, causal.generation_config
    if shares_prompt:
        causal.set_attn_implementation("sdpa" if causal._supports_sdpa else "eager")
    try:
        rows = _prefill(lm, prompts, shares_prompt)
        tokens_RT: torch.Tensor = _generate(lm, settings, prompts.in_step, **rows)
    finally:
        causal.generation_config = own_settings
        if shares_prompt:
            causal.set_attn_implementation(kernel)
    return tokens_RT[:, prompts.input_ids_RT.shape[1] :]


def _prefill(lm: Any, prompts: Prompts, shares_prompt: bool) -> dict[str, Any]:
    """Arguments for `_generate`: one row per answer.

    Where the probe found only attention layers, the model reads each prompt once, except for its last token, and the
    cache is copied for every answer.
    """
    ids_RT, mask_RT, each = prompts.input_ids_RT, prompts.attention_mask_RT, prompts.answers_each
    rows = {"input_ids": ids_RT.repeat_interleave(each, 0), "attention_mask": mask_RT.repeat_interleave(each, 0)}
    if each == 1 or not shares_prompt:
        return rows
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=1, pad_token_id=prompts.pad_token_id, return_dict_in_generate=True
    )
    read = _generate(lm, settings, prompts.in_step, input_ids=ids_RT[:, :-1], attention_mask=mask_RT[:, :-1])
    read.past_key_values.batch_repeat_interleave(each)
    return rows | {"past_key_values": read.past_key_values}


def _generate(lm: Any, settings: GenerationConfig, in_step: bool, **rows: Any) -> Any:
    # The model's own file may set sampling options (temperature, top_k), of which greedy decoding would warn.
    causal_lm(lm).generation_config = settings
    return lm.generate(**rows, generation_config=settings, synced_gpus=in_step)
