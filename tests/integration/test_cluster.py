"""A sweep on a cluster that was there before and goes on afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.integration.conftest import Sweeps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(params=[True, False], ids=["dashboard", "no dashboard"])
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    head = {"num_cpus": 2, "include_dashboard": request.param, "dashboard_port": 0}
    started = Cluster(initialize_head=True, head_node_args=head)
    yield started
    ray.shutdown()
    started.shutdown()


def test_early_stops_leak_no_placement_group(cluster: Cluster, sweeps: Sweeps) -> None:
    file = sweeps.write(
        "leak",
        {
            "metric": "eval/nll",
            "scheduler": {"type": "asha", "grace_steps": 2, "reduction_factor": 2},
            "space": {"optim.lr": {"type": "grid", "values": [3.0e-3, 1.0e-6, 2.0e-3, 1.0e-7]}},
        },
        **{"train.max_steps": 8, "train.eval_every": 2},
    )
    run = subprocess.run(
        [sys.executable, "-m", "orpo_ray.cli", "sweep", str(file)],
        env=os.environ | {"RAY_ADDRESS": cluster.address, "HF_HUB_OFFLINE": "1"},
        cwd=sweeps.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "stopped_early" in {t["status"] for t in sweeps.results("leak")["trials"]}

    ray.init(address=cluster.address, log_to_driver=False)
    groups = ray.util.placement_group_table().values()
    assert groups, "the sweep ran elsewhere"
    assert {group["state"] for group in groups} == {"REMOVED"}
    assert ray.available_resources()["CPU"] == 2.0
