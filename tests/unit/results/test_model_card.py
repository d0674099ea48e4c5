"""The card says what a reader has to know, and nothing that is not so."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from orpo_ray.config import parse
from orpo_ray.results.model_card import CardFacts, Pairs, model_card
from tests.support.ranks import BASE
from tests.support.sweeps import trial


@pytest.fixture
def facts() -> CardFacts:
    tree = json.loads(json.dumps(BASE))
    tree["model"]["path"] = "HuggingFaceTB/SmolLM2-135M"
    tree["data"] |= {"path": "Anthropic/hh-rlhf", "cache_dir": "/scratch/cache"}
    tree |= {"loss": {"orpo_lambda": 0.25}, "tracking": {"uri": "https://me:secret@mlflow"}}
    best = trial("t1", {"loss.orpo_lambda": 0.25}, None) | {"mlflow_run_id": "e" * 32}
    row = {"name": "λ=0.25", "trial_ids": ["t1"], "seeds": 1, "mean": 1.5, "low": 1.25, "high": 1.75}
    winners: dict[str, Any] = {"settings": [row], "tied": ["λ=0.25", "λ=0.5"], "selection_bias": {"sentence": "It is."}}
    results = {
        "name": "s",
        "metric": "eval/nll",
        "mode": "min",
        "best": best,
        "trials": [best, best],
        "winners": winners,
    }
    return CardFacts(
        config=parse(tree),
        trial=best,
        results=results | {"winners": winners},
        step=20,
        metrics={"eval/nll": 1.5, "eval/loss": None},
        num_workers=2,
        zero_stage=3,
        products="bf16",
        dtype="float32",
        parameters=1234567,
        pairs=(Pairs(256, "a1"), Pairs(24, "b2")),
        was_checked=True,
        provenance={"packages": {"torch": "2.13.0", "peft": None}, "python": "3.11.9", "git": None},
        experiment_file="experiment.yaml",
    )


def test_front_matter_is_what_the_hub_reads(facts: CardFacts) -> None:
    data = ModelCard(model_card(facts)).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert data.datasets == ["Anthropic/hh-rlhf"]
    assert data.library_name == "transformers"
    assert {"orpo", "preference-tuning"} <= set(data.tags)
    local = facts.config.model_copy(
        update={
            "model": facts.config.model.model_copy(update={"path": "/models/mine"}),
            "data": facts.config.data.model_copy(update={"path": "builtin://style-pairs"}),
        }
    )
    data = ModelCard(model_card(replace(facts, config=local))).data
    assert (data.base_model, data.datasets) == (None, None)


def test_numbers_settings_and_the_command_are_there(facts: CardFacts) -> None:
    card = model_card(facts)
    for text in (
        "1,234,567 parameters",
        "λ = 0.25",
        "| `eval/nll` | 1.5000 | 1.2500 to 1.7500 |",
        "| `eval/loss` | – | – |",
        "over 24 held-out pairs",
        "best of 2 trials of the sweep `s`: lowest `eval/nll`. These settings are tied with it: λ=0.5. It is.",
        "20 steps of 8 pairs on 2 workers with DeepSpeed ZeRO stage 3; matrix products in bf16",
        "orpo-ray train experiment.yaml",
        "torch 2.13.0",
        "e" * 32,
    ):
        assert text in card, text
    assert "secret" not in card
    assert "/scratch" not in card
    assert "peft" not in card


def test_what_is_not_so_is_not_said(facts: CardFacts) -> None:
    card = model_card(replace(facts, was_checked=False, pairs=None, trial=dict(facts.trial) | {"trial_id": "t2"}))
    assert "were not computed again" in card
    assert "Chosen by hand: trial `t2`, one of 2" in card
    assert "1.2500" not in card  # the interval is of another setting
    assert "SHA-256" not in card
    rounded = model_card(replace(facts, dtype="bfloat16"))
    assert "rounded to bfloat16" in rounded
    assert "rounded to bfloat16" not in card
    stopped = dict(facts.trial) | {"status": "stopped_early", "steps": 20, "forks": [{"step": 10}]}
    assert "stopped early after 20 steps" in model_card(replace(facts, trial=stopped))
    assert "took over another trial's weights at step 10" in model_card(replace(facts, trial=stopped))
