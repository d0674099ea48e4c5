import numpy as np
import pytest

from orpo_ray.reports import axis_charts
from orpo_ray.results.frames import load_runs_frame, mean_interval
from tests.support.pages import small


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


def test_learning_rates_with_the_same_name_share_a_cell():
    results = small([(0.0, 1.70e-3, 0.4, "finished"), (0.1, 1.73e-3, 0.5, "finished"), (0.1, 3e-3, 0.6, "finished")])
    heat = axis_charts.heat_maps(results, load_runs_frame(results)).charts[0].figure.data[0]
    assert [*heat.x] == ["1.7e-3", "3e-3"]
    assert [[*row] for row in heat.z] == [[0.4, None], [0.5, 0.6]]


def test_lower_is_better_turns_the_colours_round():
    rows = [(0.0, 1e-3, 2.0, "finished"), (0.1, 1e-3, 1.0, "finished"), (0.1, 1e-2, 3.0, "finished")]
    results = small(rows, "eval/nll", "min")
    heat = axis_charts.heat_maps(results, load_runs_frame(results)).charts[0].figure.data[0]
    assert heat.reversescale is True
    assert heat.text[1][0] == "1.000<br>★"


def test_one_axis_shows_each_trial_and_the_means_with_intervals():
    rows = [(lam, 1e-3, value, "finished") for lam in (0.1, 0.5) for value in (0.5, 0.6, 0.7)]
    results = small(
        [*rows, (1.0, 1e-3, 0.4, "stopped_early"), (2.0, 1e-3, 0.3, "diverged"), (3.0, 1e-3, None, "failed")]
    )
    panel = axis_charts.metric_by("loss.orpo_lambda", results, load_runs_frame(results))
    mean, finished, stopped, diverged = panel.charts[0].figure.data
    assert [*mean.x] == [0.1, 0.5]
    assert [*mean.y] == pytest.approx([0.6, 0.6])
    assert [*mean.error_y.array] == pytest.approx([mean_interval([0.5, 0.6, 0.7])[1]] * 2)
    assert [len(trace.x) for trace in (finished, stopped, diverged)] == [6, 1, 1]
    assert [trace.name for trace in (finished, stopped, diverged)] == ["finished", "stopped early", "diverged"]
    other = axis_charts.metric_by("optim.lr", results, load_runs_frame(results))
    assert (other.charts, "learning rate" in other.text) == ((), True)
