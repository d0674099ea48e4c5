"""Names of metrics are an interface: documentation and dashboard must speak of those that exist, and of all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from orpo_ray.tracking import prometheus

DOCS = Path(__file__).parents[3] / "docs"
EXPOSED = (
    {f"ray_{name}" for name in prometheus.GAUGES}
    | {f"ray_{name}_total" for name in prometheus.COUNTERS}
    | {f"ray_{prometheus.HISTOGRAM}"}
)


def named(text: str) -> set[str]:
    return {name.removesuffix("_bucket") for name in re.findall(r"ray_orpo_ray_\w+", text)}


def test_the_documentation_names_every_metric_with_its_labels() -> None:
    text = (DOCS / "observability.md").read_text(encoding="utf-8")
    assert named(text) == EXPOSED
    for name, (_, labels) in prometheus.GAUGES.items():
        (row,) = re.findall(rf"^\| `ray_{name}` \| (.*?) \|", text, re.MULTILINE)
        assert re.findall(r"`(\w+)`", row) == [label for label in labels if label != "sweep"]
    (row,) = [line for line in text.splitlines() if line.startswith("| `ray_orpo_ray_trials`")]
    assert all(state in row for state in prometheus.STATES)


def test_the_dashboard_shows_metrics_that_exist() -> None:
    dashboard = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert all(named(query) for query in queries)
    shown = named(json.dumps(dashboard))
    assert shown <= EXPOSED
    assert EXPOSED - shown == {"ray_orpo_ray_evaluations_total", "ray_orpo_ray_forks_total"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
