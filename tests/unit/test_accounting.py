"""Compute of ORPO against DPO."""

from __future__ import annotations

import numpy as np
import pytest

from orpo_ray.accounting import Accounting, measure, table
from orpo_ray.config import ModelConfig
from orpo_ray.data import Pair
from orpo_ray.model import build_model

LENGTHS = [(20, 5, 9), (12, 7, 3)]


@pytest.fixture(scope="module")
def found() -> Accounting:
    rng = np.random.default_rng(0)
    pairs = [
        Pair(str(i), *(rng.integers(10, 900, size, dtype=np.int32) for size in lengths), 1)
        for i, lengths in enumerate(LENGTHS)
    ]
    return measure(ModelConfig(path="tiny-llama-1m"), pairs)


def test_dpo_runs_twice_the_forward_passes(found: Accounting) -> None:
    steps = {step.name: step for step in found.steps}
    orpo, dpo = steps["ORPO, padded rows"], steps["DPO, padded rows, reference in memory"]
    assert (orpo.sequences_per_pair, dpo.sequences_per_pair) == (2, 4)
    assert dpo.forward_flops == 2 * orpo.forward_flops
    assert dpo.tokens_per_pair == 2 * orpo.tokens_per_pair == 4 * 29
    assert dpo.held_bytes - orpo.held_bytes == 4 * found.parameters
    # DPO has no loss on the prompt, which ORPO's NLL reads, but the same logits are computed.
    assert dpo.backward_flops == orpo.backward_flops


def test_a_shared_prompt_is_computed_once(found: Accounting) -> None:
    steps = {step.name: step for step in found.steps}
    shared, kept = steps["ORPO, shared prompt"], steps["DPO, shared prompt, later epochs: reference from disk"]
    assert shared.tokens_per_pair == sum(map(sum, LENGTHS)) / 2
    assert shared.forward_flops < 0.7 * steps["ORPO, padded rows"].forward_flops
    assert (kept.forward_flops, kept.held_bytes) == (shared.forward_flops, shared.held_bytes)
    assert steps["DPO, shared prompt, first epoch"].forward_flops == 2 * shared.forward_flops


def test_the_count_is_that_of_the_products(found: Accounting) -> None:
    """By hand: every weight of the layers once per token, the head once per counted token, attention on top."""
    model = build_model(ModelConfig(path="tiny-llama-1m"), seed=0)
    layers = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    head = model.get_output_embeddings().weight.numel()
    step = next(step for step in found.steps if step.name == "ORPO, shared prompt")
    counted = sum(prompt - 1 + chosen + rejected for prompt, chosen, rejected in LENGTHS) / len(LENGTHS)
    products = 2 * (layers * step.tokens_per_pair + head * counted)
    attention = step.forward_flops - products
    assert 0 < attention < 0.05 * products


def test_the_table_has_a_row_for_each(found: Accounting) -> None:
    titles, rows = table(found)
    assert {len(row) for row in rows} == {len(titles)}
    assert [row[0] for row in rows] == [step.name for step in found.steps]
    assert rows[0][5] == "1.00"
