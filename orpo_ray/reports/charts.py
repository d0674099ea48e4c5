"""Select and order the charts of a report (plotly figures)."""

from __future__ import annotations

from orpo_ray.reports.axis_charts import divergence, heat_maps, metric_by
from orpo_ray.reports.chart_style import Panel
from orpo_ray.reports.curve_charts import curves
from orpo_ray.reports.report_data import ReportData, model_sizes
from orpo_ray.reports.setting_charts import importance, intervals, parallel, pareto, scaling
from orpo_ray.results.frames import LAMBDA, LR
from orpo_ray.results.winners import optima

HEADINGS = {
    "intervals": "The best settings",
    "heat_maps": "{metric} over λ and learning rate",
    "metric_by_lr": "{metric} over the learning rate",
    "metric_by_lambda": "{metric} over λ",
    "curves": "Chosen and rejected over training",
    "pareto": "Likelihood against preference",
    "parallel": "All settings together",
    "importance": "What matters",
    "scaling": "How the optimum moves with model size",
    "divergence": "Where training diverges",
}
"""Name of a panel -> its heading."""
_BY_ONE_AXIS = {"metric_by_lr": LR, "metric_by_lambda": LAMBDA}


def draw_panels(data: ReportData) -> dict[str, Panel]:
    """All panels by name; a panel without charts says why.

    The metric over the learning rate and over λ is drawn where there is no heat map of both.
    """
    results, frame, winners = data.results, data.frame, data.results["winners"]
    maps = heat_maps(results, frame)
    parameters = {size["bundle"]: size["parameters"] for size in model_sizes(data) if size["parameters"]}
    by_one = {} if maps.charts else {name: metric_by(axis, results, frame) for name, axis in _BY_ONE_AXIS.items()}
    return {
        "intervals": intervals(winners),
        "heat_maps": maps,
        **by_one,
        "curves": curves(data),
        "pareto": pareto(winners["pareto"]),
        "parallel": parallel(results, frame),
        "importance": importance(results, frame),
        "scaling": scaling(optima(results, data.run_dir, parameters), results["metric"]),
        "divergence": divergence(results, frame, winners["divergence"]),
    }
