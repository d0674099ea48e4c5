import numpy as np
import pytest

from orpo_ray.reports import curve_charts
from orpo_ray.storage.sweep_state import read_state
from tests.support.events import as_state
from tests.support.pages import SIZES, data_of, small, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("charts")
    return write_sweep(run_dir, 60, num_pairs=24), run_dir


def test_curves_show_the_best_of_each_lambda_and_keep_the_rest_back(sweep):
    results, run_dir = sweep
    data = data_of(results, read_state(run_dir))
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
    panel = curve_charts.curves(
        data_of(results, as_state([{"event": "submitted", "trial_id": "t00", "params": {}}, *events]))
    )
    (trace,) = panel.charts[0].figure.data
    assert len(trace.x) <= 120
    assert (trace.x[0], trace.x[-1], trace.y[-1]) == (1, 5000, 1000.0)
