"""What PB2 proposes for a trial that goes on from a donor."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from orpo_ray.config import SweepConfig, parse
from orpo_ray.search.population import Pbt, pb2

RATES = {"a": 1.8e-3, "b": 6.0e-3, "c": 3.6e-4, "d": 6.2e-3}


class Member:
    """As much of a trial as PB2 looks at."""

    def __init__(self, name: str, lr: float) -> None:
        self.trial_id, self.config = name, {"optim.lr": lr, "seed": 1}

    def __str__(self) -> str:
        return self.trial_id


@pytest.fixture
def population() -> tuple[Any, dict[str, Member]]:
    tree = {
        "name": "population",
        "model": {"path": "tiny-llama-1m"},
        "data": {"path": "style-pairs"},
        "train": {"max_steps": 16, "eval_every": 4},
        "sweep": {
            "metric": "eval/nll",
            "num_samples": 4,
            "scheduler": {"type": "pb2", "interval_steps": 8},
            "space": {"optim.lr": {"type": "loguniform", "low": 1.0e-4, "high": 1.0e-2}},
        },
    }
    sweep = parse(tree).sweep
    assert sweep is not None
    assert sweep.scheduler.type == "pb2"
    rule = pb2(sweep.scheduler, sweep, lambda trial, donor: None, {})
    members = {name: Member(name, lr) for name, lr in RATES.items()}
    for member in members.values():
        rule._trial_state[member] = SimpleNamespace(last_perturbation_time=0, last_score=None)
    return rule, members


def report(rule: Any, member: Member, step: int, value: float) -> None:
    rule._save_trial_state(rule._trial_state[member], step, {"step": step, "eval/nll": value}, member)


def test_a_donor_of_unknown_gain_is_not_run_twice(population: tuple[Any, dict[str, Member]]) -> None:
    rule, members = population
    for name, value in {"a": 5.9, "b": 5.6, "c": 6.6, "d": 5.7}.items():
        report(rule, members[name], 8, value)
    proposed, _ = rule._get_new_config(members["c"], members["b"])
    assert proposed["optim.lr"] != RATES["b"]
    assert 1.0e-4 <= proposed["optim.lr"] <= 1.0e-2
    assert proposed["seed"] == 1


def test_gains_are_modelled_over_logarithms(population: tuple[Any, dict[str, Member]]) -> None:
    rule, members = population
    for step, values in {4: (6.3, 6.2, 6.7, 6.2), 8: (5.88, 5.66, 6.65, 5.664)}.items():
        for member, value in zip(members.values(), values, strict=True):
            report(rule, member, step, value)
    assert sorted(rule.data["optim.lr"].unique()) == pytest.approx(sorted(math.log(lr) for lr in RATES.values()))
    proposed, _ = rule._get_new_config(members["c"], members["b"])
    assert 1.0e-4 <= proposed["optim.lr"] <= 1.0e-2
    assert proposed["optim.lr"] not in RATES.values()
    assert proposed["optim.lr"] > RATES["c"], "led towards the setting that gained least"


def test_evaluations_between_exchanges_are_noted(population: tuple[Any, dict[str, Member]]) -> None:
    rule, members = population
    decision = rule.on_trial_result(None, members["a"], {"step": 4, "eval/nll": 6.3})
    assert decision == "CONTINUE"
    assert rule.data[["Trial", "Time", "Reward"]].values.tolist() == [["a", 4, -6.3]]


@pytest.mark.parametrize("kind", ["pbt", "pb2"])
def test_those_who_wait_go_on_when_the_last_to_come_has_ended(
    population: tuple[Any, dict[str, Member]], kind: str
) -> None:
    rule, members = population
    if kind == "pbt":
        sweep = SweepConfig(
            metric="eval/nll",
            num_samples=4,
            scheduler={"type": "pbt", "interval_steps": 8},
            space={"optim.lr": {"type": "loguniform", "low": 1.0e-4, "high": 1.0e-2}},
        )
        rule = Pbt(sweep.scheduler, sweep, lambda trial, donor: None, {})
    waiting = [members[name] for name in "abc"]  # d was the last, and has been stopped
    for member in waiting:
        member.status = "PAUSED"  # type: ignore[attr-defined]
        rule._trial_state[member] = SimpleNamespace(last_train_time=8, last_perturbation_time=0)
    controller = SimpleNamespace(get_trials=lambda: waiting, get_live_trials=lambda: set(waiting))
    assert rule.choose_trial_to_run(controller) in waiting
    assert rule._next_perturbation_sync == 16
