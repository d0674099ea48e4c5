"""Answers to held-out prompts: what transformers itself generates, the same however many workers there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from orpo_ray.data.dataset import load_pairs
from orpo_ray.models.loading import build_model, load_tokenizer
from orpo_ray.storage.generations import keep, read
from tests.support.ranks import Job, experiment, train, train_all

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


def test_a_line_separator_in_an_answer_stays_in_its_row(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line of text, not of a file of JSON lines."""
    rows = [{"step": 1, "generated": "one\u2028two\u0085three\nfour"}]
    keep(tmp_path, rows, 1)
    keep(tmp_path, rows, 1)
    assert read(tmp_path) == rows


@pytest.mark.slow
def test_answers_end_where_the_model_has_no_more_positions(tmp_path: Path) -> None:
    """A model with learned positions would fail past them; being asked must not end a trial."""
    folder = tmp_path / "gpt2"
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256, "vocab_size": 4096}
    GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=1, pad_token_id=2, **shape)).save_pretrained(folder)
    load_tokenizer(experiment(tmp_path).model).save_pretrained(folder)
    room = {"model.path": str(folder), "generation.max_new_tokens": 400, "train.max_steps": 1, "train.eval_every": 1}
    train(experiment(tmp_path / "cache", **SETTINGS | room), tmp_path / "some")
    assert len(read(tmp_path / "some")) == 3
