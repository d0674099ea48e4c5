import math
from pathlib import Path

import numpy as np
import pytest

from orpo_ray.reports import axis_charts, chart_style, curve_charts, setting_charts
from orpo_ray.reports.report_data import ReportData
from orpo_ray.results.frames import load_evaluations_frame, load_runs_frame
from orpo_ray.results.winners import optima, summarize_winners
from orpo_ray.storage.journal import read_events
from tests.support.pages import METRIC, SIZES, write_sweep
from tests.support.sweeps import pair_scores
from tests.support.sweeps import trial as made_trial


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("charts")
    return write_sweep(run_dir, 60, num_pairs=24), run_dir


def small(rows, metric=METRIC, mode="max"):
    """Results of (λ, lr, value, status) without a journal."""
    trials = []
    for number, (lam, lr, value, status) in enumerate(rows):
        params = {"loss.orpo_lambda": lam, "optim.lr": lr}
        trials.append(made_trial(f"t{number:02d}", params, None, status))
        trials[-1]["metrics"] = {} if value is None else {metric: value}
    return {"name": "toy", "metric": metric, "mode": mode, "best": None, "trials": trials}


def data_of(results, events):
    return ReportData(Path("nowhere"), results, events, load_runs_frame(results), load_evaluations_frame(events))


def test_a_heat_map_is_the_mean_over_seeds_and_says_why_cells_are_empty():
    rows = [(0.1, 1e-3, 0.6, "finished"), (0.1, 1e-3, 0.8, "finished"), (0.5, 1e-3, None, "diverged")]
    rows += [(0.1, 1e-2, 0.9, "stopped_early"), (0.5, 1e-4, 0.65, "finished")]
    results = small(rows)
    (chart,) = axis_charts.heat_maps(results, load_runs_frame(results)).charts
    heat, empty = chart.figure.data
    assert [*heat.x] == ["1e-4", "1e-3", "1e-2"]
    assert [*heat.y] == ["0.1", "0.5"]
    assert [[*row] for row in heat.z] == [[None, pytest.approx(0.7), None], [0.65, None, None]]
    assert heat.text[0][1] == "0.700<br>★"
    said = {(x, y): why for x, y, why in zip(empty.x, empty.y, empty.hovertext, strict=True)}
    assert said == {
        ("1e-4", "0.1"): "no trial",
        ("1e-2", "0.1"): "none finished",
        ("1e-3", "0.5"): "all lost",
        ("1e-2", "0.5"): "no trial",
    }
    assert ("0.1", "1e-3", "0.7000", "2", "") in chart.rows


def test_many_learning_rates_share_cells():
    rates = np.geomspace(1e-4, 1e-2, 40)
    results = small([(lam, float(lr), 0.5, "finished") for lam in (0.0, 1.0) for lr in rates])
    panel = axis_charts.heat_maps(results, load_runs_frame(results))
    heat = panel.charts[0].figure.data[0]
    assert len(heat.x) < 9
    assert heat.x[0].startswith("1e-4<br>")
    assert not any(value is None for row in heat.z for value in row)
    assert sum(int(row[3]) for row in panel.charts[0].rows) == 80
    assert "values within each range" in panel.text


def test_lower_is_better_turns_the_colours_round():
    rows = [(0.0, 1e-3, 2.0, "finished"), (0.1, 1e-3, 1.0, "finished"), (0.1, 1e-2, 3.0, "finished")]
    results = small(rows, "eval/nll", "min")
    heat = axis_charts.heat_maps(results, load_runs_frame(results)).charts[0].figure.data[0]
    assert heat.reversescale is True
    assert heat.text[1][0] == "1.000<br>★"


def test_what_cannot_be_drawn_is_a_sentence():
    results = small([(0.1, 1e-3, 0.5, "finished")])
    frame = load_runs_frame(results)
    winners = summarize_winners(results, "nowhere")
    panels = [
        setting_charts.intervals(winners),
        axis_charts.heat_maps(results, frame),
        curve_charts.curves(data_of(results, [])),
        setting_charts.pareto(winners["pareto"]),
        setting_charts.parallel(results, frame),
        setting_charts.importance(results, frame),
        setting_charts.scaling(optima(results, "nowhere", {}), METRIC),
        axis_charts.divergence(results, frame, winners["divergence"]),
    ]
    for panel in panels:
        assert panel.charts == ()
        assert panel.text.endswith(".")
    assert "loss.orpo_lambda and optim.lr did not vary" in panels[1].text
    assert "No trial diverged: 1 held" in panels[-1].text


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


def test_curves_show_the_best_of_each_lambda_and_keep_the_rest_back(sweep):
    results, run_dir = sweep
    data = data_of(results, read_events(run_dir / "events.jsonl"))
    panel, evaluations = curve_charts.curves(data), data.evaluations
    assert [chart.title for chart in panel.charts] == [*SIZES]
    best = results["winners"]["best"]
    mine = next(c for c in panel.charts if c.title == best["params"]["model"])
    shown = [t for t in mine.figure.data if not (t.meta or {}).get("rest")]
    assert shown[0].legendgroup == best["trial_id"]
    assert shown[0].line.width > shown[1].line.width
    assert len({t.legendgroup for t in shown}) == 5  # one of each λ
    control = [t for t in shown if "λ=0 " in t.name]
    assert {t.line.dash for t in control} == {"dash"}
    own = evaluations[evaluations["trial_id"] == best["trial_id"]].sort_values("step")
    assert [*shown[0].x] == own["step"].tolist()
    assert [*shown[0].y] == pytest.approx(own["eval/chosen_logp"].tolist(), rel=1e-4)
    rest = [t for t in mine.figure.data if (t.meta or {}).get("rest")]
    assert {t.visible for t in rest} == {False}
    assert panel.rest + 15 == evaluations["trial_id"].nunique()


def test_long_curves_are_thinned_and_keep_their_ends():
    steps = np.arange(1, 5001)
    events = [{"event": "eval", "trial_id": "t00", "step": int(s), "metrics": {"eval/log_odds": s / 5}} for s in steps]
    results = small([(0.1, 1e-3, 0.5, "finished")])
    panel = curve_charts.curves(data_of(results, events))
    (trace,) = panel.charts[0].figure.data
    assert len(trace.x) <= 120
    assert (trace.x[0], trace.x[-1], trace.y[-1]) == (1, 5000, 1000.0)


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


def test_colours_of_series_differ_between_light_and_dark_pages():
    for place in (0.0, 1.0):
        colour = chart_style.viridis(place)
        light, dark = (sum(map(int, colour[mode][4:-1].split(","))) for mode in ("light", "dark"))
        assert dark > light  # viridis from its darkest to its lightest: each page leaves out what it swallows
    assert chart_style.viridis(0.0)["light"] == "rgb(68, 1, 84)"
