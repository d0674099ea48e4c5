import math

import numpy as np
import pytest

from orpo_ray.reports import setting_charts
from orpo_ray.results.frames import load_runs_frame
from orpo_ray.results.winners import optima, summarize_winners
from tests.support.pages import METRIC, SIZES, small, write_sweep
from tests.support.sweeps import pair_scores
from tests.support.sweeps import trial as made_trial


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("charts")
    return write_sweep(run_dir, 60, num_pairs=24), run_dir


def test_importance_finds_the_setting_that_matters_and_how_sure_that_is():
    rng = np.random.default_rng(0)
    rows = [
        (float(rng.uniform(0, 1)), float(lr), 0.5 + 0.2 * math.log10(lr / 1e-4), "finished")
        for lr in 10 ** rng.uniform(-4, -2, 60)
    ]
    results = small(rows)
    panel = setting_charts.importance(results, load_runs_frame(results))
    rows_by_name = {row[0]: [float(cell) for cell in row[1:]] for row in panel.charts[0].rows}
    lr, lam = rows_by_name["learning rate"], rows_by_name["λ"]
    assert lr[0] > 1.0  # shuffled, it costs more than knowing nothing
    assert abs(lam[0]) < 0.1
    assert lr[1] < lr[0] < lr[2]


def test_importance_is_silent_on_few_trials_and_on_noise():
    rows = [(i / 10, 1e-3 * (i + 1), 0.5 + i / 100, "finished") for i in range(9)]
    results = small(rows)
    assert "Not enough trials to say: 9 settings" in setting_charts.importance(results, load_runs_frame(results)).text
    noise = np.random.default_rng(1).normal(size=24)
    results = small([(i / 10, 1e-3, float(noise[i]), "finished") for i in range(24)])
    panel = setting_charts.importance(results, load_runs_frame(results))
    assert panel.charts == ()
    assert "says nothing about importance" in panel.text


def test_seeds_of_one_setting_are_one_setting_to_the_forest():
    results = small([(i / 10, 1e-3, 0.5 + i / 100, "finished") for i in range(9) for _ in range(5)])
    for number, one in enumerate(results["trials"]):
        one["params"]["train.seed"] = number % 5
    assert "9 settings finished" in setting_charts.importance(results, load_runs_frame(results)).text


def test_the_optimum_of_each_size_and_how_far_its_ties_reach(sweep):
    results, run_dir = sweep
    found = optima(results, run_dir, SIZES)
    assert [optimum.bundle for optimum in found] == [*SIZES]
    for optimum in found:
        own = [t for t in results["trials"] if t["bundle"] == optimum.bundle and t["status"] == "finished"]
        means = {}
        for one in own:
            means.setdefault((one["params"]["loss.orpo_lambda"], one["params"]["optim.lr"]), []).append(
                one["metrics"][METRIC]
            )
        assert optimum.mean == pytest.approx(max(np.mean(values) for values in means.values()))
        low, high = optimum.tied["optim.lr"]
        assert low <= optimum.at["optim.lr"] <= high
    panel = setting_charts.scaling(found, METRIC)
    lr, lam = panel.charts
    assert [*lr.figure.data[0].x] == [*SIZES.values()]
    assert [*lr.figure.data[0].y] == [o.at["optim.lr"] for o in found]
    assert lr.rows[0][1] == "923 k"
    assert [*lam.figure.data[0].error_y.arrayminus] == pytest.approx(
        [o.at["loss.orpo_lambda"] - o.tied["loss.orpo_lambda"][0] for o in found]
    )


def test_the_front_is_numbered_and_a_setting_that_went_wrong_is_left_out():
    nlls = [2.0 + i / 10 for i in range(8)] + [30.0]
    trials = [
        made_trial(f"t{i}", {"optim.beta2": i / 10}, pair_scores(np.full(4, nll if nll < 30 else -1.0), nll))
        for i, nll in enumerate(nlls)
    ]
    results = {"name": "toy", "metric": "eval/nll", "mode": "min", "best": trials[0], "trials": trials}
    panel = setting_charts.pareto(summarize_winners(results, "nowhere")["pareto"])
    others, front = panel.charts[0].figure.data
    assert [*front.text] == ["1"]
    assert front.x[0] == pytest.approx(2.0)
    assert max(others.x) < 3
    assert "1 far worse setting is outside the picture" in panel.text
