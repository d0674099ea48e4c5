"""Reward models and RLHF through the real loop, on answers whose order is known: yes is better than no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from orpo_ray.config import ExperimentConfig
from orpo_ray.models.loading import build_model, build_reward_model, load_tokenizer
from orpo_ray.models.reward_model import RewardModel
from orpo_ray.training import engine_state
from tests.support.ranks import Job, Record, experiment, train_all

pytestmark = pytest.mark.slow

YES, NO = "yes, of course", "no, certainly not"


def _pairs(path: Path, chosen_is_yes: list[bool]) -> str:
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for number, is_yes in enumerate(chosen_is_yes):
            prompt = f"Question {number}: is {rng.integers(1000)} more than {rng.integers(1000)}?"
            answers = (YES, NO) if is_yes else (NO, YES)
            file.write(json.dumps({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}) + "\n")
    return str(path)


def _experiment(tmp_path: Path, data: str, **settings: Any) -> ExperimentConfig:
    short = {"data.path": data, "data.eval_pairs": 32, "data.train_pairs": None, "train.global_batch_size": 16}
    ends = {"train.eval_every": settings.get("train.max_steps"), "train.checkpoint_every": None}
    return experiment(tmp_path / "cache", **short | ends | settings)


def _folder(record: Record, config: ExperimentConfig, folder: Path, build: Any) -> str:
    """What `orpo-ray export` writes, without a sweep around it."""
    model: PreTrainedModel = build(config.model, config.train.seed)
    state = engine_state.full_state_dict(Path(record.result.checkpoint))
    model.load_state_dict({name.removeprefix("lm."): tensor for name, tensor in state.items()})
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(config.model)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def better_is_yes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Record]]:
    """A trained reward model's folder, and how training went with ZeRO 0 alone and ZeRO 2 and 3 on two workers."""
    tmp_path = tmp_path_factory.mktemp("reward")
    data = _pairs(tmp_path / "pairs.jsonl", [True] * 300)
    settings = {"loss.name": "reward", "train.max_steps": 16}
    alone = _experiment(tmp_path, data, **settings)
    two = {"scaling.num_workers": 2}
    shared = [
        Job(
            _experiment(tmp_path, data, **settings, **two, **{"deepspeed.zero_stage": stage}), tmp_path / f"zero{stage}"
        )
        for stage in (2, 3)
    ]
    (record,) = train_all([Job(alone, tmp_path / "alone")])
    records = dict(zip(("zero2", "zero3"), train_all(shared), strict=True)) | {"alone": record}
    return _folder(record, alone, tmp_path / "rm", build_reward_model), records


def test_a_reward_model_learns_a_known_order(better_is_yes: tuple[str, dict[str, Record]]) -> None:
    folder, records = better_is_yes
    held_out = records["alone"].evals[16]
    assert held_out["eval/preference_accuracy"] == 1.0
    assert held_out["eval/reward_margin"] > 2
    assert held_out["eval/reward_margin"] == pytest.approx(
        held_out["eval/chosen_reward"] - held_out["eval/rejected_reward"]
    )
    assert "eval/nll" not in held_out
    judge = RewardModel.load(folder, max_tokens=256)
    prompts = [[{"role": "user", "content": f"Question {n}: is {n} more than 3?"}] for n in range(400, 420)]
    rewards_NK = judge.score(prompts, [[NO, YES]] * len(prompts))
    assert (rewards_NK[:, 1] > rewards_NK[:, 0] + 1).all()


def test_reward_training_does_not_depend_on_how_it_is_cut(better_is_yes: tuple[str, dict[str, Record]]) -> None:
    _, records = better_is_yes
    whole = records["alone"].curve("train/loss")
    assert whole[-1] < 0.3 < 0.6 < whole[0]
    for name in ("zero2", "zero3"):
        assert records[name].curve("train/loss") == pytest.approx(whole, rel=1e-4), name


def test_rlhf_raises_the_reward_of_what_is_sampled(
    better_is_yes: tuple[str, dict[str, Record]], tmp_path: Path
) -> None:
    """From a model that says yes and no equally often, to one that says yes; a high price of divergence holds it."""
    data = _pairs(tmp_path / "mixed.jsonl", [number % 2 == 0 for number in range(300)])
    sft = _experiment(tmp_path, data, **{"loss.name": "sft", "loss.nll_scope": "response", "train.max_steps": 30})
    (begun,) = train_all([Job(sft, tmp_path / "sft")])
    start = _folder(begun, sft, tmp_path / "start", build_model)
    rloo = {
        "model.path": start,
        "loss.name": "rloo",
        "loss.reward_model": better_is_yes[0],
        "loss.max_new_tokens": 12,
        "optim.lr": 3.0e-4,
        "train.max_steps": 12,
    }
    jobs = [
        Job(_experiment(tmp_path, data, **rloo, **{"loss.beta": beta}), tmp_path / f"beta-{beta}")
        for beta in (0.02, 5.0)
    ]
    resumed = Job(jobs[0].config, tmp_path / "beta-0.02-resumed", preempted_at=5)
    free, held, first_half, second_half = train_all([*jobs, resumed, Job(jobs[0].config, resumed.trial_dir)])
    rewards = free.curve("train/reward")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.5
    assert free.curve("train/kl")[0] == pytest.approx(0, abs=1e-3)
    assert free.curve("train/kl")[-1] > 5 * abs(held.curve("train/kl")[-1])
    assert "eval/loss" not in free.evals[12]
    # What is drawn is a function of the step: a resumed run is the undisturbed one.
    assert first_half.result.status == "preempted"
    assert second_half.started_at == 5
    assert [second_half.logs[step]["train/reward"] for step in range(6, 13)] == rewards[5:]
    torch.testing.assert_close(second_half.evals[12]["eval/nll"], free.evals[12]["eval/nll"], rtol=1e-6, atol=0)
