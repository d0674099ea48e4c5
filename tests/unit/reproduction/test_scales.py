"""Scales of a reproduction."""

from __future__ import annotations

import json

from orpo_ray.data import style_pairs
from orpo_ray.reproduction import scales
from orpo_ray.reproduction.scales import base_pairs, scale


def test_another_model_is_not_set_beside_the_papers_row() -> None:
    assert scale("small").compared_with == ("OPT-125M", "HH-RLHF")
    assert scale("small", model="facebook/opt-350m").compared_with is None


def test_base_pairs_prefer_nothing() -> None:
    rows = [json.loads(line) for line in base_pairs(400).splitlines()]
    assert len(rows) == 400
    kept = sum(
        row["chosen"] == given["chosen"] for row, given in zip(rows, style_pairs.generate(400, seed=1), strict=True)
    )
    assert 160 < kept < 240


def test_seeds_share_none_of_their_own() -> None:
    """Whatever two reproductions train, policies and reward models, they train with other seeds."""
    taken = [
        {scale("tiny", seed=number).tree("lambda")["train"]["seed"]}
        | {scales.SEED_STRIDE * number + offset for offset in scales.REWARD_MODEL_SEEDS.values()}
        for number in range(12)
    ]
    assert len(set.union(*taken)) == 3 * 12
    assert [scale("tiny", seed=number).sampling.seed for number in (0, 3)] == [0, 3]
