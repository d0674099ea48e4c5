"""Which models get which forward mode, and that the mode is right."""

import copy

import pytest
import torch
from transformers import (
    AttentionInterface,
    LlamaForCausalLM,
    Qwen2MoeConfig,
)

from orpo_ray.data.dataset import Pair
from orpo_ray.models.pair_model import ForwardMode
from orpo_ray.models.probe import probe_forward_mode
from tests.support.architectures import (
    GATED,
    PADDING,
    build,
    objective,
)
from tests.support.forwards import PLAIN, gradient


@pytest.mark.parametrize("architecture", PADDING)
def test_what_cannot_share_falls_back_and_says_why(architecture: str, pairs: list[Pair]) -> None:
    config, reason = PADDING[architecture]
    model = build(config)
    form = probe_forward_mode(model, "shared_prompt")
    assert (form.shares_prompt, form.chunks_head) == (False, True)
    assert reason in form.reason
    loss = objective(model, pairs, form)
    found = gradient(model)
    torch.testing.assert_close(loss, objective(model, pairs, PLAIN), rtol=1e-5, atol=0)
    expected = gradient(model)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_foreign_code_that_ignores_positions_is_found_out(llama: LlamaForCausalLM) -> None:
    """Custom code may take the interface and still do something of its own: the probe compares results."""
    model = copy.deepcopy(llama)
    rotate = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotate(x, torch.arange(x.shape[1])[None])
    form = probe_forward_mode(model, "shared_prompt")
    assert (form.shares_prompt, form.chunks_head) == (False, True)
    assert "log-probabilities are off by" in form.reason
    assert model.config._attn_implementation == llama.config._attn_implementation


def test_foreign_head_is_read_through_the_model_itself(llama: LlamaForCausalLM, pairs: list[Pair]) -> None:
    model = copy.deepcopy(llama)
    plain = model.forward

    def doubled(**inputs: object) -> object:
        output = plain(**inputs)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    form = probe_forward_mode(model, "shared_prompt")
    assert (form.shares_prompt, form.chunks_head) == (True, False)
    torch.testing.assert_close(objective(model, pairs, form), objective(model, pairs, PLAIN), rtol=1e-5, atol=0)


def test_a_window_that_is_only_in_masks_is_found_out(pairs: list[Pair]) -> None:
    """transformers builds no mask for our attention function, so such a model would see everything."""
    config = Qwen2MoeConfig(
        **{**GATED, "intermediate_size": 32},
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        use_sliding_window=True,
        sliding_window=32,  # longer than the probe's pairs
        layer_types=["sliding_attention"] * 2,
    )
    model = build(config)
    form = probe_forward_mode(model, "shared_prompt")
    assert (form.shares_prompt, form.chunks_head) == (False, True)
    assert "has its sliding window in masks only" in form.reason


def test_kernels_of_a_gpu_are_not_run_where_the_model_is_read(llama: LlamaForCausalLM) -> None:
    def needs_a_gpu(*args: object, **kwargs: object) -> None:
        raise RuntimeError("FlashAttention only supports CUDA")

    AttentionInterface.register("needs_a_gpu", needs_a_gpu)
    model = copy.deepcopy(llama)
    model.set_attn_implementation("needs_a_gpu")
    assert probe_forward_mode(model, "flash_attention_2") == ForwardMode(
        False, True, "model.attention is flash_attention_2"
    )
    assert model.config._attn_implementation == "needs_a_gpu"
    model.set_attn_implementation("sdpa")


def test_other_kernels_pad_on_request(llama: LlamaForCausalLM) -> None:
    assert probe_forward_mode(copy.deepcopy(llama), "sdpa") == ForwardMode(False, True, "model.attention is sdpa")


def test_probe_leaves_the_mode_and_the_gradients_alone(llama: LlamaForCausalLM) -> None:
    model = copy.deepcopy(llama).train()
    probe_forward_mode(model, "shared_prompt")
    assert model.training
    assert all(p.grad is None for p in model.parameters())
