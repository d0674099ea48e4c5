"""Attention over shared rows against a mask spelled out; FlexAttention's masks and calls in its uncompiled form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention

from orpo_ray.data.dataset import Pair
from orpo_ray.models import attention
from orpo_ray.models.attention import shared_prompt_attention
from orpo_ray.models.packing import LossMask, SharedPrompt, collate

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
LENGTHS = [(7, 5, 9), (1, 6, 2), (12, 1, 1), (1, 1, 1)]
WINDOWS = [None, 4, 100]


@pytest.fixture(scope="module")
def layout() -> SharedPrompt:
    pairs = [Pair("t:1", *(np.ones(n, dtype=np.int32) for n in lengths), chosen_bytes=1) for lengths in LENGTHS]
    found = collate(pairs, LossMask("response"), share_prompt=True, multiple_of=16).layout
    assert found is not None
    assert (found.pair_T == -1).any()  # filling takes part
    return found


def tensors(layout: SharedPrompt, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, len(layout.pair_T), WIDTH, generator=generator, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def spelled_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SharedPrompt,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
    scores = 0.3 * query @ key.transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~layout.sees_TT(window), -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("flex", [False, True], ids=["pair by pair", "flex"])
def test_equals_the_mask_spelled_out(
    layout: SharedPrompt, window: int | None, softcap: float | None, flex: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flex:  # uncompiled: the same masks and scores, on a CPU and slowly; what CUDA runs is compiled from it
        monkeypatch.setattr(attention, "_pair_by_pair", attention._flex)
        monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    inputs = tensors(layout)
    if flex:
        inputs = [tensor.detach() for tensor in inputs]
    found, _ = shared_prompt_attention(
        torch.nn.Identity(), *inputs, None, scaling=0.3, sliding_window=window, softcap=softcap, layout=layout
    )
    expected = spelled_out(*inputs, layout, window, softcap)
    real = layout.pair_T >= 0
    torch.testing.assert_close(found[:, real], expected[:, real])
    upstream = torch.randn_like(found) * real[:, None, None]
    if not flex:  # the uncompiled form's backward pass is not offered on CPUs
        gradients = torch.autograd.grad(found, inputs, upstream)
        for result, reference in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
            torch.testing.assert_close(result, reference)


@pytest.mark.parametrize("window", WINDOWS)
def test_flex_masks_are_the_definition(layout: SharedPrompt, window: int | None) -> None:
    width = len(layout.pair_T)
    mask = create_mask(lambda b, h, q, k: layout.sees(q, k, window), None, None, width, width, device="cpu")
    assert torch.equal(mask[0, 0], layout.sees_TT(window))
    block_mask = attention._block_mask(layout, window)
    assert attention._block_mask(layout, window) is block_mask  # built once for all layers
    assert block_mask.shape == (1, 1, width, width)


def test_masks_are_kept_for_the_newest_row_only(layout: SharedPrompt) -> None:
    first = attention._block_mask(layout, None)
    other = SharedPrompt(layout.lengths, layout.pair_T, layout.part_T, layout.position_T)
    assert attention._block_mask(other, None) is not first
    assert attention._block_mask(layout, None) is not first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": None}, "Identity does not pass keyword arguments on"),
        ({"s_aux": torch.zeros(4)}, "Identity wants attention with s_aux"),
    ],
)
def test_what_is_not_understood_is_refused(layout: SharedPrompt, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared_prompt_attention(torch.nn.Identity(), *tensors(layout), None, **{"layout": layout} | options)


def test_flex_has_no_dropout(layout: SharedPrompt) -> None:
    scores = attention._Scores(None, 0.1, None, None)
    with pytest.raises(ValueError, match=r"no attention dropout, but the model's configuration asks for 0\.1"):
        attention._flex(*tensors(layout), layout, scores)
