"""Answers to held-out prompts: what transformers itself generates, the same however many workers there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from orpo_ray.data import load_pairs
from orpo_ray.generate import keep, read
from orpo_ray.model import build_model, load_tokenizer
from tests.ranks import Job, experiment, train, train_all

SETTINGS = {
    "train.max_steps": 4,
    "train.eval_every": 2,
    "train.log_every": 4,
    "generation.prompts": 3,
    "generation.max_new_tokens": 12,
}


def test_rows_of_a_step_replace_those_of_before_a_restart(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    for step, text in ((2, "a"), (4, "b"), (6, "c"), (4, "d")):
        keep(tmp_path, [{"step": step, "generated": text}], step)
    assert [(row["step"], row["generated"]) for row in read(tmp_path)] == [(2, "a"), (4, "d")]


@pytest.mark.slow
def test_equals_what_transformers_generates(tmp_path: Path) -> None:
    """One prompt after another, without padding, by the untrained model in its plain form."""
    config = experiment(tmp_path / "cache", **SETTINGS | {"optim.lr": 1e-30})
    train(config, tmp_path / "trial")
    rows = read(tmp_path / "trial")
    assert [row["step"] for row in rows] == [2, 2, 2, 4, 4, 4]
    tokenizer, lm = load_tokenizer(config.model), build_model(config.model, config.train.seed).eval()
    _, held_out = load_pairs(config.data, tokenizer)
    for row, index in zip(rows, [0, 1, 2, 0, 1, 2], strict=True):
        pair = held_out[index]
        ids_1T = torch.from_numpy(pair.prompt_ids.astype("int64"))[None]
        settings = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=2)
        out_1T = lm.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=settings)
        assert row["generated"] == tokenizer.decode(out_1T[0, ids_1T.shape[1] :], skip_special_tokens=True).strip()
        assert row["pair_id"] == pair.pair_id
        assert row["prompt"] == held_out.prompt_text(index)
        assert row["chosen"] == tokenizer.decode(pair.chosen_ids, skip_special_tokens=True).strip()


@pytest.mark.slow
def test_two_workers_answer_as_one_does(tmp_path: Path) -> None:
    """At ZeRO-3, where each has a share of every weight and one has fewer prompts; training is what it was."""
    split = SETTINGS | {"scaling.num_workers": 2, "deepspeed.zero_stage": 3}
    silent = split | {"generation.prompts": 0}
    alone = train(experiment(tmp_path / "cache", **SETTINGS), tmp_path / "alone")
    jobs = [Job(experiment(tmp_path / "cache", **s), tmp_path / n) for n, s in (("both", split), ("silent", silent))]
    both, unasked = train_all(jobs)
    assert read(tmp_path / "both") == read(tmp_path / "alone")
    assert read(tmp_path / "silent") == []
    assert both.evals == unasked.evals, "to be asked changed the training"
    assert both.evals[4]["eval/nll"] == pytest.approx(alone.evals[4]["eval/nll"], rel=1e-5)
