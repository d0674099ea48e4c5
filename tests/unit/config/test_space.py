import math

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from pydantic import TypeAdapter, ValidationError

from orpo_ray.config.space import (
    Axis,
    Bundle,
    Choice,
    Grid,
    LogUniform,
    Uniform,
    describe,
    grid_cells,
    grid_size,
    plain,
    to_optuna,
)

axis = TypeAdapter(Axis).validate_python

SPACE = {
    "loss.orpo_lambda": axis({"type": "grid", "values": [0.0, 0.1, 1.0]}),
    "optim.schedule": axis({"type": "choice", "values": ["cosine", "linear"]}),
    "optim.beta1": axis({"type": "uniform", "low": 0.8, "high": 0.95}),
    "optim.lr": axis({"type": "loguniform", "low": "1e-6", "high": "1e-4"}),
    "size": axis({"type": "bundle", "values": {"2m": {"model.path": "a"}, "8m": {"model.path": "b"}}}),
}


def test_the_type_decides_the_axis() -> None:
    assert [type(a) for a in SPACE.values()] == [Grid, Choice, Uniform, LogUniform, Bundle]
    assert SPACE["optim.lr"] == LogUniform(type="loguniform", low=1e-6, high=1e-4)  # YAML reads these as strings


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"type": "grid", "values": []}, "at least 1"),
        ({"type": "grid", "values": [0.1, 0.5, 0.1]}, r"distinct.*0\.1 occurs twice"),
        ({"type": "choice", "values": []}, "at least 1"),
        ({"type": "choice", "values": ["a", "a"]}, r"distinct.*'a' occurs twice"),
        ({"type": "uniform", "low": 1, "high": 1}, r"low < high.*low=1\.0, high=1\.0"),
        ({"type": "uniform", "low": 2, "high": 1}, r"low < high.*low=2\.0, high=1\.0"),
        ({"type": "uniform", "low": 0, "high": math.inf}, "both finite.*high=inf"),
        ({"type": "uniform", "low": math.nan, "high": 1}, "both finite.*low=nan"),
        ({"type": "loguniform", "low": 0, "high": 1}, "greater than 0"),
        ({"type": "loguniform", "low": 1e-3, "high": 1e-4}, r"low < high.*low=0\.001, high=0\.0001"),
        ({"type": "bundle", "values": {}}, "at least 1"),
        ({"type": "bundle", "values": {"2m": {"model.path": "a"}, "8m": {}}}, "bundle '8m' sets nothing"),
        ({"type": "grid", "values": [1], "low": 0}, "[Ee]xtra"),
        ({"values": [1]}, "type"),
    ],
)
def test_an_impossible_axis_is_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        axis(tree)


def test_axes_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(SPACE["optim.beta1"], "low", 0.0)  # noqa: B010


def test_candidates_are_what_the_config_has_to_accept() -> None:
    assert {name: a.candidates() for name, a in SPACE.items()} == {
        "loss.orpo_lambda": (0.0, 0.1, 1.0),
        "optim.schedule": ("cosine", "linear"),
        "optim.beta1": (0.8, 0.95),
        "optim.lr": (1e-6, 1e-4),
        "size": ("2m", "8m"),
    }


def test_grid_size_counts_grids_and_bundles_only() -> None:
    assert grid_size(SPACE) == 3 * 2
    assert grid_size({"optim.lr": SPACE["optim.lr"]}) == 1
    assert grid_size({}) == 1


def test_grid_cells_alternate_bundles_fastest_and_keep_the_order_of_the_file() -> None:
    cells = grid_cells({"size": SPACE["size"], "loss.orpo_lambda": SPACE["loss.orpo_lambda"]})
    assert [tuple(cell.items()) for cell in cells] == [
        (("size", size), ("loss.orpo_lambda", value)) for value in (0.0, 0.1, 1.0) for size in ("2m", "8m")
    ]
    assert grid_cells({"optim.lr": SPACE["optim.lr"]}) == [{}]


def test_plain_makes_pythons_own_numbers_of_numpys() -> None:
    made = plain({"optim.lr": np.float64(0.5), "train.seed": np.int64(3), "model": "8m"})
    assert made == {"optim.lr": 0.5, "train.seed": 3, "model": "8m"}
    assert [type(value) for value in made.values()] == [float, int, str]


def test_optuna_makes_categories_of_grids_and_bundles() -> None:
    assert to_optuna(SPACE) == {
        "loss.orpo_lambda": CategoricalDistribution((0.0, 0.1, 1.0)),
        "optim.schedule": CategoricalDistribution(("cosine", "linear")),
        "optim.beta1": FloatDistribution(0.8, 0.95),
        "optim.lr": FloatDistribution(1e-6, 1e-4, log=True),
        "size": CategoricalDistribution(("2m", "8m")),
    }


def test_optuna_can_ask_from_the_space() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    params = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask(to_optuna(SPACE)).params
    assert params.keys() == SPACE.keys()
    assert params["size"] in ("2m", "8m")


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "single run"),
        ({"loss.orpo_lambda": 0.1}, "λ=0.1"),
        ({"loss.orpo_lambda": 0.1, "optim.lr": 8e-4, "model": "8m"}, "8m λ=0.1 lr=8.0e-04"),
        ({"optim.lr": 0.05, "train.micro_batch_size": 4}, "lr=0.05 micro_batch_size=4"),
        ({"optim.weight_decay": 0.0}, "weight_decay=0"),
        ({"optim.schedule": "cosine"}, "schedule=cosine"),
    ],
)
def test_describe(params: dict[str, object], text: str) -> None:
    assert describe(params) == text
