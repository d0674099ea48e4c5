"""Every loss through the real loop; the reference model's log-probabilities; architectures that must pad."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedTokenizerBase

from tests.support.ranks import Job, experiment, train_all

pytestmark = pytest.mark.slow
SHORT = {"train.max_steps": 6, "train.eval_every": 6, "train.global_batch_size": 16}


def test_losses_that_compare_with_a_reference_start_where_it_is(tmp_path: Path) -> None:
    """Before the first update the model is its reference, whatever else the batch holds."""
    cache = tmp_path / "cache"
    two = {"scaling.num_workers": 2, "deepspeed.zero_stage": 2}
    lora = {"model.lora": {"rank": 4}}
    jobs = [
        Job(experiment(cache, **SHORT, **two, **{"loss.name": "dpo", "loss.beta": 0.5}), tmp_path / "dpo"),
        Job(experiment(cache, **SHORT, **two, **{"loss.name": "ipo", "loss.beta": 0.25}), tmp_path / "ipo"),
        Job(experiment(cache, **SHORT, **two, **lora, **{"loss.name": "dpo", "loss.beta": 0.5}), tmp_path / "lora"),
    ]
    dpo, ipo, adapted = train_all(jobs)
    assert dpo.curve("train/loss")[0] == pytest.approx(math.log(2), rel=1e-5)
    assert adapted.curve("train/loss")[0] == pytest.approx(math.log(2), rel=1e-5)
    assert ipo.curve("train/loss")[0] == pytest.approx((1 / (2 * 0.25)) ** 2, rel=1e-5)
    for record in (dpo, ipo, adapted):
        assert record.result.status == "finished"
        assert min(record.curve("train/loss")) < record.curve("train/loss")[0]
        assert record.evals[6]["eval/loss"] != pytest.approx(record.curve("train/loss")[0], rel=1e-3)
    # One file for the training pairs and one for the held-out ones: computed once, then read by every trial.
    assert len(list((cache / "reference").glob("*.npy"))) == 2


def test_losses_without_a_reference_learn(tmp_path: Path) -> None:
    settings = {
        "cpo": {"loss.name": "cpo"},
        "simpo": {"loss.name": "simpo"},
        "probability ratio": {"loss.ratio": "probability"},
        "temperature": {"loss.temperature": 0.3},
        "llamafactory": {"loss.preset": "llamafactory"},
        "authors": {"loss.preset": "authors"},
        "plain": {},
    }
    jobs = [
        Job(experiment(tmp_path / "cache", **SHORT, **loss), tmp_path / str(i))
        for i, loss in enumerate(settings.values())
    ]
    records = dict(zip(settings, train_all(jobs), strict=True))
    for name, record in records.items():
        curve = record.curve("train/loss")
        assert curve[-1] < curve[0], name
    # Unlike each other, if only in the fifth digit: a fresh model's P is so small that odds and P are nearly one.
    last = {name: record.curve("train/loss")[-1] for name, record in records.items()}
    assert len(set(last.values())) == len(last), last


def test_an_architecture_that_cannot_share_pads_and_says_so(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=1024, hidden_size=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    bloom = {"model.path": str(tmp_path / "bloom"), "scaling.num_workers": 2, "deepspeed.zero_stage": 3}
    cut = {"train.max_tokens_per_micro_batch": 500}
    records = train_all(
        [
            Job(experiment(tmp_path / "cache", **SHORT, **bloom), tmp_path / "whole"),
            Job(experiment(tmp_path / "cache", **SHORT, **bloom, **cut), tmp_path / "cut"),
        ]
    )
    for record in records:
        assert record.facts["forward/rows"] == "padded"
        assert record.facts["forward/logits"] == "in chunks"
        assert "BloomForCausalLM implements its attention itself" in record.facts["forward/fallback"]
    whole, cut_up = (record.curve("train/loss") for record in records)
    assert cut_up == pytest.approx(whole, rel=1e-5)
