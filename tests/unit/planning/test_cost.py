"""What trials cost, from a journal's events."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_ray.planning.cost import CostModel
from orpo_ray.storage.sweep_state import SweepState
from tests.support.events import as_event

PARAMETERS = {"1m": 1_000_000, "4m": 4_000_000, "16m": 16_000_000}
DEVICES = {"1m": 1, "4m": 2, "16m": 4}


def history_of(*trials: dict[str, Any]) -> SweepState:
    """Trials of `bundle`, evaluations {step: seconds}, and optionally a `status`, `reused_from` or `paused`."""
    history = SweepState()
    for number, trial in enumerate(trials):
        name = f"t{number}"
        history.apply(as_event({"event": "submitted", "trial_id": name, "params": {}, "bundle": trial["bundle"]}))
        devices = DEVICES[trial["bundle"]]
        history.apply(as_event({"event": "started", "trial_id": name, "max_steps": 100, "devices": devices}))
        for step, seconds in trial["seconds"].items():
            history.apply(
                as_event({"event": "eval", "trial_id": name, "step": step, "metrics": {}, "seconds": seconds})
            )
        if trial.get("paused"):
            history.apply(as_event({"event": "paused", "trial_id": name}))
        if "status" in trial:
            end = {"steps": max(trial["seconds"]), "train_seconds": max(trial["seconds"].values())}
            end["reused_from"] = trial.get("reused_from")
            history.apply(as_event({"event": "finished", "trial_id": name, "status": trial["status"], **end}))
    return history


def test_nothing_is_known_before_the_first_report() -> None:
    model = CostModel(PARAMETERS, DEVICES)
    assert model.device_seconds("1m", 100, SweepState()) is None
    assert model.device_seconds("1m", 100, history_of({"bundle": "1m", "seconds": {}})) is None


def test_a_size_that_ran_costs_the_median_of_its_trials_times_its_workers() -> None:
    history = history_of(*({"bundle": "4m", "seconds": {50: s}} for s in (10.0, 11.0, 90.0)))
    cost = CostModel(PARAMETERS, DEVICES).device_seconds("4m", 100, history)
    assert cost is not None
    assert cost.measured
    assert cost.seconds == pytest.approx(2 * 22.0), "the one that took long does not count more than once"
    assert cost.wall_seconds == pytest.approx(22.0)


def test_another_size_is_estimated_in_proportion_to_parameters_and_says_so() -> None:
    history = history_of({"bundle": "1m", "seconds": {50: 10.0}})
    cost = CostModel(PARAMETERS, DEVICES).device_seconds("16m", 100, history)
    assert cost is not None
    assert (cost.measured, cost.num_sizes) == (False, 1)
    assert cost.seconds == pytest.approx(16 * 20.0)
    assert cost.wall_seconds == pytest.approx(4 * 20.0)


def test_two_sizes_tell_the_power_of_a_third() -> None:
    history = history_of({"bundle": "1m", "seconds": {100: 10.0}}, {"bundle": "4m", "seconds": {100: 10.0}})
    cost = CostModel(PARAMETERS, DEVICES).device_seconds("16m", 100, history)
    assert cost is not None
    assert cost.seconds == pytest.approx(40.0), "1m: 10, 4m: 20 device-seconds; another factor of four doubles again"


def test_a_power_beyond_belief_is_not_followed() -> None:
    history = history_of({"bundle": "1m", "seconds": {100: 10.0}}, {"bundle": "4m", "seconds": {100: 500.0}})
    cost = CostModel(PARAMETERS, DEVICES).device_seconds("16m", 100, history)
    assert cost is not None
    assert cost.seconds == pytest.approx(1000.0 * 4**1.3)


def test_results_that_were_taken_over_tell_nothing_about_time() -> None:
    reused = {"bundle": "1m", "seconds": {100: 0.1}, "status": "finished", "reused_from": "run"}
    assert CostModel(PARAMETERS, DEVICES).device_seconds("1m", 100, history_of(reused)) is None


def test_a_budget_is_spent_promised_and_free() -> None:
    history = history_of(
        {"bundle": "1m", "seconds": {100: 3600.0}, "status": "finished"},
        {"bundle": "1m", "seconds": {25: 900.0}},
        {"bundle": "1m", "seconds": {50: 1800.0}, "paused": True},
        {"bundle": "4m", "seconds": {}},
    )
    left = CostModel(PARAMETERS, DEVICES).remaining(history, 10.0)
    assert left.spent == pytest.approx(1.75)
    assert left.committed == pytest.approx(0.75 + 4.0), "the rest of the second, and all of the large one"
    assert left.free == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("parameters", "devices", "message"),
    [
        ({"1m": 1, "4m": 4}, {"1m": 1}, "both need every bundle"),
        ({"1m": 0}, {"1m": 1}, "parameters of bundle 1m must be at least 1, but are 0"),
        ({"1m": 1}, {"1m": 0}, "devices of bundle 1m must be at least 1, but are 0"),
    ],
)
def test_impossible_sizes_are_refused(parameters: dict[str, int], devices: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostModel(parameters, devices)
