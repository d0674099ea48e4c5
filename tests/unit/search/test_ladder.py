"""The ladder's proposals, refusals and early stops, on histories written by hand."""

from __future__ import annotations

import copy
import json
import math
import time
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from orpo_ray.config import SweepConfig
from orpo_ray.search.ladder import Ladder
from orpo_ray.search.searcher import Exhausted
from orpo_ray.storage.sweep_state import SweepState
from tests.support.events import as_event

LR, LAMBDA, SIZE, METRIC = "optim.lr", "loss.orpo_lambda", "model", "eval/preference_accuracy"
PARAMETERS = {"1m": 1_000_000, "4m": 4_000_000, "16m": 16_000_000}
STEPS = 80
SECONDS = {"1m": 1.0, "4m": 4.0, "16m": 16.0}
"""Per step."""


def sweep(hours: float = 40.0, metric: str = METRIC, **settings: Any) -> SweepConfig:
    """With two continuous axes and three sizes."""
    return SweepConfig.model_validate(
        {
            "metric": metric,
            "num_samples": 500,
            "searcher": {"type": "ladder"},
            "budget": {"device_hours": hours},
            "space": {
                LAMBDA: {"type": "uniform", "low": 0.0, "high": 1.0},
                LR: {"type": "loguniform", "low": 1e-5, "high": 1e-2},
                SIZE: {"type": "bundle", "values": {label: {"model.path": label} for label in PARAMETERS}},
            },
            **settings,
        }
    )


def ladder(hours: float = 40.0, **settings: Any) -> Ladder:
    return Ladder(sweep(hours, **settings), PARAMETERS, dict.fromkeys(PARAMETERS, 1), STEPS)


def add(
    history: SweepState,
    bundle: str,
    curve: dict[int, float],
    lr: float = 1e-3,
    lambda_: float = 0.5,
    status: str | None = "finished",
    metric: str = METRIC,
) -> str:
    """A trial with these values at these steps; its id."""
    name = f"t{len(history.trials)}"
    params = {LAMBDA: lambda_, LR: lr, SIZE: bundle}
    history.apply(as_event({"event": "submitted", "trial_id": name, "params": params, "bundle": bundle}))
    history.apply(as_event({"event": "started", "trial_id": name, "max_steps": STEPS}))
    for step, value in curve.items():
        seconds = step * SECONDS[bundle]
        event = {"event": "eval", "trial_id": name, "step": step, "metrics": {metric: value}, "seconds": seconds}
        history.apply(as_event(event))
    if status is not None:
        steps = max(curve, default=5)
        end = {"status": status, "steps": steps, "train_seconds": steps * SECONDS[bundle]}
        history.apply(as_event({"event": "finished", "trial_id": name, **end}))
    return name


def accuracy(lr: float, bundle: str, optimum: dict[str, float] | None = None) -> float:
    """Best at 1e-3 (log10 -3) unless told otherwise; larger models are better."""
    best = (optimum or {}).get(bundle, -3.0)
    return 0.6 + 0.04 * list(PARAMETERS).index(bundle) + 0.2 * math.exp(-2.0 * (math.log10(lr) - best) ** 2)


def searched(sizes: dict[str, int], optimum: dict[str, float] | None = None, seed: int = 0) -> SweepState:
    """So many finished trials of each size at random settings."""
    rng, history = np.random.default_rng(seed), SweepState()
    for bundle, number in sizes.items():
        for _ in range(number):
            lr, lambda_ = 10 ** rng.uniform(-5, -2), rng.uniform()
            final = accuracy(lr, bundle, optimum) + 0.005 * rng.standard_normal()
            add(history, bundle, {10: 0.5 + 0.4 * (final - 0.5), 40: 0.5 + 0.8 * (final - 0.5), 80: final}, lr, lambda_)
    return history


# ---- proposals ----------------------------------------------------------------------------------------------------


def test_it_starts_with_spread_out_trials_of_the_smallest_size() -> None:
    history = SweepState()
    proposals = [ladder().propose(index, history) for index in range(6)]
    assert {p[SIZE] for p in proposals if p} == {"1m"}
    thirds = {int((math.log10(p[LR]) + 5) // 1) for p in proposals if p}
    assert thirds == {0, 1, 2}, "every decade of the learning rate is met"
    assert all(p is not None and list(p) == [LAMBDA, LR, SIZE] for p in proposals)


def test_a_proposal_is_a_function_of_seed_index_and_history() -> None:
    history = searched({"1m": 8, "4m": 4})
    one, used = ladder(), ladder()
    for index in range(9, 12):
        used.propose(index, searched({"1m": 8, "4m": 2}, seed=1))
    assert one.propose(12, history) == used.propose(12, history), "whatever it was asked before"
    assert one.propose(12, history) == one.propose(12, copy.deepcopy(history))
    assert one.propose(12, history) != ladder(seed=7).propose(12, history)


def test_a_large_trial_is_proposed_near_what_small_ones_found() -> None:
    optimum = {"1m": -2.8, "4m": -3.1, "16m": -3.4}
    history = searched({"1m": 40, "4m": 25}, optimum)
    add(history, "16m", {10: 0.6}, lr=10**-3.4, status="stopped_early")
    proposals = []
    for index in range(66, 90):
        params = ladder().propose(index, history)
        assert params is not None
        proposals.append(params)
    large = [p for p in proposals if p[SIZE] == "16m"]
    assert large, "small ones have told what they can"
    assert all(abs(math.log10(p[LR]) + 3.4) < 0.6 for p in large), "hopeless settings are never begun there"


def test_hopeless_settings_are_not_begun_at_the_largest_size_whatever_they_would_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here the worse a setting is the more it is said to tell."""
    monkeypatch.setattr("orpo_ray.search.ladder.information", lambda rho, gamma: np.maximum(gamma, 0.01))
    history = searched({"1m": 20, "4m": 20, "16m": 12})
    for index in range(52, 60):
        params = ladder().propose(index, history)
        assert params is not None
        assert params[SIZE] != "16m" or accuracy(params[LR], "16m") > 0.8


def test_sizes_with_nothing_in_common_send_it_to_the_largest() -> None:
    """As cheap as they are, small trials tell nothing once large ones have contradicted them."""
    optimum = {"1m": -2.2, "4m": -4.8, "16m": -3.5}
    history = searched({"1m": 20, "4m": 12, "16m": 8}, optimum)
    proposals = [ladder().propose(index, history) for index in range(40, 52)]
    assert sum(p is not None and p[SIZE] == "16m" for p in proposals) >= 9


def test_it_waits_for_the_first_large_trial_and_never_on_an_idle_cluster() -> None:
    history = searched({"1m": 40, "4m": 25})
    for _ in range(8):
        add(history, "1m", {}, status="failed")
    add(history, "16m", {10: 0.6}, status=None)
    for _ in range(10):
        params = ladder().propose(len(history.trials), history)
        if params is None:
            break
        assert params[SIZE] != "16m", "one at a time before any has finished"
        add(history, params[SIZE], {80: accuracy(params[LR], params[SIZE])}, params[LR], params[LAMBDA])
    else:
        pytest.fail("the smaller sizes' share has no end")
    end = {"event": "finished", "trial_id": "t73", "status": "finished", "steps": 80, "train_seconds": 1280.0}
    history.apply(as_event(end))
    assert ladder().propose(len(history.trials), history) is not None


def test_diverged_and_collapsed_trials_do_no_harm() -> None:
    history = searched({"1m": 12, "4m": 8})
    add(history, "1m", {}, lr=9e-3, status="diverged")
    add(history, "1m", {10: math.nan}, lr=9e-3, status="diverged")
    add(history, "4m", {10: -1e9, 80: -1e9}, lr=1e-5)
    params = ladder().propose(23, history)
    assert params is not None
    assert 1e-5 <= params[LR] <= 1e-2
    best = ladder().expectations(history)[0]
    assert abs(math.log10(best["params"][LR]) + 3) < 0.5
    assert best["mean"] == pytest.approx(accuracy(1e-3, "1m"), abs=0.08)


def test_a_metric_to_be_minimised_is() -> None:
    history = SweepState()
    rng = np.random.default_rng(0)
    for bundle in ("1m", "4m"):
        for _ in range(12):
            lr = 10 ** rng.uniform(-5, -2)
            add(history, bundle, {80: 4.0 - 2 * accuracy(lr, bundle)}, lr, rng.uniform(), metric="eval/nll")
    settings = {"metric": "eval/nll"}
    found = ladder(**settings).expectations(history)[1]
    assert abs(math.log10(found["params"][LR]) + 3) < 0.4
    assert found["interval"][0] < found["mean"] < found["interval"][1]
    assert found["mean"] == pytest.approx(4.0 - 2 * 0.84, abs=0.05)


def test_five_hundred_trials_take_about_half_a_second() -> None:
    history = searched({"1m": 350, "4m": 120, "16m": 30})
    # Threads of BLAS that wait for a busy core spin, and would be counted.
    with threadpool_limits(limits=1):
        started = time.process_time()
        ladder().propose(499, history)
        assert time.process_time() - started < 2.0, "0.5 s on an idle core; the bound allows for a busy one"


# ---- the budget ---------------------------------------------------------------------------------------------------


def test_the_budget_ends_the_search_and_says_so() -> None:
    history = searched({"1m": 20, "4m": 10, "16m": 3})
    spent = history.device_hours
    with pytest.raises(Exhausted, match=rf"of {spent + 0.01:g} device-hours are spent"):
        ladder(hours=spent + 0.01).propose(33, history)
    assert ladder(hours=spent + 0.4).propose(33, history) is not None


def test_two_large_trials_are_kept_for() -> None:
    """A large trial takes 16 · 80 s = 0.356 hours: with 0.7 hours left smaller ones have none of it."""
    history = searched({"1m": 6})
    rich, poor = ([ladder(history.device_hours + left).propose(i, history) for i in range(6, 12)] for left in (9, 0.7))
    assert {p[SIZE] for p in rich if p} == {"4m"}
    assert {p[SIZE] for p in poor if p} == {"16m"}


def test_a_budget_too_small_for_one_large_trial_is_refused() -> None:
    history = searched({"1m": 2, "4m": 1})
    with pytest.raises(ValueError, match=r"a trial of 16m takes about 0.356 device-hours, .*device_hours is 0.3"):
        ladder(hours=0.3).propose(3, history)


def test_no_more_than_num_samples() -> None:
    with pytest.raises(Exhausted, match=r"num_samples \(5\)"):
        ladder(num_samples=5).propose(5, SweepState())


def test_one_size_is_no_ladder() -> None:
    with pytest.raises(ValueError, match="at least two sizes"):
        Ladder(sweep(), dict.fromkeys(PARAMETERS, 5), dict.fromkeys(PARAMETERS, 1), STEPS)


# ---- early stops --------------------------------------------------------------------------------------------------


def curves(history: SweepState, bundle: str, finals: list[float]) -> None:
    """Finished trials that gained about 0.2 from step 10 on."""
    for number, final in enumerate(finals):
        add(history, bundle, {10: final - 0.2 + 0.002 * number, 80: final})


def test_a_small_model_ahead_at_equal_step_is_no_reason_to_stop_a_large_one() -> None:
    history = SweepState()
    curves(history, "1m", [0.80, 0.81, 0.82, 0.83, 0.84, 0.85])
    large = add(history, "16m", {10: 0.43}, status=None)
    assert ladder().reason_to_stop(history.trials[large], history) is None
    curves(history, "16m", [0.60, 0.61, 0.62, 0.63])
    assert ladder().reason_to_stop(history.trials[large], history) is None, (
        "0.43 + 0.2 is as good as its own size's best"
    )


def test_a_large_trial_far_behind_its_own_size_is_stopped_whatever_small_ones_did() -> None:
    history = SweepState()
    curves(history, "16m", [0.80, 0.81, 0.82, 0.83])
    large = add(history, "16m", {10: 0.40}, status=None)
    reason = ladder().reason_to_stop(history.trials[large], history)
    assert reason is not None
    assert "by the curves of 4 finished trials of 16m" in reason
    curves(history, "1m", [0.5, 0.9, 0.1, 0.99])
    assert ladder().reason_to_stop(history.trials[large], history) == reason


def test_too_few_curves_stop_nobody_and_finalists_are_never_stopped() -> None:
    history = SweepState()
    curves(history, "16m", [0.80, 0.81])
    large = add(history, "16m", {10: 0.40}, status=None)
    assert ladder().reason_to_stop(history.trials[large], history) is None
    curves(history, "16m", [0.82, 0.83])
    assert ladder().reason_to_stop(history.trials[large], history) is not None
    history.trials[large].purpose = "confirm"
    assert ladder().reason_to_stop(history.trials[large], history) is None


# ---- expectations -------------------------------------------------------------------------------------------------


def test_one_size_tells_nothing_about_another() -> None:
    small, _, large = ladder().expectations(searched({"1m": 20}))
    assert (small["status"], large["status"]) == ("measured", "cannot tell")
    assert large["mean"] is None
    assert "1 sizes have a finished trial; 2 are needed" in large["says"]


def test_sizes_that_agree_predict_the_next() -> None:
    entries = ladder().expectations(searched({"1m": 25, "4m": 20}))
    large = entries[2]
    assert large["status"] == "predicted"
    assert abs(math.log10(large["params"][LR]) + 3) < 0.4
    assert large["interval"][0] < accuracy(1e-3, "16m") < large["interval"][1]
    assert large["narrowed"] <= 0.8
    assert json.loads(json.dumps(entries)) == entries


def test_sizes_that_contradict_each_other_are_not_extrapolated() -> None:
    history, rng = SweepState(), np.random.default_rng(0)
    for bundle in ("1m", "4m"):
        for _ in range(25):
            lr, lambda_ = 10 ** rng.uniform(-5, -2), rng.uniform()
            wave = math.sin(9 * lambda_) if bundle == "1m" else math.cos(3 * math.log10(lr) + 2 * lambda_)
            add(history, bundle, {80: 0.7 + 0.1 * wave}, lr, lambda_)
    large = ladder().expectations(history)[2]
    assert large["status"] == "cannot tell"
    assert large["params"] is None
    assert large["narrowed"] > 0.8
    assert "of the prior uncertainty" in large["says"]
