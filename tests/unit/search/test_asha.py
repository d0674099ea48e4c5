"""Successive halving with pauses, played through by hand."""

from __future__ import annotations

import random
from typing import Literal

import pytest

from orpo_ray.search.asha import Rungs


def play(
    values: dict[str, float],
    slots: int,
    factor: float = 3.0,
    mode: Literal["max", "min"] = "max",
    seed: int = 0,
    depth_last: bool = True,
) -> tuple[dict[str, int], list[str]]:
    """Run trials, whose metric never changes, on so many slots. Returns steps trained per trial, and the order."""
    rungs = Rungs(grace_steps=10, reduction_factor=factor, max_steps=90, mode=mode, depth_last=depth_last)
    rng, fresh, steps = random.Random(seed), list(values), dict.fromkeys(values, 0)
    running: list[str] = []
    order: list[str] = []
    while True:
        while len(running) < slots:
            promoted = rungs.next_promotion(bool(fresh))
            if promoted is not None:
                rungs.promote(promoted)
                running.append(promoted)
            elif fresh:
                running.append(fresh.pop(0))
                rungs.add(running[-1])
            else:
                break
            order.append(running[-1])
        for eliminated in rungs.eliminated(more_to_come=bool(fresh)):
            rungs.remove(eliminated)
        if not running:
            assert rungs.waiting == []
            return steps, order
        trial = running.pop(rng.randrange(len(running)))
        steps[trial] += 10
        if steps[trial] == 90:
            rungs.report(trial, 90, values[trial], bool(fresh))
            rungs.remove(trial)
        elif rungs.report(trial, steps[trial], values[trial], bool(fresh)) == "continue":
            running.append(trial)


def test_every_trial_has_its_turn_and_the_best_third_of_each_rung_goes_on() -> None:
    values = {f"{i}": float(i) for i in range(9)}
    steps, order = play(values, slots=1)
    assert steps == {**dict.fromkeys("012345", 10), "6": 30, "7": 30, "8": 90}
    assert order == [*"012345678", "7", "6", "8"], "the last to arrive was the best: it went on at once"


def test_without_patience_whole_results_come_early() -> None:
    rungs = Rungs(10, 3, 90, "max", depth_last=False)
    for trial in "abc":
        rungs.add(trial)
    assert [rungs.report(t, 10, v, True) for t, v in (("a", 1.0), ("b", 3.0), ("c", 2.0))] == ["pause"] * 3
    assert rungs.next_promotion(more_to_come=True) == "b"
    values = {f"{i}": float(i) for i in range(27)}
    eager, depth_last = (sum(play(values, slots=1, depth_last=p)[0].values()) for p in (False, True))
    assert depth_last < eager, "where each trial is better than those before, haste promotes too many"


@pytest.mark.parametrize("slots", [1, 2, 4, 16])
@pytest.mark.parametrize("depth_last", [True, False])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_best_trial_is_always_trained_to_its_end(slots: int, depth_last: bool, mode: Literal["max", "min"]) -> None:
    for seed in range(20):
        values = {f"{i}": random.Random(seed * 100 + i).random() for i in range(17)}
        steps, _ = play(values, slots, mode=mode, seed=seed, depth_last=depth_last)
        best = (max if mode == "max" else min)(values, key=lambda t: values[t])
        assert steps[best] == 90
        assert min(steps.values()) == 10


def test_fewer_trials_than_the_reduction_factor_still_have_a_winner() -> None:
    assert sorted(play({"a": 1.0, "b": 2.0}, slots=1)[0].items()) == [("a", 10), ("b", 90)]
    assert play({"a": 1.0}, slots=1)[0] == {"a": 90}


def test_a_trial_that_ends_early_holds_up_nobody() -> None:
    rungs = Rungs(10, 3, 90, "max", depth_last=False)
    for trial in "abc":
        rungs.add(trial)
    assert rungs.report("a", 10, 1.0, False) == "pause"
    assert rungs.report("b", 10, 2.0, False) == "pause"
    assert rungs.next_promotion(more_to_come=False) is None, "c may still come"
    rungs.remove("c")  # diverged
    assert rungs.next_promotion(more_to_come=True) is None
    assert rungs.next_promotion(more_to_come=False) == "b"
    rungs.promote("b")
    assert rungs.eliminated(more_to_come=False) == ["a"]
    assert rungs.eliminated(more_to_come=True) == []


def test_rungs_between_evaluations_count_at_the_next_one() -> None:
    rungs = Rungs(10, 2, 80, "max", depth_last=False)
    assert rungs.steps == [10, 20, 40]
    for trial in "ab":
        rungs.add(trial)
    assert rungs.report("a", 8, 1.0, True) == "continue"
    assert rungs.report("a", 24, 1.0, True) == "pause", "it passed two rungs and waits at the second"
    rungs.promote("a")
    assert rungs.report("a", 32, 1.0, True) == "continue"
    assert rungs.report("a", 48, 1.0, True) == "pause"
