"""bf16 on CPUs: whether there are units for it, and what to do where there are none.

With units a bf16 matrix product takes half as long as an fp32 one, without them about twice as long (docs/log.md).
Where there are none, values are kept in bf16 and products run through fp32 kernels. An fp32 product of the same values
is at least as exact: bf16 kernels accumulate in fp32 too.
"""

from __future__ import annotations

import os
from types import MethodType
from typing import Any

import torch

from orpo_ray.hardware import BF16_FLAGS
from orpo_ray.models import precision as precisions

BLOCK = 64
"""Where bf16 kernels are used, shared rows and targets are filled up to a multiple of this: oneDNN compiles a kernel
for each shape, which takes time, and keeps it, which takes some 0.5 MiB."""
_KEPT_KERNELS = "256"
"""A step of a model whose layers are alike needs some 20 for each length of its rows."""


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones (`memory.BF16_FLAGS`)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(flag, False) for flag in BF16_FLAGS)


def bound_kernel_caches() -> None:
    """Keep few of the kernels of padded rows and of prompts to be answered, which have lengths of every kind.

    The caches are oneDNN's and torch's own, of 1,024 entries each; both look here when they are first used. With AMX,
    torch's attention has another one in each thread, which nothing bounds.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, _KEPT_KERNELS)


def use_fp32_product(module: torch.nn.Linear) -> None:
    """Make a linear layer compute in fp32 and return bf16, as it would under autocast."""
    module.forward = MethodType(_linear, module)  # type: ignore[method-assign]


def _linear(module: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = _Linear.apply(inputs, module.weight, module.bias)
    return output


class _Linear(torch.autograd.Function):
    """x Wᵀ + b with fp32 weights and products. The input is kept as it came, not as one more copy in bf16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.linear(x.float(), weight, bias).bfloat16()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        grad = grads[0].float()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).T @ x.float().flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_weight, grad_bias


def matmul_dtype(precision: str) -> torch.dtype | None:
    """What matrix products run in under `train.precision` on this process's device; None for the weights' own fp32."""
    if precision == "auto":
        wants_bf16 = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if torch.cuda.is_available()
            else precisions.has_bf16_units()
        )
        return torch.bfloat16 if wants_bf16 else None
    return torch.bfloat16 if precision == "bf16" else None


def precision_name(products: torch.dtype | None) -> str:
    """`matmul_dtype`'s answer in the config's words."""
    return "fp32" if products is None else "bf16"
