"""Logs and metrics of a real sweep, where people look for them: files, Ray's session folder, Ray's metrics endpoint."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.support.real_sweeps import Sweeps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SERIES = re.compile(r"^(ray_orpo_ray_\w+)\{(.*)\} (\S+)$")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "3000")  # by default 10 s
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=started.address, log_to_driver=False)
    yield started
    ray.shutdown()
    started.shutdown()


def scrape() -> dict[str, dict[str, float]]:
    """Metric -> the label that tells its series apart (state, trial) -> value; empty while the agent is not up."""
    (node,) = ray.nodes()
    try:
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        text = urllib.request.urlopen(url, timeout=5).read().decode()
    except (urllib.error.URLError, ConnectionError):
        return {}
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if match := SERIES.match(line):
            name, labels, value = match.groups()
            pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            assert pairs["sweep"] == "seen"
            found.setdefault(name, {})[pairs.get("trial") or pairs.get("state") or ""] = float(value)
    return found


def entries(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_sweep_can_be_followed_by_its_logs_and_metrics(cluster: Cluster, sweeps: Sweeps) -> None:
    # Long enough (20 s) to be seen: gauges are set every 5 s and reported every 3 s.
    sizes = {"good": {"model.path": "tiny-llama-1m"}, "missing": {"model.path": "no/such-folder"}}
    file = sweeps.write(
        "seen",
        {"metric": "eval/nll", "space": {"model": {"type": "bundle", "values": sizes}}},
        **{"train.max_steps": 200, "train.eval_every": 100, "scaling.num_workers": 2},
    )
    output = sweeps.folder / "output.txt"
    with output.open("w") as sink:
        run = subprocess.Popen(
            [sys.executable, "-m", "orpo_ray.cli", "sweep", str(file)],
            env=os.environ | {"RAY_ADDRESS": cluster.address, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"},
            cwd=sweeps.folder,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        seen: dict[str, dict[str, float]] = {}
        running: set[str] = set()  # trials whose speed was seen at once
        try:
            deadline = time.monotonic() + 240
            while run.poll() is None and time.monotonic() < deadline:
                now = scrape()
                running |= set(now.get("ray_orpo_ray_trial_pairs_per_second", {}))
                for name, series in now.items():
                    seen.setdefault(name, {}).update(series)
                time.sleep(0.5)
            assert run.poll() == 0, output.read_text()
        finally:
            run.kill()
            run.wait()

    trials = {t["params"]["model"]: t["trial_id"] for t in sweeps.results("seen")["trials"]}
    assert running == {trials["good"]}
    assert seen["ray_orpo_ray_trials"]["failed"] == 1
    assert seen["ray_orpo_ray_trials"].keys() >= {"waiting", "training", "finished", "diverged"}
    assert seen["ray_orpo_ray_trial_max_steps"][trials["good"]] == 200
    assert 0 < seen["ray_orpo_ray_trial_step"][trials["good"]] <= 200
    assert seen["ray_orpo_ray_trial_tokens_per_second"][trials["good"]] > 0
    assert seen["ray_orpo_ray_trial_loss"][trials["good"]] > 0
    assert seen["ray_orpo_ray_worker_groups"]["busy"] in (0, 1)
    assert seen["ray_orpo_ray_evaluations_total"][""] >= 1
    assert "ray_orpo_ray_mlflow_backlog" in seen
    assert seen["ray_orpo_ray_best"][""] > 0

    logs = sorted((sweeps.folder / "runs" / "seen" / "logs").glob("*.jsonl"))
    assert {file.stem.rpartition("-")[2] for file in logs} == {"0", "1"}
    for rank, file in enumerate(logs[:2]):
        lines = entries(file)
        assert {line["rank"] for line in lines} == {rank}
        assert {"time", "level", "logger", "message", "group", "node", "host", "pid"} <= lines[0].keys()
        of_trial = {model: [x for x in lines if x.get("trial_id") == trial] for model, trial in trials.items()}
        assert of_trial["good"][-1]["message"] == "the trial is finished at step 200"
        (failed,) = [line for line in of_trial["missing"] if line["level"] == "ERROR"]
        assert failed["attempt"] == 0
        assert "ModelError: model.path no/such-folder" in str(failed["exception"])
    assert f"logs       {sweeps.folder}/runs/seen/logs/*.jsonl" in output.read_text()

    # The same lines stand in Ray's own files of the workers, which its dashboard shows.
    session = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    text = "\n".join(file.read_text(errors="replace") for file in session.glob("worker-*.err"))
    assert json.dumps(failed, ensure_ascii=False) in text
