"""Compute of ORPO against DPO: counts of real passes against the paper's and against products counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from orpo_ray.config import ModelConfig
from orpo_ray.data.dataset import Pair
from orpo_ray.formatting import markdown_table
from orpo_ray.models import precision
from orpo_ray.models.loading import build_model
from orpo_ray.models.pair_model import ForwardMode
from orpo_ray.models.presets import PRESET_VOCABULARY, PRESETS
from orpo_ray.reproduction import flops
from orpo_ray.reproduction.flops import (
    DPO_FIRST_EPOCH,
    DPO_IN_MEMORY,
    DPO_LATER_EPOCHS,
    ORPO_PADDED,
    ORPO_SHARED,
    Accounting,
    Row,
    measure,
    table,
)
from orpo_ray.reproduction.published import FORWARD_PASSES

TINY = ModelConfig(path="tiny-llama-1m")
# (prompt, chosen, rejected) tokens: chosen longer and shorter than rejected; the shorter pair is padded.
LENGTHS = [(20, 5, 9), (12, 7, 3)]
LONGEST = 29


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    return [
        Pair(str(i), *(rng.integers(10, 900, size, dtype=np.int32) for size in lengths), 1)
        for i, lengths in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def found(pairs: list[Pair]) -> Accounting:
    return measure(TINY, pairs)


@pytest.fixture(scope="module")
def rows(found: Accounting) -> dict[str, Row]:
    return {row.name: row for row in found.rows}


def by_hand(tokens: int, attended: int) -> float:
    """Forward FLOPs per pair, from the preset's shape: 2 per weight and token, and two products per attended key.

    Args:
        tokens: of all rows.
        attended: (query, key) places of all attention calls, hidden ones too.
    """
    shape = PRESETS[TINY.path]
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    linear = layers * (4 * width * width + 3 * width * shape["intermediate_size"])
    counted = sum(prompt - 1 + chosen + rejected for prompt, chosen, rejected in LENGTHS)
    head = 2 * width * PRESET_VOCABULARY * counted
    return (2 * linear * tokens + head + 4 * layers * width * attended) / len(LENGTHS)


def test_padded_rows_run_the_papers_forward_passes(rows: dict[str, Row]) -> None:
    orpo, dpo = rows[ORPO_PADDED], rows[DPO_IN_MEMORY]
    assert orpo.sequences_per_pair == FORWARD_PASSES["orpo"]
    assert dpo.sequences_per_pair == FORWARD_PASSES["dpo"]
    assert (orpo.model_calls_per_step, dpo.model_calls_per_step) == (1, 2)
    assert dpo.tokens_per_pair == 2 * orpo.tokens_per_pair == 4 * LONGEST
    assert dpo.forward_flops == pytest.approx(2 * orpo.forward_flops, rel=1e-9)
    # The frozen reference has no backward pass: a whole step is 4/3 of ORPO's, not twice.
    assert dpo.backward_flops == pytest.approx(orpo.backward_flops, rel=1e-9)
    assert dpo.flops == pytest.approx(4 / 3 * orpo.flops, rel=1e-9)


def test_a_reference_on_disk_costs_the_first_epoch_only(rows: dict[str, Row]) -> None:
    orpo, first, later = rows[ORPO_SHARED], rows[DPO_FIRST_EPOCH], rows[DPO_LATER_EPOCHS]
    assert first.forward_flops == pytest.approx(2 * orpo.forward_flops, rel=1e-9)
    assert later.forward_flops == pytest.approx(orpo.forward_flops, rel=1e-9)
    assert later.backward_flops == first.backward_flops == pytest.approx(orpo.backward_flops, rel=1e-9)
    assert [row.model_calls_per_step for row in (orpo, first, later)] == [1, 2, 1]
    assert first.tokens_per_pair == 2 * later.tokens_per_pair


def test_a_shared_prompt_is_computed_once(rows: dict[str, Row]) -> None:
    shared = rows[ORPO_SHARED]
    assert shared.tokens_per_pair == sum(map(sum, LENGTHS)) / len(LENGTHS)
    assert shared.sequences_per_pair is None
    assert shared.flops < rows[ORPO_PADDED].flops


def test_forward_flops_are_those_of_the_products(rows: dict[str, Row]) -> None:
    two_calls = sum((p + c) ** 2 + r * (p + r) for p, c, r in LENGTHS)
    assert rows[ORPO_SHARED].forward_flops == by_hand(sum(map(sum, LENGTHS)), two_calls)
    num = 2 * len(LENGTHS)
    assert rows[ORPO_PADDED].forward_flops == by_hand(num * LONGEST, num * LONGEST**2)


@pytest.mark.parametrize("name", [ORPO_PADDED, ORPO_SHARED, DPO_LATER_EPOCHS])
def test_every_product_has_two_gradients(rows: dict[str, Row], name: str) -> None:
    """Also the head's, whose weight gradient is added up in place, and attention's."""
    assert rows[name].backward_flops == 2 * rows[name].forward_flops


def test_bytes_follow_from_the_parameters(found: Accounting, rows: dict[str, Row]) -> None:
    number = sum(p.numel() for p in build_model(TINY, seed=0).parameters())
    assert found.parameters == number
    assert {row.held_bytes for row in found.rows if row.name != DPO_IN_MEMORY} == {16 * number}
    assert rows[DPO_IN_MEMORY].held_bytes == 20 * number
    assert rows[DPO_IN_MEMORY].reference_bytes == 4 * number


@pytest.mark.parametrize("has_units", [False, True])
def test_counts_do_not_depend_on_precision_or_recomputation(
    has_units: bool, found: Accounting, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16_units", lambda: has_units)
    recomputing = TINY.model_copy(update={"gradient_checkpointing": True})
    assert measure(recomputing, pairs, precision="bf16") == found


def test_without_a_shared_prompt_the_reference_is_kept_for_padded_rows(
    monkeypatch: pytest.MonkeyPatch, pairs: list[Pair]
) -> None:
    monkeypatch.setattr(flops, "probe_forward_mode", lambda lm, wanted: ForwardMode(False, True, "it cannot"))
    fallen = measure(TINY, pairs)
    assert fallen.fallback == "it cannot"
    assert [row.name for row in fallen.rows] == [ORPO_PADDED, DPO_IN_MEMORY, DPO_FIRST_EPOCH, DPO_LATER_EPOCHS]
    assert [row.sequences_per_pair for row in fallen.rows] == [2, 4, 4, 2]


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        measure(TINY, [])


def test_the_table_has_a_row_for_each(found: Accounting) -> None:
    titles, cells = table(found)
    assert {len(row) for row in cells} == {len(titles)}
    assert [row[0] for row in cells] == [row.name for row in found.rows]
    at = titles.index("sequences per pair")
    assert [row[at] for row in cells] == ["2", "–", "4", "–", "–"]
    assert [row[titles.index("times the first")] for row in cells if row[0] in (ORPO_PADDED, DPO_IN_MEMORY)] == [
        "1.000",
        "1.333",
    ]
    assert len(markdown_table(titles, cells).splitlines()) == 2 + len(found.rows)
