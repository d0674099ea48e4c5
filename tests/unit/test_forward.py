import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orpo_ray.data import Pair
from orpo_ray.forward import Batch, NllScope, collate, nll_tokens, pair_logps
from orpo_ray.loss import BatchCounts, orpo

SCOPES: list[NllScope] = ["prompt_and_response", "response"]
VOCABULARY = 61
PAD = 0
# (prompt, chosen, rejected) tokens: one-token prompts and answers, chosen longer and shorter than rejected.
LENGTHS = [(7, 5, 9), (1, 6, 2), (12, 1, 1), (1, 1, 1), (3, 17, 4), (9, 2, 11)]


def make_pair(*parts: Sequence[int]) -> Pair:
    prompt, chosen, rejected = (np.array(part, dtype=np.int32) for part in parts)
    return Pair("test:1", prompt, chosen, rejected, chosen_bytes=1)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    # PAD is among the real tokens: only the masks may tell them from padding.
    return [make_pair(*(rng.integers(0, VOCABULARY, n).tolist() for n in lengths)) for lengths in LENGTHS]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # large, so that every position and every neighbour matters
    )
    return LlamaForCausalLM(config).eval()


def test_collate_by_hand() -> None:
    pairs = [make_pair([5, 6], [7, 8], [9]), make_pair([4], [3], [2, 1, 1])]
    batch = collate(pairs, pad_token_id=0, scope="prompt_and_response")
    assert batch.input_ids_ST.tolist() == [[5, 6, 7, 8], [4, 3, 0, 0], [5, 6, 9, 0], [4, 2, 1, 1]]
    assert batch.attention_mask_ST.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.answer_mask_ST.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1]]
    assert batch.nll_mask_PT.int().tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]
    response = collate(pairs, pad_token_id=0, scope="response")
    assert response.nll_mask_PT.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize("scope", SCOPES)
def test_counts_from_lengths_are_the_counts_of_the_masks(
    model: LlamaForCausalLM, pairs: list[Pair], scope: NllScope
) -> None:
    prompts_N, chosen_N, _ = np.array(LENGTHS).T
    batch = collate(pairs, PAD, scope)
    counted = nll_tokens(prompts_N, chosen_N, scope)
    expected = {"prompt_and_response": [11, 6, 12, 1, 19, 10], "response": [5, 6, 1, 1, 17, 2]}[scope]
    assert counted.tolist() == expected
    assert batch.nll_mask_PT.sum(1).tolist() == expected
    assert pair_logps(model, batch).nll_tokens_P.tolist() == expected


@pytest.mark.parametrize("scope", SCOPES)
def test_equals_the_definition_sequence_by_sequence(
    model: LlamaForCausalLM, pairs: list[Pair], naive_logps: Callable[..., dict[str, torch.Tensor]], scope: NllScope
) -> None:
    logps = pair_logps(model, collate(pairs, PAD, scope))
    expected = naive_logps(model, pairs, scope)
    for name, result in (
        ("chosen", logps.chosen_logps_P),
        ("rejected", logps.rejected_logps_P),
        ("nll_sums", logps.nll_sums_P),
        ("nll_tokens", logps.nll_tokens_P),
    ):
        torch.testing.assert_close(result.double(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("pad_token_id", [0, VOCABULARY - 1])
def test_padding_and_company_do_not_move_a_pair(
    model: LlamaForCausalLM, pairs: list[Pair], scope: NllScope, pad_token_id: int
) -> None:
    together = pair_logps(model, collate(pairs, pad_token_id, scope))
    backwards = pair_logps(model, collate(pairs[::-1], pad_token_id, scope))
    for index, pair in enumerate(pairs):
        alone = pair_logps(model, collate([pair], PAD, scope))
        for field in dataclasses.fields(alone):
            expected = getattr(alone, field.name)[0]
            torch.testing.assert_close(getattr(together, field.name)[index], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(getattr(backwards, field.name)[-1 - index], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reduction", ["token", "pair"])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(
    model: LlamaForCausalLM, pairs: list[Pair], scope: NllScope, reduction: str
) -> None:
    """Law 2, on a model: also uneven cuts of pairs of very different length."""
    prompts_N, chosen_N, _ = np.array(LENGTHS).T
    counts = BatchCounts(len(pairs), int(nll_tokens(prompts_N, chosen_N, scope).sum()))

    def gradient(*sizes: int) -> torch.Tensor:
        model.zero_grad()
        rest = iter(pairs)
        for size in sizes:
            batch = collate([next(rest) for _ in range(size)], PAD, scope)
            orpo(pair_logps(model, batch), counts, orpo_lambda=0.5, nll_reduction=reduction).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(6)
    for sizes in [(1, 1, 1, 1, 1, 1), (2, 2, 2), (1, 5), (4, 2)]:
        torch.testing.assert_close(gradient(*sizes), whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


def test_log_probabilities_are_fp32_whatever_the_model(model: LlamaForCausalLM, pairs: list[Pair]) -> None:
    logps = pair_logps(copy.deepcopy(model).bfloat16(), collate(pairs, PAD, "response"))
    assert logps.chosen_logps_P.dtype == logps.rejected_logps_P.dtype == logps.nll_sums_P.dtype == torch.float32


def test_batch_moves_as_a_whole(pairs: list[Pair]) -> None:
    moved = collate(pairs, PAD, "response").to(torch.device("meta"))
    assert isinstance(moved, Batch)
    assert {getattr(moved, field.name).device.type for field in dataclasses.fields(moved)} == {"meta"}
