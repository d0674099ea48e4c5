"""The type of matrix products, fp32 or bf16, chosen from config, device and autocast; bf16 on CPUs.

On a CPU with bf16 units, a bf16 matrix product takes half as long as an fp32 one; without them, about twice as long
(docs/log.md). On CPUs without them, values are kept in bf16 and products run through fp32 kernels. An fp32 product of
the same values is at least as exact: bf16 kernels accumulate in fp32 too.
"""

from __future__ import annotations

import os
from types import MethodType
from typing import Any

import torch

from orpo_ray.hardware import BF16_FLAGS

BLOCK = 64
"""Where bf16 kernels are used, shared rows and targets are padded to a multiple of this: oneDNN compiles a kernel for
each shape, which takes time, and keeps it, which takes some 0.5 MiB."""
_CACHED_KERNELS = "256"
"""One step of a model whose layers are alike needs some 20 for each row length."""


def matmul_dtype(precision: str) -> torch.dtype | None:
    """Type of matrix products under `train.precision` on this process's device; None for the weights' own fp32."""
    if precision == "auto":
        wants_bf16 = (
            torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else has_bf16_units()
        )
        return torch.bfloat16 if wants_bf16 else None
    return torch.bfloat16 if precision == "bf16" else None


def precision_name(dtype: torch.dtype | None) -> str:
    """The result of `matmul_dtype` in the config's words: `fp32` or `bf16`."""
    return "fp32" if dtype is None else "bf16"


def autocast_matmul_dtype(values: torch.Tensor) -> torch.dtype:
    """Type that a matrix product of these values runs in: autocast's inside an autocast region, else their own."""
    device = values.device.type
    if not torch.is_autocast_enabled(device):
        return values.dtype
    return torch.float32 if device == "cpu" and not has_bf16_units() else torch.get_autocast_dtype(device)


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones (`hardware.BF16_FLAGS`)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(flag, False) for flag in BF16_FLAGS)


def bound_kernel_caches() -> None:
    """Limit how many compiled kernels are cached: padded rows and prompts have many different lengths.

    The caches are oneDNN's and torch's own, of 1,024 entries each; both read these variables at their first use. With
    AMX, torch's attention has one more cache in each thread, which cannot be limited.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, _CACHED_KERNELS)


def use_fp32_product(module: torch.nn.Linear) -> None:
    """Make a linear layer compute in fp32 and return bf16, as it would return under autocast."""
    module.forward = MethodType(_linear, module)  # type: ignore[method-assign]


def _linear(module: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = _Linear.apply(inputs, module.weight, module.bias)
    return output


class _Linear(torch.autograd.Function):
    """x Wᵀ + b with fp32 weights and products. The input is saved as it came, without another copy in bf16."""

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
