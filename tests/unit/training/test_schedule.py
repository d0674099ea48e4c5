import math

import pytest

from orpo_ray.config import ExperimentConfig, OptimConfig
from orpo_ray.training.schedule import learning_rate, num_steps


def schedule(**settings: object) -> list[float]:
    optim = OptimConfig.model_validate({"lr": 1.0, "warmup_steps": 4, **settings})
    return [learning_rate(optim, step, 20) for step in range(1, 21)]


@pytest.mark.parametrize("name", ["cosine", "linear", "inverse_sqrt", "constant"])
def test_warm_up_is_linear_and_never_zero(name: str) -> None:
    assert schedule(schedule=name)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_what_follows_the_warm_up() -> None:
    assert schedule(schedule="constant")[4:] == [1.0] * 16
    assert schedule(schedule="linear")[4:] == pytest.approx([1 - k / 17 for k in range(1, 17)])
    cosine = [0.5 * (1 + math.cos(math.pi * k / 17)) for k in range(1, 17)]
    assert schedule(schedule="cosine")[4:] == pytest.approx(cosine)
    assert schedule(schedule="inverse_sqrt")[4:] == pytest.approx([math.sqrt(4 / step) for step in range(5, 21)])


def test_warm_up_by_ratio_and_none() -> None:
    assert learning_rate(OptimConfig(lr=1.0, warmup_ratio=0.1), 1, 20) == 0.5
    assert learning_rate(OptimConfig(lr=1.0, warmup_ratio=0.0, schedule="constant"), 1, 20) == 1.0
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=0, schedule="inverse_sqrt"), 4, 20) == 0.5


def test_steps_from_epochs_are_rounded_up() -> None:
    tree = {
        "name": "t",
        "model": {"path": "tiny-llama-1m"},
        "data": {"path": "builtin://style-pairs"},
        "train": {"epochs": 1.5, "global_batch_size": 16},
    }
    assert num_steps(ExperimentConfig.model_validate(tree), num_pairs=100) == 10
    tree["train"] = {"max_steps": 7}
    assert num_steps(ExperimentConfig.model_validate(tree), num_pairs=100) == 7
