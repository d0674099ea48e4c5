"""The journal folded into the state of a sweep and its trials."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.events import as_event, as_state


def event(kind: str, trial_id: str = "a", **details: Any) -> dict[str, Any]:
    return {"event": kind, "trial_id": trial_id, **details}


def started(trial_id: str, step: int = 0, devices: int = 1) -> dict[str, Any]:
    return event("started", trial_id, step=step, max_steps=40, devices=devices)


def evaluated(trial_id: str, step: int, nll: float, seconds: float) -> dict[str, Any]:
    return event("eval", trial_id, step=step, metrics={"eval/nll": nll}, seconds=seconds)


def test_a_trial_from_submission_to_its_end() -> None:
    history = as_state([event("submitted", params={"optim.lr": 1e-3}, bundle="8m")])
    trial = history.trials["a"]
    assert (trial.status, trial.step, trial.value("eval/nll"), trial.purpose) == ("waiting", 0, None, "search")
    for entry in (started("a", devices=2), evaluated("a", 10, 3.0, 5.0), event("paused", step=10)):
        history.apply(as_event(entry))
    assert (trial.step, trial.value("eval/nll"), trial.paused, trial.max_steps) == (10, 3.0, True, 40)
    for entry in (started("a", 10, 2), evaluated("a", 20, float("nan"), 9.0)):
        history.apply(as_event(entry))
    assert (trial.paused, trial.value("eval/nll")) == (False, 3.0), "the last that is finite"
    history.apply(as_event(event("finished", status="finished", steps=40, train_seconds=18.0)))
    assert (trial.status, trial.device_seconds) == ("finished", 36.0)
    assert history.device_hours == pytest.approx(0.01)


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_lost_trial_has_no_value(status: str) -> None:
    history = as_state([event("submitted", params={}, bundle=""), started("a"), evaluated("a", 10, 3.0, 5.0)])
    history.apply(as_event(event("finished", status=status, steps=12, train_seconds=6.0)))
    assert history.trials["a"].value("eval/nll") is None


def test_a_fork_takes_the_donors_metrics_and_not_its_seconds() -> None:
    history = as_state(
        [
            event("submitted", "a", params={"optim.lr": 1e-3}, bundle=""),
            event("submitted", "b", params={"optim.lr": 2e-3}, bundle=""),
            *(started("a"), started("b")),
            *(evaluated("a", 20, 4.0, 30.0), evaluated("b", 20, 2.0, 10.0)),
            event("forked", "a", donor="b", step=20, params={"optim.lr": 2.4e-3}),
            started("a", 20),
            evaluated("a", 40, 1.0, 25.0),  # the donor's 10 s, and 15 of its own
        ]
    )
    trial = history.trials["a"]
    assert trial.params == {"optim.lr": 2.4e-3}
    assert [metrics["eval/nll"] for metrics in trial.metrics.values()] == [2.0, 1.0]
    assert trial.device_seconds == 45.0
    history.apply(as_event(event("finished", "a", status="finished", steps=40, train_seconds=26.0)))
    assert trial.device_seconds == 46.0


def test_a_reused_result_costs_nothing() -> None:
    history = as_state([event("submitted", params={}, bundle=""), evaluated("a", 40, 3.0, 0.0)])
    history.apply(as_event(event("finished", status="finished", steps=40, train_seconds=0.0, reused_from="run")))
    assert (history.trials["a"].value("eval/nll"), history.device_hours) == (3.0, 0.0)
