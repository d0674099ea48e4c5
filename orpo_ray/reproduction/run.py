"""`orpo-ray reproduce paper`: train the models that the paper compares, sample, score, and collect the numbers.

Every step leaves a file in the run directory, so the same command continues after an interruption. Shape suffixes:
N prompts, R rounds.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console

from orpo_ray import provenance
from orpo_ray.data.dataset import held_out_texts
from orpo_ray.data.rows import Message
from orpo_ray.models.loading import load_tokenizer
from orpo_ray.reproduction import log_probabilities, tasks, training
from orpo_ray.reproduction.diversity import Diversity, Embed, diversity, local_embedder
from orpo_ray.reproduction.log_probabilities import mean_interval
from orpo_ray.reproduction.scales import REWARD_MODEL_SEEDS, SEED_STRIDE
from orpo_ray.reproduction.win_rate import win_rate
from orpo_ray.reproduction.workspace import RESULT_FILE, ReproduceError, Workspace
from orpo_ray.storage.pair_scores import PAIRS_FILE, PairScores
from orpo_ray.storage.run_dir import EVENTS_FILE, write_results
from orpo_ray.storage.sweep_state import read_state

POLICIES = ("orpo", "sft", "dpo", "rlhf")
_CLOCK_FILE = "seconds.json"


def run(workspace: Workspace, console: Console) -> dict[str, Any]:
    """Train, sample, score and compare. Ray must be initialised.

    Returns:
        The content of reproduction.json, which `orpo_ray.reproduction.page` reads.

    Raises:
        DataError, ModelError, SweepError: the data, model or experiment cannot be used.
        ReproduceError: the embedder is not installed, the folder holds a reproduction with other settings, a training
            did not end with a model, or models answered with different backends.
        TaskError: a worker was lost while it answered or scored.
    """
    try:
        embed = local_embedder()
    except ImportError as error:  # reported before half an hour of training, not after it
        raise ReproduceError(str(error)) from error
    begun = workspace.begin()
    with _clocked(workspace) as spent:
        return _run(workspace, embed, begun, spent, console)


@contextmanager
def _clocked(workspace: Workspace) -> Iterator[Callable[[], list[float]]]:
    """Yield a function that returns the seconds of every command so far, this one last; keep them on exit."""
    file, began = workspace.folder / _CLOCK_FILE, time.monotonic()
    earlier = json.loads(file.read_text(encoding="utf-8"))["seconds"] if file.exists() else []

    def spent() -> list[float]:
        return [*earlier, time.monotonic() - began]

    try:
        yield spent
    finally:
        write_results(file, {"seconds": spent()})


def _run(
    workspace: Workspace, embed: Embed, begun: dict[str, Any], spent: Callable[[], list[float]], console: Console
) -> dict[str, Any]:
    prompts = _prompts(workspace)
    seconds = training.train_all(workspace, console)
    # Submitted together: none of these tasks depends on another.
    answering = [tasks.answering(workspace, name, prompts) for name in POLICIES]
    found = workspace.results_of([*answering, tasks.starting(workspace), tasks.accounting(workspace)], console)
    answered = {name: found[f"answers-{name}"] for name in POLICIES}
    if len({each["backend"] for each in answered.values()}) > 1:
        drawn = ", ".join(f"{name} by {each['backend']}" for name, each in answered.items())
        raise ReproduceError(
            f"compared answers must be sampled by one backend, but these were not: {drawn}; remove "
            f"{workspace.kept}/answers-*.json to sample all of them again where this command runs now"
        )
    answers_RN = {name: each["answers_RN"] for name, each in answered.items()}
    scoring = [tasks.scoring(workspace, name, prompts, answers_RN[name]) for name in POLICIES]
    found |= workspace.results_of(scoring, console)
    rewards_RN = {name: np.array(found[f"rewards-{name}"]) for name in POLICIES}
    start_N2 = np.array(found["start"])
    result = {
        "scale": workspace.scale.name,
        "about": workspace.scale.about(),
        "provenance": begun,
        "finished_with": provenance.collect(),
        "seconds": seconds,
        **_facts(workspace),
        "judge": _reward_model_accuracy(workspace),
        "win_rates": {other: _win_rate(rewards_RN["orpo"], rewards_RN[other]) for other in POLICIES if other != "orpo"},
        # Each round against the next one.
        "control": _win_rate(rewards_RN["sft"], np.roll(rewards_RN["sft"], -1, axis=0)),
        "rewards": {name: rewards.ravel().tolist() for name, rewards in rewards_RN.items()},
        "answers": {
            name: {
                "characters": float(np.mean([len(text) for row in rounds for text in row])),
                "examples": [row[0] for row in rounds],
                "unfinished": answered[name]["unfinished"] / (len(rounds) * len(prompts)),
                "backend": answered[name]["backend"],
            }
            for name, rounds in answers_RN.items()
        },
        "first_prompt": prompts[0],
        "curves": log_probabilities.curves(workspace, start_N2),
        "changes": log_probabilities.changes(workspace, start_N2),
        "diversity": {name: dataclasses.asdict(_diversity(answers_RN[name], embed)) for name in POLICIES},
        "accounting": found["accounting"],
    }
    result["commands"] = spent()
    write_results(workspace.folder / RESULT_FILE, result)
    return result


def _prompts(workspace: Workspace) -> list[list[Message]]:
    """Conversations of the held-out pairs, as many as the scale samples."""
    config = workspace.experiment("lambda")
    texts = held_out_texts(config.data, load_tokenizer(config.model))
    if len(texts) < 2:
        raise ReproduceError(
            f"{config.data.path} has {len(texts)} held-out pairs with prompts of at most "
            f"{config.data.max_prompt_tokens} tokens, but a win rate needs 2 or more: give more pairs with --data"
        )
    return [pair.prompt for _, pair in texts[: workspace.scale.prompts]]


def _win_rate(ours_RN: np.ndarray, theirs_RN: np.ndarray) -> dict[str, Any]:
    found = win_rate(ours_RN, theirs_RN)
    numbers = {"mean": found.mean, "low": found.low, "high": found.high, "per_round": found.per_round_R.tolist()}
    return numbers | {"std_over_rounds": None if np.isnan(found.std_over_rounds) else found.std_over_rounds}


def _diversity(answers_RN: list[list[str]], embed: Embed) -> Diversity:
    return diversity([list(row) for row in zip(*answers_RN, strict=True)], embed)


def _reward_model_accuracy(workspace: Workspace) -> dict[str, Any]:
    """Held-out accuracy of the judge and of the policy's reward model, with intervals over pairs."""
    run_dir = workspace.folder / "reward"
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    names = {offset: name for name, offset in REWARD_MODEL_SEEDS.items()}
    found = {}
    for trial in results["trials"]:
        scores = PairScores.load(run_dir / "trials" / trial["trial_id"] / PAIRS_FILE)
        (_, right_N, _), *_ = scores.ratios("eval/preference_accuracy")
        found[names[trial["params"]["train.seed"] % SEED_STRIDE]] = mean_interval(right_N)
    return found


def _facts(workspace: Workspace) -> dict[str, Any]:
    """Number of pairs of SFT and ORPO, and every type in which any training multiplied matrices."""
    told = {
        file.parent.name: [start.facts for trial in read_state(file.parent).trials.values() for start in trial.starts]
        for file in workspace.folder.glob(f"*/{EVENTS_FILE}")
    }
    return {
        "pairs": {"train": told["lambda"][0]["data/train_pairs"], "held_out": told["lambda"][0]["data/eval_pairs"]},
        "products": sorted({facts["forward/products"] for each in told.values() for facts in each}),
    }
