import pytest

from orpo_ray.reports import axis_charts, png, setting_charts
from orpo_ray.results.frames import load_runs_frame
from orpo_ray.results.winners import summarize_winners
from tests.support.pages import METRIC, small


def drawn(panel):
    return png.draw(panel, "a heading with $ in it").axes[0]


def test_scatter_traces_keep_axes_markers_and_legend():
    rows = [(0.1, lr, 0.5 + lr, "finished") for lr in (1e-4, 1e-3, 1e-2)] + [(0.1, 1e-1, 0.2, "diverged")]
    results = small(rows)
    axis = drawn(axis_charts.metric_by("optim.lr", results, load_runs_frame(results)))
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "linear")
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("learning rate", METRIC)
    assert {"1e-4", "1e-3", "1e-2"} < {label.get_text() for label in axis.get_xticklabels()}
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["mean", "finished", "diverged"]
    points = {line.get_marker(): [*line.get_xdata()] for line in axis.get_lines()}
    assert (points["o"], points["X"]) == ([1e-4, 1e-3, 1e-2], [1e-1])


def test_a_heat_map_has_its_cells_in_place():
    results = small([(0.1, 1e-3, 0.6, "finished"), (0.5, 1e-2, 0.8, "finished")])
    axis = drawn(axis_charts.heat_maps(results, load_runs_frame(results)))
    cells = axis.get_images()[0].get_array()
    assert cells[0, 0] == pytest.approx(0.6)
    assert cells[1, 1] == pytest.approx(0.8)
    assert cells.mask.tolist() == [[False, True], [True, False]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1e-3", "1e-2"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0.1", "0.5"]
    assert {(*text.xy, text.get_text()) for text in axis.texts if hasattr(text, "xy")} == {(0, 1, "–"), (1, 0, "–")}


def test_categories_run_in_the_order_of_the_figure():
    results = small([(0.1, 1e-3, 0.6, "finished"), (0.5, 1e-3, 0.8, "finished"), (1.0, 1e-3, 0.7, "finished")])
    axis = drawn(setting_charts.intervals(summarize_winners(results, "nowhere")))
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert [name.split()[0] for name in names] == ["λ=0.1", "λ=1", "λ=0.5"]  # the best on top
    points = {(x, y) for line in axis.get_lines() for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert points == {(0.6, 0), (0.7, 1), (0.8, 2)}
