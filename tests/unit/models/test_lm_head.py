"""Chunked log-probabilities against log_softmax over all logits: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from orpo_ray.models import lm_head
from orpo_ray.models.lm_head import Head

N, D, V = 37, 16, 101


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 4 * V * 10)  # 10 targets at a time: 4 chunks, the last one short
    monkeypatch.setattr(lm_head, "KEPT_BYTES", 4 * V * 20)  # two of them are kept for the backward pass


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(N, D, generator=generator, dtype=dtype, requires_grad=True)
    target_N = torch.randint(0, V, (N,), generator=generator)
    target_N[:2] = target_N[2]  # the same target more than once
    return hidden_ND, target_N, torch.randn(N, generator=generator, dtype=torch.float32)


def linear(bias: bool, dtype: torch.dtype = torch.float64) -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(D, V, bias=bias, dtype=dtype)


def spelled_out(hidden_ND: torch.Tensor, target_N: torch.Tensor, head: Head) -> torch.Tensor:
    logits_NV = head.linear(hidden_ND) * head.scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    return log_softmax(logits_NV, -1).gather(1, target_N[:, None])[:, 0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.0), (1.7, 0.9)])
def test_values_and_gradients_equal_log_softmax(bias: bool, scale: float, softcap: float | None) -> None:
    module = linear(bias, torch.float32)
    hidden_ND, target_N, upstream_N = inputs(torch.float32)
    wanted = Head(module, scale, softcap)
    parameters = [hidden_ND, *module.parameters()]
    found = wanted.logps(hidden_ND, target_N)
    expected = spelled_out(hidden_ND, target_N, wanted)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for result, reference in zip(
        torch.autograd.grad((found * upstream_N).sum(), parameters),
        torch.autograd.grad((expected * upstream_N).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-6)


def test_frozen_head_gets_no_gradient_and_a_frozen_body_none_either() -> None:
    module = linear(True, torch.float32).requires_grad_(False)
    hidden_ND, target_N, upstream_N = inputs(torch.float32)
    (Head(module).logps(hidden_ND, target_N) * upstream_N).sum().backward()
    assert hidden_ND.grad is not None
    assert module.weight.grad is None
    module.requires_grad_(True)
    (Head(module).logps(hidden_ND.detach(), target_N) * upstream_N).sum().backward()
    assert module.weight.grad is not None
    assert module.bias.grad is not None


def test_twice_through_the_graph_gives_the_same_gradient() -> None:
    """What is kept for the backward pass must survive it."""
    module = linear(False, torch.float32)
    hidden_ND, target_N, upstream_N = inputs(torch.float32)
    loss = (Head(module).logps(hidden_ND, target_N) * upstream_N).sum()
    first = torch.autograd.grad(loss, [hidden_ND, module.weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden_ND, module.weight])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("on_head", [True, False])
def test_lora_on_and_off_the_head(on_head: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    targets = ["q_proj", "lm_head"] if on_head else ["q_proj"]
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=3, target_modules=targets))
    adapted = model.get_base_model().get_output_embeddings()
    if on_head:
        torch.nn.init.normal_(adapted.lora_B["default"].weight)
    hidden_ND, target_N, upstream_N = inputs(torch.float32)
    wanted = Head(adapted)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    assert bool(trainable) == on_head
    found = torch.autograd.grad((wanted.logps(hidden_ND, target_N) * upstream_N).sum(), [hidden_ND, *trainable])
    plain = spelled_out(hidden_ND, target_N, wanted)
    for result, reference in zip(
        found, torch.autograd.grad((plain * upstream_N).sum(), [hidden_ND, *trainable]), strict=True
    ):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("has_units", [False, True])
def test_autocast_is_within_its_rounding(has_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo_ray.models.precision.has_bf16_units", lambda: has_units)
    module = linear(False, torch.float32)
    hidden_ND, target_N, upstream_N = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = Head(module).logps(hidden_ND, target_N)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, spelled_out(hidden_ND, target_N, Head(module)), rtol=2e-2, atol=2e-2)
    (found * upstream_N).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.dtype == torch.float32


def test_no_tensor_of_tokens_by_vocabulary_is_made_or_kept() -> None:
    """What is saved for the backward pass beyond the inputs stays under the budget, however many tokens there are."""
    module = linear(False, torch.float32)
    hidden_ND = torch.randn(1000, D, requires_grad=True)
    target_N = torch.randint(0, V, (1000,))
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Head(module).logps(hidden_ND, target_N)
    inputs_and_lse = 1000 * D + V * D + 2 * 1000
    assert sum(saved) == inputs_and_lse + lm_head.KEPT_BYTES // 4
    with torch.no_grad(), _Largest() as largest:
        Head(module).logps(hidden_ND, target_N)
    assert largest.numel <= max(10 * V, V * D)  # chunks and the weights; all logits would be 101,000
    with _Largest() as largest:
        Head(module).logps(hidden_ND, target_N).sum().backward()
    assert largest.numel <= max(10 * V, 1000 * D)


class _Largest(TorchDispatchMode):
    """The largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made
