"""The search benchmark: its surfaces, its simulator and its statistics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import report, search_quality
from benchmarks.search_methods import METHODS, METRIC, Baseline, Decision, Resume, Run, Start, simulate
from benchmarks.surfaces import CHANCE, FAMILIES, LAMBDA, LARGEST, LR, LR_HIGH, LR_LOW, MAX_STEPS, SIZE, Surface
from orpo_ray.storage.sweep_state import SweepState, TrialState
from tests.support.events import as_event


def setting(lr: float, lambda_: float = 0.5, size: str = LARGEST) -> dict[str, Any]:
    return {LAMBDA: lambda_, LR: lr, SIZE: size}


def best_lr(surface: Surface, size: str, lambda_: float = 0.5) -> float:
    grid = np.geomspace(LR_LOW, LR_HIGH, 200)
    return float(max(grid, key=lambda lr: surface.value(setting(float(lr), lambda_, size))))


class Script:
    """Starts what it is told, one after another, and decides by a table (trial, step)."""

    def __init__(self, params: list[dict[str, Any]], decisions: dict[tuple[str, int], Decision] | None = None) -> None:
        self.params, self.decisions = list(params), decisions or {}
        self.paused: list[str] = []
        self.statuses: dict[str, str | None] = {}

    def next(self, history: SweepState) -> Start | Resume | None:
        if self.params:
            return Start(self.params.pop(0))
        return Resume(self.paused.pop()) if self.paused else None

    def evaluated(self, trial: TrialState, history: SweepState) -> Decision:
        decision = self.decisions.get((trial.trial_id, trial.step), "continue")
        if decision == "pause":
            self.paused.append(trial.trial_id)
        return decision

    def ended(self, trial: TrialState) -> None:
        self.statuses[trial.trial_id] = trial.status


# ---- surfaces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_setting_has_quality_one_and_half_of_all_are_below_zero(family: str) -> None:
    surface, rng = Surface(family, 3), np.random.default_rng(0)
    drawn = [setting(10 ** rng.uniform(np.log10(LR_LOW), np.log10(LR_HIGH)), rng.uniform()) for _ in range(2000)]
    qualities = np.array([surface.quality(params) for params in drawn])
    assert 0.97 < qualities.max() <= 1.0 + 1e-4
    assert np.median(qualities) == pytest.approx(0.0, abs=0.06)
    assert 0.01 < (qualities >= 0.95).mean() < 0.25


def test_the_best_learning_rate_falls_with_size_as_the_family_says() -> None:
    for family, low, high in (("benign", 0.2, 0.4), ("strong shift", 0.6, 0.8)):
        surface = Surface(family, 1)
        exponent = math.log(best_lr(surface, "1m") / best_lr(surface, LARGEST)) / math.log(64)
        assert low - 0.03 < exponent < high + 0.03


def test_early_on_a_higher_rate_looks_better() -> None:
    surface = Surface("benign", 0)
    best = best_lr(surface, LARGEST)
    assert surface.value(setting(best), 10) < surface.value(setting(best * 1.5), 10)
    assert surface.value(setting(best), MAX_STEPS) > surface.value(setting(best * 1.5), MAX_STEPS)


def test_too_high_a_rate_diverges_and_is_worth_chance() -> None:
    surface = Surface("flat and noisy", 0)
    assert surface.diverges(setting(LR_HIGH))
    assert surface.value(setting(LR_HIGH)) == CHANCE
    assert not surface.diverges(setting(best_lr(surface, LARGEST)))


def test_a_step_costs_what_the_family_says() -> None:
    assert Surface("benign", 0).step_seconds(LARGEST) * MAX_STEPS == pytest.approx(3600)
    ratio = Surface("benign", 0).step_seconds("16m") / Surface("benign", 0).step_seconds("1m")
    assert ratio == pytest.approx(16)
    ratio = Surface("sublinear cost", 0).step_seconds("16m") / Surface("sublinear cost", 0).step_seconds("1m")
    assert ratio == pytest.approx(16**0.7)


# ---- the simulator ------------------------------------------------------------------------------------------------


def test_device_hours_count_devices_that_train_and_nothing_else() -> None:
    surface = Surface("benign", 0)
    good = setting(best_lr(surface, LARGEST))
    two = simulate(surface, Script([good, good]), 100.0)
    assert two.trials == 2
    assert two.device_hours == pytest.approx(2.0, rel=0.15), "paces differ by a few percent"
    assert two.hours_by_size[LARGEST] == pytest.approx(two.device_hours)
    hours, clock, quality = two.incumbents[-1]
    assert clock == pytest.approx(hours / 2, rel=0.1), "both at once"
    assert quality == pytest.approx(surface.quality(good))


def test_stopped_paused_and_diverged_trials() -> None:
    surface = Surface("benign", 0)
    good = setting(best_lr(surface, LARGEST))
    script = Script([good, good, setting(LR_HIGH)], {("t0000", 20): "stop", ("t0001", 40): "pause"})
    run = simulate(surface, script, 100.0)
    assert script.statuses == {"t0000": "stopped_early", "t0001": "finished", "t0002": "diverged"}
    assert 1.25 < run.device_hours < 1.65, "a quarter, a whole one that went on from its pause, and up to a quarter"
    assert len(run.incumbents) == 1


def test_it_stops_at_the_budget() -> None:
    surface = Surface("benign", 0)
    run = simulate(surface, Script([setting(1e-4)] * 50), 2.5)
    assert run.device_hours == pytest.approx(2.5, abs=0.6)
    assert run.trials == 4


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow if "asha" in name else ()) for name in METHODS]
)
def test_every_method_searches_and_repeats_itself(method: str) -> None:
    surface = Surface("benign", 5)
    first, second = (simulate(surface, METHODS[method](5, 4.5), 4.5) for _ in range(2))
    assert first == second
    assert first.trials >= 4
    assert first.incumbents
    if "largest only" in method:
        assert set(first.hours_by_size) == {LARGEST}
    else:
        assert len(first.hours_by_size) > 1


@pytest.mark.slow  # Ray Tune takes seconds to import
def test_the_baseline_stops_as_ray_tunes_asha_does() -> None:
    """By hand: of a rung's values so far the cut is their 2/3 quantile, and the first to come is never stopped."""
    method = Baseline(0, tpe=False, asha=True, sizes=[LARGEST])
    history = SweepState()
    decisions = []
    for number, value in enumerate((0.6, 0.7, 0.65, 0.68, 0.5)):
        name = f"t{number:04d}"
        params = method.next(history).params
        history.apply(as_event({"event": "submitted", "trial_id": name, "params": params, "bundle": LARGEST}))
        history.apply(as_event({"event": "eval", "trial_id": name, "step": 10, "metrics": {METRIC: value}}))
        decisions.append(method.evaluated(history.trials[name], history))
    cuts = [np.quantile(seen, 2 / 3) for seen in ([0.6], [0.6, 0.7], [0.6, 0.7, 0.65], [0.6, 0.7, 0.65, 0.68])]
    expected = ["stop" if value < cut else "continue" for value, cut in zip((0.7, 0.65, 0.68, 0.5), cuts, strict=True)]
    assert decisions == ["continue", *expected]
    assert expected == ["continue", "stop", "continue", "stop"]


# ---- statistics ---------------------------------------------------------------------------------------------------


def test_a_run_reaches_a_quality_once() -> None:
    run = Run(incumbents=[(1.0, 0.5, 0.2), (3.0, 1.0, 0.96), (4.0, 1.5, 0.9)])
    assert run.reaches(0.95) == 3.0
    assert run.reaches(0.99) == math.inf
    assert [run.quality_at(h) for h in (0.5, 1.0, 3.5, 9.0)] == [0.0, 0.2, 0.96, 0.9]


def test_medians_and_ratios_know_runs_that_did_not_get_there() -> None:
    hours = np.array([2.0, 4.0, 6.0, math.inf, math.inf])
    middle, low, high = search_quality.median_interval(hours)
    assert (middle, high) == (6.0, math.inf)
    assert low <= 4.0
    ours, never = np.full(5, 4.0), np.full(5, math.inf)
    assert search_quality.ratio_interval(ours, np.full(5, 10.0), 16.0) == pytest.approx((0.4, 0.4, 0.4))
    assert search_quality.ratio_interval(ours, never, 16.0) == pytest.approx((0.25, 0.25, 0.25))
    assert search_quality.ratio_interval(never, ours, 16.0)[0] == math.inf


def test_the_page_shows_figures_and_verdicts(tmp_path: Path) -> None:
    runs = {
        "ladder": [Run(incumbents=[(4.0, 2.0, 0.97)], device_hours=16.0, trials=9)] * 3,
        "asha + tpe": [Run(incumbents=[(10.0, 2.5, 0.97)], device_hours=16.0, trials=9)] * 3,
        "asha + tpe, largest only": [Run(incumbents=[(7.0, 1.8, 0.97)], device_hours=16.0, trials=9)] * 3,
    }
    made = search_quality.described("python -m benchmarks.search_quality")
    for method, mine in runs.items():
        families = {family: search_quality.summary(mine, 16.0) for family in FAMILIES}
        content = {"budget_hours": 16.0, "seeds": [1000, 3], "families": families, "made": made}
        search_quality.save("search-quality", method, content, tmp_path)
    text = report.render("<!-- search-quality -->\n<!-- /search-quality -->", tmp_path, tmp_path)
    assert "| ladder | 4.0 [4.0, 4.0] 100%" in text
    assert "| all | 0.40 [0.40, 0.40] met | 0.57 [0.57, 0.57] missed |" in text
    assert (tmp_path / "search-quality.png").stat().st_size > 10_000
