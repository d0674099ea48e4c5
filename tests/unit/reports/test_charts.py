from orpo_ray.reports import charts
from orpo_ray.results.winners import summarize_winners
from orpo_ray.storage.sweep_state import SweepState
from tests.support.pages import data_of, small


def test_what_cannot_be_drawn_is_a_sentence():
    results = small([(0.1, 1e-3, 0.5, "finished")])
    results["winners"] = summarize_winners(results, "nowhere")
    panels = charts.draw_panels(data_of(results, SweepState()))
    assert panels.keys() == charts.HEADINGS.keys()
    for panel in panels.values():
        assert panel.charts == ()
        assert panel.text.endswith(".")
    assert "loss.orpo_lambda and optim.lr did not vary" in panels["heat_maps"].text
    assert "No trial diverged: 1 held" in panels["divergence"].text
