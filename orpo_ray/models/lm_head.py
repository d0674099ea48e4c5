"""Log-probabilities of single tokens from hidden states, without a [tokens × vocabulary] tensor.

Shape suffixes: N targets, C targets of one chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from orpo_ray.models.precision import autocast_matmul_dtype

CHUNK_BYTES = 64 * 2**20
"""Size of the fp32 logits of one chunk; on every device large enough for matrix products to run at full rate."""
KEPT_BYTES = 256 * 2**20
"""Limit of the probabilities kept for one call's backward pass; constant, so that memory does not grow with N × V."""


@dataclass(frozen=True, slots=True)
class Head:
    """The layer that turns hidden states into logits: a linear layer, then scale · softcap(logits)."""

    linear: torch.nn.Module
    """The model's output embeddings; a plain `torch.nn.Linear`, or that with adapters around it."""
    scale: float = 1.0
    """Logits are multiplied by this (Cohere's logit_scale, the inverse of Granite's logits_scaling)."""
    softcap: float | None = None
    """softcap · tanh(logits / softcap) (Gemma 2)."""

    @classmethod
    def of(cls, causal: Any) -> Head:
        """The head of a transformers causal language model (without peft's wrapper)."""
        config = causal.config.get_text_config()
        multiplier, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
        scale = float(multiplier or 1.0) / float(divisor or 1.0)
        return cls(causal.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))

    def logps(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        """log p(target) at each row, fp32 [N].

        Args:
            hidden_ND: the model's last hidden states, any float type.
            target_N: int64 token ids.
        """
        rows = max(1, CHUNK_BYTES // (4 * self._vocabulary()))
        if type(self.linear) is torch.nn.Linear:
            # Asked here: inside the autograd function's forward, gradients always look disabled.
            keeps = torch.is_grad_enabled() and self.softcap is None
            options = _Options(rows, self.scale, self.softcap, autocast_matmul_dtype(hidden_ND), keeps)
            weight_VD, bias_V = self.linear.weight, self.linear.bias
            logps_N: torch.Tensor = _LinearLogps.apply(hidden_ND, weight_VD, bias_V, target_N, options)
            return logps_N
        # Adapters, quantised weights, any other module: it runs again in the backward pass.
        chunks = zip(hidden_ND.split(rows), target_N.split(rows), strict=True)
        return torch.cat([checkpoint(self._module_logps, h, t, use_reentrant=False) for h, t in chunks])

    def _module_logps(self, hidden_CD: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
        logits_CV = self.linear(hidden_CD).float() * self.scale
        if self.softcap is not None:
            logits_CV = self.softcap * torch.tanh(logits_CV / self.softcap)
        return -torch.nn.functional.cross_entropy(logits_CV, target_C, reduction="none")

    def _vocabulary(self) -> int:
        return int(getattr(self.linear, "out_features"))  # noqa: B009 (mypy: Module has no such attribute)


@dataclass(frozen=True, slots=True)
class _Options:
    rows: int
    scale: float
    softcap: float | None
    dtype: torch.dtype
    keeps: bool


class _LinearLogps(torch.autograd.Function):
    """log_softmax(x Wᵀ + b)[target], chunk by chunk.

    With e = softmax(logits) - onehot(target) and g the incoming gradient, the gradient of the logits is -g · e. As g is
    one number per row, it scales the small operands of the backward pass's products, never a [C, V] tensor. The first
    chunks' e are kept, up to `KEPT_BYTES`; the other chunks' logits are recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        options: _Options,
    ) -> torch.Tensor:
        logps_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_ND.device)
        lse_N = torch.empty_like(logps_N)
        kept: list[torch.Tensor] = []
        room = KEPT_BYTES if options.keeps else 0
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight = weight_VD.to(options.dtype)
            for here in _chunks(len(target_N), options.rows):
                logits_CV, _ = _logits(hidden_ND[here], weight, bias_V, options)
                lse_N[here] = logits_CV.logsumexp(1)
                logps_N[here] = logits_CV.gather(1, target_N[here, None]).squeeze(1) - lse_N[here]
                room -= 4 * logits_CV.numel()
                if room >= 0:
                    kept.append(_error(logits_CV, lse_N[here], target_N[here]))
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, lse_N, *kept)
        ctx.options = options
        return logps_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_N,), options = grads, ctx.options
        hidden_ND, weight_VD, bias_V, target_N, lse_N, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight = weight_VD.to(options.dtype)
            for number, here in enumerate(_chunks(len(target_N), options.rows)):
                if number < len(kept):
                    error_CV = kept[number]
                else:
                    logits_CV, tanh_CV = _logits(hidden_ND[here], weight, bias_V, options)
                    error_CV = _error(logits_CV, lse_N[here], target_N[here])
                    if tanh_CV is not None:
                        error_CV *= 1 - tanh_CV.square_()
                upstream_C1 = -options.scale * grad_N[here, None]
                error = error_CV.to(options.dtype)
                if grad_hidden is not None:
                    grad_hidden[here] = (error @ weight) * upstream_C1
                if grad_weight is not None:
                    _accumulate_product(grad_weight, error, (hidden_ND[here] * upstream_C1).to(options.dtype))
                if grad_bias is not None:
                    grad_bias += (error_CV * upstream_C1).sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None


def _chunks(total: int, rows: int) -> list[slice]:
    return [slice(first, min(first + rows, total)) for first in range(0, total, rows)]


def _logits(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, options: _Options
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits, fp32 [C, V], and the tanh of the softcap if the head has one."""
    logits_CV = (hidden_CD.to(options.dtype) @ weight_VD.T).float()
    if bias_V is not None:
        logits_CV += bias_V
    if options.scale != 1.0:
        logits_CV *= options.scale
    if options.softcap is None:
        return logits_CV, None
    tanh_CV = logits_CV.div_(options.softcap).tanh_()
    return options.softcap * tanh_CV, tanh_CV


def _error(logits_CV: torch.Tensor, lse_C: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
    """softmax(logits) - onehot(target), in place."""
    minus_one_C1 = torch.full_like(lse_C, -1.0)[:, None]
    return logits_CV.sub_(lse_C[:, None]).exp_().scatter_add_(1, target_C[:, None], minus_one_C1)


def _accumulate_product(total_VD: torch.Tensor, error_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """total += errorᵀ hidden; in one call where the types are the same."""
    if total_VD.dtype == error_CV.dtype:
        total_VD.addmm_(error_CV.T, hidden_CD)
    else:
        total_VD += error_CV.T @ hidden_CD
