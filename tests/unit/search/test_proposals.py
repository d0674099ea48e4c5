"""The order of trials: unfinished ones again, the search within its budget, then confirmation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orpo_ray.config import ExperimentConfig
from orpo_ray.search.proposals import Proposal, Proposals
from orpo_ray.search.searchers import build
from orpo_ray.storage.sweep_state import SweepState, TrialState
from tests.support.events import as_event
from tests.support.ranks import experiment

SPACE = {"loss.orpo_lambda": {"type": "grid", "values": [0.0, 0.1, 0.5, 1.0]}}


def config(folder: Path, **sweep: Any) -> ExperimentConfig:
    return experiment(folder, sweep={"metric": "eval/nll", "space": SPACE, **sweep})


def proposals(folder: Path, history: SweepState, hours: float = 0.0, **settings: Any) -> Proposals:
    made = config(folder, **settings)
    earlier: dict[str, TrialState] = settings.pop("earlier", {})
    assert made.sweep is not None
    return Proposals(
        made, made.sweep, build(made.sweep, folder, {}, 20), history, earlier, committed_hours=lambda _: hours
    )


def submit(history: SweepState, proposal: Proposal | None) -> Proposal:
    assert proposal is not None
    event = {"event": "submitted", "trial_id": proposal.trial_id, "params": proposal.params, "bundle": ""}
    history.apply(as_event(event | {"purpose": proposal.purpose}))
    return proposal


def finish(history: SweepState, trial_id: str, nll: float, seconds: float = 36.0, status: str = "finished") -> None:
    history.apply(
        as_event({"event": "eval", "trial_id": trial_id, "step": 20, "metrics": {"eval/nll": nll}, "seconds": seconds})
    )
    event = {"event": "finished", "trial_id": trial_id, "status": status, "steps": 20, "train_seconds": seconds}
    history.apply(as_event(event))


def test_the_grid_then_nothing(tmp_path: Path) -> None:
    history = SweepState()
    order = proposals(tmp_path, history)
    made = [submit(history, order.next()) for _ in range(4)]
    assert [(p.trial_id, p.params["loss.orpo_lambda"]) for p in made] == [
        ("00000", 0.0),
        ("00001", 0.1),
        ("00002", 0.5),
        ("00003", 1.0),
    ]
    assert order.next() is None
    assert order.search_is_over
    assert not order.is_exhausted, "trials are still in training"
    for proposal in made:
        finish(history, proposal.trial_id, 1.0)
    assert order.next() is None
    assert order.is_exhausted


def test_after_a_crash_unfinished_trials_come_first_and_gaps_are_filled(tmp_path: Path) -> None:
    history = SweepState()
    # 00001 was proposed, but its driver had not submitted it when the machine died.
    submit(history, Proposal("00000", {"loss.orpo_lambda": 0.0}, "search"))
    submit(history, Proposal("00002", {"loss.orpo_lambda": 0.5}, "search"))
    finish(history, "00000", 1.0)
    order = proposals(tmp_path, history)
    again = order.next()
    assert again is not None
    assert (again.trial_id, again.params) == ("00002", {"loss.orpo_lambda": 0.5})
    rest = [submit(history, order.next()) for _ in range(2)]
    assert [(p.trial_id, p.params["loss.orpo_lambda"]) for p in rest] == [("00001", 0.1), ("00003", 1.0)]


def test_finalists_are_confirmed_seed_by_seed(tmp_path: Path) -> None:
    history = SweepState()
    order = proposals(tmp_path, history, confirm={"top": 2, "seeds": 3})
    for nll in (4.0, 2.0, 3.0, 1.0):
        trial_id = submit(history, order.next()).trial_id
        assert order.next() is None or nll != 1.0, "confirmation must wait for the search"
        finish(history, trial_id, nll, status="stopped_early" if nll == 2.0 else "finished")
    made = [submit(history, order.next()) for _ in range(4)]
    assert [(p.trial_id, p.purpose, p.params) for p in made] == [
        ("c00000", "confirm", {"loss.orpo_lambda": 1.0, "train.seed": 43}),
        ("c00001", "confirm", {"loss.orpo_lambda": 0.5, "train.seed": 43}),
        ("c00002", "confirm", {"loss.orpo_lambda": 1.0, "train.seed": 44}),
        ("c00003", "confirm", {"loss.orpo_lambda": 0.5, "train.seed": 44}),
    ]
    assert order.next() is None
    assert order.is_exhausted


def test_after_a_crash_confirmation_goes_on_where_it_was(tmp_path: Path) -> None:
    history = SweepState()
    order = proposals(tmp_path, history, confirm={"top": 1, "seeds": 4})
    for nll in (4.0, 2.0, 3.0, 1.0):
        finish(history, submit(history, order.next()).trial_id, nll)
    finish(history, submit(history, order.next()).trial_id, 1.1)
    submit(history, order.next())
    again = proposals(tmp_path, history, confirm={"top": 1, "seeds": 4})
    rest = [again.next(), again.next(), again.next()]
    assert [p and (p.trial_id, p.params.get("train.seed")) for p in rest[:1]] == [("c00001", 44)]
    assert rest[1] is not None
    assert rest[1].params["train.seed"] == 45
    assert rest[2] is None


def test_the_budget_ends_the_search_and_keeps_what_confirmation_needs(tmp_path: Path) -> None:
    history = SweepState()
    order = proposals(tmp_path, history, budget={"device_hours": 0.05}, confirm={"top": 1, "seeds": 3})
    for _ in range(3):
        finish(history, submit(history, order.next()).trial_id, 1.0)  # 0.01 device-hours each
    following = order.next()
    assert following is not None
    assert following.purpose == "confirm", "3 spent and 2 for confirmation: a fourth search trial does not fit"
    assert order.why_over == "the budget of 0.05 device-hours is spent or committed"


def test_running_trials_count_before_they_have_spent(tmp_path: Path) -> None:
    order = proposals(tmp_path, SweepState(), hours=1.0, budget={"device_hours": 0.9})
    assert order.next() is None
    assert order.is_exhausted
    assert not order.over_budget(planned=False)


def test_a_known_result_is_named_instead_of_a_training(tmp_path: Path) -> None:
    known = TrialState("mlflow:r", {"loss.orpo_lambda": 0.1}, "", metrics={20: {"eval/nll": 1.0}}, status="finished")
    made = config(tmp_path)
    assert made.sweep is not None
    order = Proposals(
        made,
        made.sweep,
        build(made.sweep, tmp_path, {}, 20),
        history := SweepState(),
        {"mlflow:r": known},
        lambda _: 0.0,
    )
    assert submit(history, order.next()).known is None
    assert submit(history, order.next()).known is known
