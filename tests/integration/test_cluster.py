"""A sweep on a cluster that was there before and goes on afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from orpo_ray.orchestration.capacity import give_back_abandoned
from tests.support.real_sweeps import Sweeps

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


@pytest.mark.parametrize("cluster", [False], indirect=True, ids=["no dashboard"])
def test_what_a_killed_controller_had_reserved_is_given_back(cluster: Cluster) -> None:
    """Without a dashboard Ray Train does not do so, and its next group would wait for ever."""
    ray.init(address=cluster.address, log_to_driver=False)

    @ray.remote(num_cpus=0)
    class Controller:
        def reserve(self) -> object:
            group = ray.util.placement_group([{"CPU": 1}])
            ray.get(group.ready())
            return group

    killed, alive = Controller.remote(), Controller.remote()
    reserved = {"killed": ray.get(killed.reserve.remote()), "alive": ray.get(alive.reserve.remote())}
    reserved["of this process"] = ray.util.placement_group([{"CPU": 0.001, "memory": 1}])
    ray.kill(killed)

    def states() -> dict[str, str]:
        return {name: ray.util.placement_group_table(group)["state"] for name, group in reserved.items()}

    deadline = time.monotonic() + 30
    while states()["killed"] == "CREATED":
        assert time.monotonic() < deadline, "it was not given back"
        time.sleep(0.2)
        give_back_abandoned()
    assert states()["killed"] == "REMOVED"
    give_back_abandoned()
    assert states()["alive"] == "CREATED"
    assert states()["of this process"] != "REMOVED"
