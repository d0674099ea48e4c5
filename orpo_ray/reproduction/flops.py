"""FLOPs and memory of a training step of ORPO and of DPO: the claim of the paper's section 7.3, measured.

The paper counts sequences: ORPO runs two per pair, DPO four, because its frozen reference reads both answers too.
Here a pair may also share one row with a common prompt, and DPO's reference may be read once and kept on disk
(`training.reference`).

The measurement runs one micro-batch through `PairModel` and the losses on the CPU. A hook on the transformers base
model counts calls, rows and tokens; torch's FlopCounterMode counts FLOPs. Bytes are computed, not measured.

FLOPs are those of matrix products, 2mkn for [m × k] · [k × n]: linear layers, vocabulary head, attention.
- Attention runs as plain products, because torch 2.13 counts nothing for the CPU's fused kernel. Plain products also
  compute the scores that a causal mask or padding hides, and these count. A shared prompt takes two calls per pair,
  [prompt | chosen] on itself and rejected on [prompt | rejected]; scores across pairs and across the two answers are
  not computed.
- Logits are computed only where a log-probability is read, in padded rows too. The authors' code computes them
  everywhere.
- Logits beyond `lm_head.KEPT_BYTES`, and all logits of a head with a softcap, are recomputed in the backward pass, and
  count again there.
- Not counted: element-wise work (softmax, norms, rotary embedding, loss), embedding look-ups, the optimizer step, and
  products without a formula in torch: the grouped products of mixtures of experts, whose counts are thus too low.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from orpo_ray.config import LossConfig, ModelConfig
from orpo_ray.data.dataset import Pair
from orpo_ray.formatting import number
from orpo_ray.models.loading import build_model, count_parameters, load_tokenizer
from orpo_ray.models.logps import PairLogps
from orpo_ray.models.packing import Batch, LossMask, collate
from orpo_ray.models.pair_model import ForwardMode, PairModel, pair_logps
from orpo_ray.models.precision import matmul_dtype
from orpo_ray.models.probe import probe_forward_mode
from orpo_ray.training import loss

ORPO_PADDED = "ORPO, two padded sequences per pair (as the paper counts)"
ORPO_SHARED = "ORPO, shared prompt (ours)"
DPO_IN_MEMORY = "DPO, reference in memory (as the paper counts)"
DPO_FIRST_EPOCH = "DPO, reference kept on disk: first epoch (ours)"
DPO_LATER_EPOCHS = "DPO, reference kept on disk: later epochs (ours)"

_WEIGHT_BYTES = 4
"""Bytes per parameter: fp32 at every `train.precision`, which acts through autocast (`training.engine`). Where products
run in bf16, our reference keeps its linear layers in bf16 (`PairModel.frozen`); that saving is not counted."""
_GRADIENT_BYTES = 4
"""Bytes per trained parameter."""
_MOMENT_BYTES = 8
"""Bytes per trained parameter: AdamW's two moments in fp32."""
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """One way to run a step over the same pairs. FLOPs are per pair."""

    name: str
    sequences_per_pair: float | None
    """Input rows of the base model per pair, policy and reference together: the paper's forward passes. None where one
    row holds a whole micro-batch, so that rows are not comparable; use `tokens_per_pair`."""
    model_calls_per_step: int
    """Calls of the base model, policy and reference together, where the step is one micro-batch."""
    tokens_per_pair: float
    """Tokens through the layers, padding included, over all calls."""
    forward_flops: float
    """Forward passes of the policy (recording gradients) and of the reference (without)."""
    backward_flops: float
    """Backward pass of the policy."""
    policy_bytes: int
    reference_bytes: int
    """Frozen weights held beside the policy; 0 where the reference ran before the policy was built."""
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def flops(self) -> float:
        """Forward and backward, per pair."""
        return self.forward_flops + self.backward_flops

    @property
    def held_bytes(self) -> int:
        """Sum of the bytes above, without activations and without weights that a worker keeps for its next trials."""
        return self.policy_bytes + self.reference_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True, slots=True)
class Accounting:
    """Ways to run a step, all with the same pairs and the same model."""

    pairs: int
    parameters: int
    rows: tuple[Row, ...]
    fallback: str = ""
    """Why no row has a shared prompt; the rows with the reference on disk are then padded."""

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Accounting:
        """Rebuild from `dataclasses.asdict(accounting)` after a round trip through JSON."""
        return cls(**{**tree, "rows": tuple(Row(**row) for row in tree["rows"])})


def measure(
    model: ModelConfig, pairs: Sequence[Pair], seed: int = 0, precision: Literal["auto", "bf16", "fp32"] = "fp32"
) -> Accounting:
    """Run one micro-batch each way, with gradients.

    The reference is the model that training starts from, so its passes run on the policy's own weights.

    Args:
        model: the model; its adapters, gradient checkpointing and choice of attention are ignored.
        pairs: the micro-batch, at least one pair, encoded with the model's tokenizer.
        seed: initialises weights that are not loaded from files.
        precision: type of the products, like `train.precision`; the counts should not depend on it.

    Raises:
        ModelError: the model cannot be loaded.
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("accounting needs at least one pair")
    plain = model.model_copy(update={"lora": None, "gradient_checkpointing": False, "attention": "shared_prompt"})
    pad_token_id = int(load_tokenizer(plain).pad_token_id)
    lm = build_model(plain, seed)
    every, trained = count_parameters(lm)

    def passes(mode: ForwardMode) -> tuple[_Pass, _Pass, _Pass]:
        """Passes of ORPO, of the reference, and of DPO given the reference."""
        return _passes(PairModel(lm, mode, matmul_dtype(precision)), pairs, pad_token_id)

    def row(name: str, done: _Pass, reference_bytes: int = 0) -> Row:
        return Row(
            name=name,
            sequences_per_pair=None if done.shares_prompt else done.rows / len(pairs),
            model_calls_per_step=done.calls,
            tokens_per_pair=done.tokens / len(pairs),
            forward_flops=done.forward_flops / len(pairs),
            backward_flops=done.backward_flops / len(pairs),
            policy_bytes=every * _WEIGHT_BYTES,
            reference_bytes=reference_bytes,
            gradient_bytes=trained * _GRADIENT_BYTES,
            optimizer_bytes=trained * _MOMENT_BYTES,
        )

    ours = probe_forward_mode(lm, "shared_prompt")
    # Padded rows first: the shared-prompt mode leaves an attention function in the model that padded rows cannot use.
    orpo, reference, dpo = passes(replace(ours, shares_prompt=False))
    padded = row(ORPO_PADDED, orpo)
    in_memory = row(DPO_IN_MEMORY, dpo + reference, every * _WEIGHT_BYTES)
    rows = [padded, in_memory]
    if ours.shares_prompt:
        orpo, reference, dpo = passes(ours)
        rows = [padded, row(ORPO_SHARED, orpo), in_memory]
    # `training.loop` runs the reference before it builds the policy, once for all epochs.
    rows += [row(DPO_FIRST_EPOCH, dpo + reference), row(DPO_LATER_EPOCHS, dpo)]
    return Accounting(len(pairs), every, tuple(rows), "" if ours.shares_prompt else ours.reason)


def table(accounting: Accounting) -> tuple[list[str], list[list[str]]]:
    """Titles and rows for `formatting.markdown_table`, with each row's FLOPs as a multiple of the first row's."""
    titles = [
        "step",
        "sequences per pair",
        "model calls",
        "tokens per pair",
        "GFLOP per pair, forward",
        "forward and backward",
        "times the first",
        "MiB of policy",
        "frozen reference",
        "gradients and AdamW",
    ]
    first = accounting.rows[0]
    rows = [
        [
            row.name,
            number(row.sequences_per_pair, "g"),
            str(row.model_calls_per_step),
            f"{row.tokens_per_pair:.1f}",
            _four_digits(row.forward_flops / 1e9),
            _four_digits(row.flops / 1e9),
            f"{row.flops / first.flops:.3f}",
            _four_digits(row.policy_bytes / _MIB),
            _four_digits(row.reference_bytes / _MIB),
            _four_digits((row.gradient_bytes + row.optimizer_bytes) / _MIB),
        ]
        for row in accounting.rows
    ]
    return titles, rows


@dataclass(frozen=True, slots=True)
class _Pass:
    """Counts of one pass over the micro-batch, or the sum of several."""

    shares_prompt: bool
    calls: int
    rows: int
    tokens: int
    forward_flops: int
    backward_flops: int

    def __add__(self, other: _Pass) -> _Pass:
        return _Pass(
            self.shares_prompt,
            self.calls + other.calls,
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.forward_flops + other.forward_flops,
            self.backward_flops + other.backward_flops,
        )


def _passes(model: PairModel, pairs: Sequence[Pair], pad_token_id: int) -> tuple[_Pass, _Pass, _Pass]:
    # Both losses use the same target tokens, as trials do that differ in `loss.name` only. DPO's objective does not
    # read the prompt's log-probabilities, but the NLL that it reports does.
    orpo, dpo = LossConfig(name="orpo"), LossConfig(name="dpo")
    # Not `model.collate`, which pads rows for some devices' kernels.
    shares = model.forward_mode.shares_prompt
    batch = collate(pairs, LossMask(orpo.nll_scope), share_prompt=shares, pad_token_id=pad_token_id)
    trained, _ = _run(model, batch, orpo)
    frozen, kept = _run(model, batch, None)
    reference_P2 = torch.stack([kept.chosen_logps_P, kept.rejected_logps_P], dim=1)
    against, _ = _run(model, replace(batch, reference_P2=reference_P2), dpo)
    return trained, frozen, against


def _run(model: PairModel, batch: Batch, settings: LossConfig | None) -> tuple[_Pass, PairLogps]:
    """One forward pass, and a backward pass with `settings`; None stands for the reference, which has no loss."""
    seen: list[torch.Size] = []

    def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["input_ids"]).shape)

    base: Any = model.lm.base_model
    hook = base.register_forward_pre_hook(see, with_kwargs=True)
    try:
        model.train(settings is not None)
        with _counter() as forward, torch.set_grad_enabled(settings is not None):
            logps = pair_logps(model, batch)
    finally:
        hook.remove()
    backward_flops = 0
    if settings is not None:
        counts = loss.BatchCounts(len(logps.chosen_logps_P), int(logps.nll_tokens_P.sum()))
        terms = loss.from_config(settings)(logps, counts)
        with _counter() as backward:
            terms.loss.backward()
        model.zero_grad(set_to_none=True)
        backward_flops = backward.get_total_flops()
    calls, tokens = len(seen), sum(shape.numel() for shape in seen)
    rows = sum(shape[0] for shape in seen)
    return _Pass(batch.layout is not None, calls, rows, tokens, forward.get_total_flops(), backward_flops), logps


@contextlib.contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    # torch has a formula for `addmm`, but not for `addmm_`, by which `lm_head` accumulates its weight's gradient.
    # Without it, a model with a small body and a large vocabulary would lose much of its backward count.
    in_place = {torch.ops.aten.addmm_: _addmm_flops}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        yield counter


def _addmm_flops(total: torch.Size, left: torch.Size, right: torch.Size, **others: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _four_digits(value: float) -> str:
    """Four significant digits, without an exponent."""
    return f"{float(f'{value:.4g}'):,.15g}"
