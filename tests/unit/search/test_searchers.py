"""What each searcher proposes: repeatable, never twice, better for what it has seen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from orpo_ray.config import SweepConfig
from orpo_ray.search import searchers
from orpo_ray.search.searcher import Exhausted, Searcher
from orpo_ray.search.searchers import OPTUNA_FILE
from orpo_ray.storage.sweep_state import SweepState
from tests.support.events import as_event

LR = {"type": "loguniform", "low": 1e-5, "high": 1e-1}
LAMBDA = {"type": "uniform", "low": 0.0, "high": 1.0}
SEARCHERS: list[dict[str, Any]] = [
    {"type": "random"},
    *({"type": "optuna", "sampler": name, "startup_trials": 4} for name in ("tpe", "gp", "cmaes", "nsga2", "random")),
    {"type": "hyperopt", "startup_trials": 4},
]


def sweep(searcher: dict[str, Any], space: dict[str, Any] | None = None, **settings: Any) -> SweepConfig:
    tree = {"metric": "eval/nll", "num_samples": 40, "searcher": searcher, **settings}
    return SweepConfig.model_validate(tree | {"space": space or {"optim.lr": LR, "loss.orpo_lambda": LAMBDA}})


def build(settings: SweepConfig, folder: Path) -> Searcher:
    return searchers.build(settings, folder, sizes={}, max_steps=40)


def name(searcher: dict[str, Any]) -> str:
    return "-".join(str(searcher[key]) for key in ("type", "sampler") if key in searcher)


def nll(params: dict[str, Any]) -> float:
    """Best at lr 1e-3 and λ 0.3."""
    return math.log10(params["optim.lr"] / 1e-3) ** 2 + 4 * (params["loss.orpo_lambda"] - 0.3) ** 2


def end(history: SweepState, trial_id: str, value: float | None, status: str = "finished", step: int = 40) -> None:
    if value is not None:
        metrics = {"eval/nll": value, "eval/preference_accuracy": 1 / (1 + value)}
        history.apply(
            as_event({"event": "eval", "trial_id": trial_id, "step": step, "metrics": metrics, "seconds": 1.0})
        )
    event = {"event": "finished", "trial_id": trial_id, "status": status, "steps": step, "train_seconds": 1.0}
    history.apply(as_event(event))


def submit(history: SweepState, trial_id: str, params: dict[str, Any]) -> None:
    history.apply(as_event({"event": "submitted", "trial_id": trial_id, "params": params, "bundle": ""}))


def run(source: Searcher, history: SweepState, trials: range) -> list[dict[str, Any]]:
    """Propose and finish so many trials, one after another."""
    made = []
    for index in trials:
        trial_id = f"{index:05d}"
        params = source.propose(index, history)
        assert params is not None
        submit(history, trial_id, params)
        end(history, trial_id, nll(params))
        made.append(params)
    return made


def exhaust(source: Searcher, history: SweepState, made: list[dict[str, Any]]) -> None:
    for index in range(10):
        made += run(source, history, range(index, index + 1))


@pytest.mark.parametrize("searcher", SEARCHERS, ids=name)
def test_proposals_lie_in_the_space_differ_and_end(searcher: dict[str, Any], tmp_path: Path) -> None:
    source, history = build(sweep(searcher, num_samples=8), tmp_path), SweepState()
    made = run(source, history, range(8))
    assert all(1e-5 <= p["optim.lr"] <= 1e-1 and 0 <= p["loss.orpo_lambda"] <= 1 for p in made)
    assert [list(p) for p in made] == [["optim.lr", "loss.orpo_lambda"]] * 8
    assert all(type(value) is float for p in made for value in p.values())
    assert len({str(p) for p in made}) == 8
    with pytest.raises(Exhausted, match="all 8 trials"):
        source.propose(8, history)


@pytest.mark.parametrize("searcher", SEARCHERS, ids=name)
def test_the_same_seed_and_history_give_the_same_proposals(searcher: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        runs.append(run(build(sweep(searcher), folder), SweepState(), range(8)))
    assert runs[0] == runs[1]
    other = tmp_path / "c"
    other.mkdir()
    assert run(build(sweep(searcher, seed=1), other), SweepState(), range(2)) != runs[0][:2]


@pytest.mark.parametrize("searcher", [s for s in SEARCHERS if s["type"] in ("random", "hyperopt")], ids=name)
def test_a_restart_changes_nothing(searcher: dict[str, Any], tmp_path: Path) -> None:
    whole = run(build(sweep(searcher), tmp_path), SweepState(), range(10))
    history = SweepState()
    first = run(build(sweep(searcher), tmp_path), history, range(6))
    rest = run(build(sweep(searcher), tmp_path), history, range(6, 10))
    assert [*first, *rest] == whole


@pytest.mark.parametrize(
    "searcher",
    [s for s in SEARCHERS if s["type"] != "random" and s.get("sampler") not in ("nsga2", "random")],
    ids=name,
)
def test_a_model_based_searcher_learns(searcher: dict[str, Any], tmp_path: Path) -> None:
    made = run(build(sweep(searcher), tmp_path), SweepState(), range(30))
    assert sum(map(nll, made[20:])) < 0.6 * sum(map(nll, made[:10])), "the last ten are no better than the first"


def test_optuna_goes_on_with_its_study_after_a_kill(tmp_path: Path) -> None:
    settings = sweep({"type": "optuna", "startup_trials": 4})
    history = SweepState()
    source = build(settings, tmp_path)
    run(source, history, range(5))
    source.propose(5, history)  # and the machine dies before it is submitted
    again = build(settings, tmp_path)
    params = again.propose(5, history)
    assert params is not None
    submit(history, "00005", params)
    end(history, "00005", None, status="diverged", step=3)
    submit(history, "00006", again.propose(6, history) or {})
    end(history, "00006", 1.25, status="stopped_early", step=10)
    again.propose(7, history)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / OPTUNA_FILE))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE"] * 5 + ["FAIL", "COMPLETE", "PRUNED", "RUNNING"]
    values = [trial.value for trial in study.trials]
    assert values[:5] == [nll(history.trials[f"{i:05d}"].params) for i in range(5)]
    assert values[6] == max([*values[:5], 1.25]), "a diverged trial counts as the worst that was seen"
    assert study.trials[7].intermediate_values == {10: 1.25}


def test_optuna_takes_several_objectives(tmp_path: Path) -> None:
    objectives = ["eval/nll", "eval/preference_accuracy"]
    for sampler in ("tpe", "nsga2"):
        folder = tmp_path / sampler
        folder.mkdir()
        searcher = {"type": "optuna", "sampler": sampler, "objectives": objectives, "startup_trials": 3}
        history = SweepState()
        run(build(sweep(searcher), folder), history, range(6))
        backend = optuna.storages.journal.JournalFileBackend(str(folder / OPTUNA_FILE))
        study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
        assert [d.name for d in study.directions] == ["MINIMIZE", "MAXIMIZE"]
        (value, accuracy) = study.trials[0].values
        assert accuracy == 1 / (1 + value)


@pytest.mark.parametrize("searcher", [s for s in SEARCHERS if s["type"] in ("optuna", "hyperopt")], ids=name)
def test_a_small_grid_is_tried_once_and_then_over(searcher: dict[str, Any], tmp_path: Path) -> None:
    space = {
        "loss.orpo_lambda": {"type": "grid", "values": [0.0, 0.5]},
        "optim.lr": {"type": "choice", "values": [1.0, 2.0]},
    }
    if searcher.get("sampler") == "gp":
        pytest.skip("Optuna's GP sampler searches categories of this size exhaustively, as slow as the grid")
    source, history = build(sweep(searcher, space), tmp_path), SweepState()
    made: list[dict[str, Any]] = []
    with pytest.raises(Exhausted):
        exhaust(source, history, made)
    assert len({str(p) for p in made}) == len(made), "a setting was proposed twice"
    assert len(made) >= 3


def test_a_warm_start_informs_and_is_not_repeated(tmp_path: Path) -> None:
    grid = {"loss.orpo_lambda": {"type": "grid", "values": [0.0, 0.5]}}
    for searcher in ({"type": "optuna"}, {"type": "hyperopt"}):
        folder = tmp_path / str(searcher["type"])
        folder.mkdir()
        history = SweepState()
        submit(history, "earlier", {"loss.orpo_lambda": 0.5})
        end(history, "earlier", 2.0)
        assert build(sweep(searcher, grid), folder).propose(0, history) == {"loss.orpo_lambda": 0.0}


def test_random_spans_the_grid_and_draws_the_rest_evenly(tmp_path: Path) -> None:
    space = {
        "optim.lr": LR,
        "loss.orpo_lambda": {"type": "grid", "values": [0.0, 0.5, 1.0]},
        "optim.schedule": {"type": "choice", "values": ["cosine", "linear"]},
        "size": {"type": "bundle", "values": {"s": {"model.path": "a"}, "l": {"model.path": "b"}}},
    }
    source = build(sweep({"type": "random"}, space, num_samples=200), tmp_path)
    made = [source.propose(index, SweepState()) or {} for index in range(1200)]
    assert [(p["loss.orpo_lambda"], p["size"]) for p in made[:6]] == [
        (value, size) for value in (0.0, 0.5, 1.0) for size in ("s", "l")
    ]
    assert [list(p) for p in made] == [list(space)] * 1200
    assert 0.45 < sum(p["optim.lr"] < 1e-3 for p in made) / 1200 < 0.55
    assert 0.45 < sum(p["optim.schedule"] == "linear" for p in made) / 1200 < 0.55
