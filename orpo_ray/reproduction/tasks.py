"""Work of a reproduction on Ray's workers: answers, rewards, log-probabilities before training, FLOP counts.

Shape suffixes: N prompts, R rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from orpo_ray.config import ExperimentConfig
from orpo_ray.data.dataset import load_pairs
from orpo_ray.data.rows import Message
from orpo_ray.models.loading import load_tokenizer
from orpo_ray.models.packing import LossMask
from orpo_ray.models.reward_model import RewardModel
from orpo_ray.orchestration.tasks import Task
from orpo_ray.reproduction import flops, sampling
from orpo_ray.reproduction.scales import JUDGE
from orpo_ray.reproduction.workspace import Workspace
from orpo_ray.training import reference

_COUNTED_PAIRS = 4
"""Pairs in the micro-batch whose FLOPs are counted: real passes of the whole model, without adapters."""


def answering(workspace: Workspace, name: str, prompts: list[list[Message]]) -> Task:
    """Sample a model's answers. Result: `answers_RN`, the number `unfinished`, and the `backend`."""
    settings = workspace.scale.sampling
    return Task(
        f"answers-{name}",
        f"{name} answers",
        {"settings": dataclasses.asdict(settings), "prompts": prompts, "model": workspace.digest(name)},
        _answer,
        (str(workspace.model(name)), prompts, settings),
        len(prompts),
        lambda parts: dataclasses.asdict(sampling.Sampled.of(parts)),
    )


def _answer(
    path: str, prompts: list[list[Message]], settings: sampling.SamplingSettings
) -> Iterator[tuple[int, sampling.Answered]]:
    for part in sampling.answers(path, prompts, settings):
        yield len(part.indices), part


def scoring(workspace: Workspace, name: str, prompts: list[list[Message]], answers_RN: list[list[str]]) -> Task:
    """Score a model's answers with the judge. Result: rewards [R, N]."""
    longest = workspace.scale.max_tokens + workspace.scale.max_new_tokens
    return Task(
        f"rewards-{name}",
        f"the judge scores {name}",
        {"answers": answers_RN, "judge": workspace.digest(JUDGE)},
        _score,
        (str(workspace.model(JUDGE)), longest, prompts, answers_RN),
        1,
        _only,
    )


def _score(
    path: str, max_tokens: int, prompts: list[list[Message]], answers_RN: list[list[str]]
) -> Iterator[tuple[int, list[list[float]]]]:
    rewards_NR = RewardModel.load(path, max_tokens=max_tokens).score(prompts, list(zip(*answers_RN, strict=True)))
    yield 1, rewards_NR.T.tolist()


def starting(workspace: Workspace) -> Task:
    """Measure log-probabilities before training. Result: mean per token, [N, 2], over N held-out pairs."""
    asked = workspace.digest("base") if workspace.scale.pretrain else workspace.scale.model
    title = "log-probabilities before training"
    config = workspace.experiment("lambda", **workspace.from_base())
    return Task("start", title, asked, _logps_before, (config,), 1, _only)


def _logps_before(config: ExperimentConfig) -> Iterator[tuple[int, list[list[float]]]]:
    tokenizer = load_tokenizer(config.model)
    _, held_out = load_pairs(config.data, tokenizer)
    counting = LossMask.of(config.loss, int(tokenizer.eos_token_id))
    yield 1, reference.logps_of(config, held_out, counting, int(tokenizer.pad_token_id)).tolist()


def accounting(workspace: Workspace) -> Task:
    """Count FLOPs of ORPO and DPO on some training pairs. Result: `flops.Accounting` of the scale's model."""
    asked = {"model": workspace.scale.model, "pairs": _COUNTED_PAIRS}
    arguments = (workspace.experiment("lambda"),)
    return Task("accounting", "counting FLOPs", asked, _account, arguments, 1, _only, uses_gpu=False)


def _account(config: ExperimentConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    train, _ = load_pairs(config.data, load_tokenizer(config.model))
    found = flops.measure(config.model, [train[index] for index in range(min(_COUNTED_PAIRS, len(train)))])
    yield 1, dataclasses.asdict(found)


def _only(parts: list[Any]) -> Any:
    (part,) = parts
    return part
