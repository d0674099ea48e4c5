"""How many points a second reach MLflow: a made-up sweep's events through the real tracker, as fast as they go.

    python -m benchmarks.mlflow_delivery                                   # SQLite, and a server in front of SQLite
    python -m benchmarks.mlflow_delivery --backend postgresql+psycopg2://user@host/db    # a server in front of that

64 trials report 50 metrics at each of 10 steps, all at once. Every point is counted afterwards. Writes
benchmarks/results/mlflow-delivery-cpu.json.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import RESULTS, described, save
from orpo_ray.config import parse
from orpo_ray.storage.events import Event, Logged, Submitted
from orpo_ray.tracking.sweep_tracker import SweepTracker
from tests.support.browser import mlflow_server

TRIALS, METRICS, STEPS = 64, 50, 10
_LIMIT_S = 400.0


def main(words: list[str] | None = None) -> int:
    """Deliver to each kind of store; 1 if a point is missing or doubled."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mlflow_delivery", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", help="database URI behind the server (default: SQLite)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args(words)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows.append({"store": "SQLite file"} | delivered(folder, f"sqlite:///{folder}/file.db"))
        backend = options.backend or f"sqlite:///{folder}/server.db"
        kind = backend.partition(":")[0].partition("+")[0]
        with mlflow_server(backend, folder / "artifacts", folder / "log") as url:
            rows.append({"store": f"mlflow server, {kind}"} | delivered(folder, url))
    table = Table("store", "points", "seconds", "points a second", "found")
    for row in rows:
        rate = f"{row['points'] / row['seconds']:,.0f}"
        table.add_row(row["store"], f"{row['points']:,}", f"{row['seconds']:.1f}", rate, f"{row['found']:,}")
    Console().print(table)
    facts = described(shlex.join(["python", "-m", "benchmarks.mlflow_delivery", *words]))
    save("mlflow-delivery-cpu", "64 trials", {"made": facts, "rows": rows}, options.results)
    return 0 if all(row["found"] == row["points"] for row in rows) else 1


def delivered(folder: Path, uri: str) -> dict[str, Any]:
    """Seconds from the first event to the last point's arrival, and how many points the store then has."""
    config = parse(
        {
            "name": "delivery",
            "output_dir": str(folder / "runs"),
            "model": {"path": "tiny-llama-1m"},
            "data": {"path": "builtin://style-pairs"},
            "train": {"max_steps": STEPS},
            "tracking": {"experiment": "delivery", "uri": uri},
            "sweep": {"num_samples": TRIALS, "space": {"optim.lr": {"type": "uniform", "low": 0.1, "high": 0.2}}},
        }
    )
    tracker = SweepTracker(config, "sweep", {"command": "", "packages": {"orpo-ray": ""}, "git": None})
    tracker.start()
    at = 1_760_000_000_000
    events: list[Event] = [
        Submitted(trial_id=f"{trial:05d}", params={"optim.lr": 0.1 + trial / 1000}, bundle="", time=at)
        for trial in range(TRIALS)
    ]
    for step in range(1, STEPS + 1):
        metrics = {f"train/metric_{number}": step + number / 100 for number in range(METRICS)}
        events += [
            Logged(trial_id=f"{trial:05d}", step=step, metrics=metrics, time=at + step) for trial in range(TRIALS)
        ]
    began = time.perf_counter()
    tracker.handle(events)
    left = tracker.flush(_LIMIT_S)
    seconds = time.perf_counter() - began
    client = MlflowClient(uri)
    keys = [f"train/metric_{number}" for number in range(METRICS)]
    runs = [] if left else tracker.run_ids.values()
    found = sum(len(client.get_metric_history(run_id, key)) for run_id in runs for key in keys)
    tracker.close({"best": None, "trials": [], "metric": config.as_sweep()[1].metric}, interrupted=True)
    return {"points": TRIALS * METRICS * STEPS, "seconds": seconds, "found": found}


if __name__ == "__main__":
    sys.exit(main())
