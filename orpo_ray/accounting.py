"""What a training step of ORPO and of DPO computes and holds (paper section 7.3), counted on real passes.

The paper counts sequences: ORPO runs two per pair, DPO four, because the frozen reference reads both, too. Here a pair
may also be one row with a shared prompt, and DPO's reference may be read once and kept on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from orpo_ray import loss
from orpo_ray.config import LossConfig, ModelConfig
from orpo_ray.data import Pair
from orpo_ray.forward import Form, PairModel, form_of, pair_logps
from orpo_ray.model import build_model, count_parameters, load_tokenizer
from orpo_ray.packing import Counting

_ADAM_BYTES = 16
"""Per trained parameter in fp32: weight, gradient, two moments."""
_WEIGHT_BYTES = 4
"""Per frozen parameter."""


@dataclass(frozen=True, slots=True)
class Step:
    """One way to run one step over the same pairs."""

    name: str
    sequences_per_pair: int
    """Answers that a model reads behind their prompt, as the paper counts: policy and reference."""
    tokens_per_pair: float
    """That models compute, padding included, over all passes."""
    forward_flops: float
    """Per pair. Products, as torch's FlopCounterMode counts them: 2mkn for [m × k] · [k × n], those of attention with
    what the mask hides. Element-wise work is not counted."""
    backward_flops: float
    """Per pair, the same."""
    held_bytes: int
    """Arithmetic, not measured: the policy's fp32 weights, gradients and AdamW moments; weights of what is frozen."""


@dataclass(frozen=True, slots=True)
class Accounting:
    """The same pairs through the same model."""

    pairs: int
    parameters: int
    steps: tuple[Step, ...]


def measure(config: ModelConfig, pairs: Sequence[Pair], seed: int = 0) -> Accounting:
    """Run one micro-batch each way, in fp32, with gradients.

    Args:
        config: the model; adapters are left out.
        pairs: at least one, of the model's tokenizer.
        seed: of weights that are not read.

    Raises:
        ModelError: no such model.
    """
    plain = config.model_copy(update={"lora": None, "gradient_checkpointing": False})
    tokenizer = load_tokenizer(plain)
    lm = build_model(plain, seed)
    found = form_of(lm, "shared_prompt")
    padded = replace(found, shares_prompt=False)
    parameters, _ = count_parameters(lm)
    counting = Counting("prompt_and_response")

    def run(form: Form, settings: LossConfig, trains: bool) -> tuple[float, float, float]:
        """(tokens, forward FLOPs, backward FLOPs) per pair."""
        model = PairModel(lm, form)
        batch = model.collate(pairs, counting, int(tokenizer.pad_token_id))
        with _countable(), FlopCounterMode(display=False) as forward, torch.set_grad_enabled(trains):
            logps = pair_logps(model, batch)
        backward: Any = None
        if trains:
            reference = loss.ReferenceLogps(logps.chosen_logps_P.detach(), logps.rejected_logps_P.detach())
            terms = loss.from_config(settings)(
                replace(logps, reference=reference), loss.BatchCounts(len(pairs), int(logps.nll_tokens_P.sum()))
            )
            with _countable(), FlopCounterMode(display=False) as backward:
                terms.loss.backward()
            lm.zero_grad(set_to_none=True)
        behind = backward.get_total_flops() if backward else 0
        return batch.input_ids_RT.numel() / len(pairs), forward.get_total_flops() / len(pairs), behind / len(pairs)

    orpo, dpo = LossConfig(name="orpo", orpo_lambda=1.0), LossConfig(name="dpo")
    trained = parameters * _ADAM_BYTES
    steps = [Step("ORPO, padded rows", 2, *run(padded, orpo, True), trained)]
    steps.append(_with_reference("DPO, padded rows, reference in memory", padded, run, dpo, parameters))
    if found.shares_prompt:
        steps.append(Step("ORPO, shared prompt", 2, *run(found, orpo, True), trained))
        steps.append(_with_reference("DPO, shared prompt, first epoch", found, run, dpo, parameters, is_kept=True))
        steps.append(Step("DPO, shared prompt, later epochs: reference from disk", 2, *run(found, dpo, True), trained))
    return Accounting(len(pairs), parameters, tuple(steps))


def _countable() -> Any:
    """Attention as plain products: of the CPU's fused kernel torch 2.13 counts nothing."""
    return sdpa_kernel(SDPBackend.MATH)


def _with_reference(name: str, form: Form, run: Any, dpo: LossConfig, parameters: int, is_kept: bool = False) -> Step:
    tokens, forward, backward = run(form, dpo, True)
    reference_tokens, reference_forward, _ = run(form, dpo, False)
    # Where it is kept on disk, the reference has been read before the policy's training begins, and is gone again.
    held = parameters * (_ADAM_BYTES + (0 if is_kept else _WEIGHT_BYTES))
    return Step(name, 4, tokens + reference_tokens, forward + reference_forward, backward, held)


def table(accounting: Accounting) -> tuple[list[str], list[list[str]]]:
    """Titles and rows, with what each step takes as a multiple of the first."""
    first = accounting.steps[0]
    whole = first.forward_flops + first.backward_flops
    rows = [
        [
            step.name,
            str(step.sequences_per_pair),
            f"{step.tokens_per_pair:.0f}",
            f"{step.forward_flops / 1e9:.3g}",
            f"{(step.forward_flops + step.backward_flops) / 1e9:.3g}",
            f"{(step.forward_flops + step.backward_flops) / whole:.2f}",
            f"{step.held_bytes / 2**30:.3f}",
        ]
        for step in accounting.steps
    ]
    titles = ["step", "sequences per pair", "tokens per pair", "GFLOP forward", "forward and backward"]
    return [*titles, "times the first", "GiB of weights, gradients, moments"], rows
