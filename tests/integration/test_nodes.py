"""Sweeps on clusters of several nodes, which come and go: several raylets on this machine, and hosts of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
from ray.cluster_utils import Cluster

from orpo_ray.storage import object_store
from tests.support.hosts import Hosts
from tests.support.ray_clusters import RayCluster
from tests.support.real_sweeps import Sweeps
from tests.support.s3 import S3

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(400)]

SHORT = {
    "train.max_steps": 8,
    "train.eval_every": 4,
    "train.log_every": 1,
    "generation.prompts": 0,
    "tracking.system_metrics": False,
}
THREE = {"metric": "eval/nll", "space": {"optim.lr": {"type": "grid", "values": [1.0e-3, 2.0e-3, 3.0e-3]}}}
ONE = {"metric": "eval/nll", "space": {"optim.lr": {"type": "grid", "values": [1.0e-3]}}}
REFUSED = 2
"""Exit code of a sweep that nothing was started of."""
TWO_RANKS = {"scaling.num_workers": 2, "deepspeed.zero_stage": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, as on a cloud, and two nodes with one each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            started.add_node(num_cpus=1)
        yield started
        started.shutdown()


@pytest.fixture(scope="module")
def sizes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweeps]:
    """A sweep of that name over trials that need one node, and both."""
    sweeps = Sweeps(tmp_path_factory.mktemp("sizes"))
    size = {"type": "bundle", "values": {"one": {"scaling.num_workers": 1}, "both": dict(TWO_RANKS)}}
    space = {"optim.lr": {"type": "grid", "values": [1.0e-3, 2.0e-3]}, "size": size}
    file = sweeps.write("sizes", {"metric": "eval/nll", "space": space}, **SHORT)
    run(sweeps, cluster.address, "sweep", str(file))
    yield sweeps
    sweeps.close()


@pytest.fixture(scope="module")
def undisturbed(sizes: Sweeps) -> dict[str, float]:
    """Final metrics of the trial of two ranks on one machine."""
    params = {"optim.lr": 1.0e-3, "size": "both"}
    (trial,) = [trial for trial in sizes.results("sizes")["trials"] if trial["params"] == params]
    return dict(trial["metrics"])


class FakeCloud:
    """A head node whose autoscaler, Ray's own (version 2), starts raylets of this machine as nodes.

    ray.cluster_utils.AutoscalingCluster needs a file that the wheel lacks, and ends all Ray processes of the user.
    """

    HEAD_ID = "f" * 51 + "00000"
    """With the number of a node at its end, that node's id."""
    HEAD_TYPE = "ray.head.default"  # as the fake provider calls it
    _MARK = "ORPO_RAY_TEST_CLOUD"

    def __init__(self, home: Path, max_nodes: int, quota: int) -> None:
        """Start it, without any node but the head, which has no CPU.

        Args:
            home: made, for the cluster's file: `ray up` leaves it in the home of the head node's user.
            max_nodes: nodes of one CPU that the file allows,
            quota: and that can be had.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.home = home
        home.mkdir()
        given = home / "autoscaler.yaml"
        given.write_text(yaml.safe_dump(self._description(quota)), encoding="utf-8")
        told = yaml.safe_dump(self._description(max_nodes))
        (home / "ray_bootstrap_config.yaml").write_text(told, encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {
            self._MARK: str(home),
            "RAY_AUTH_MODE": "disabled",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": self.HEAD_ID,
            "RAY_CLOUD_INSTANCE_ID": self.HEAD_ID,
            "RAY_NODE_TYPE_NAME": self.HEAD_TYPE,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
        command += [f"--port={self.address.split(':')[1]}", "--node-ip-address=127.0.0.1"]
        command += ["--include-dashboard=false", f"--autoscaling-config={given}"]
        with (home / "ray.log").open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def nodes(self) -> set[str]:
        """Ids of all nodes that ever were."""
        options = GcsClientOptions.create(self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        state = GlobalState()
        state._initialize_global_state(options)
        return {node["NodeID"] for node in state.node_table()}

    def _description(self, max_workers: int) -> dict[str, Any]:
        module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
        provider = {"type": "external", "module": module, "gcs_address": self.address, "head_node_id": self.HEAD_ID}
        provider |= {"use_node_id_as_ip": True, "disable_node_updaters": True, "launch_multiple": True}
        # The provider's nodes would take the head's label, whose environment they have.
        small = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": max_workers}
        small |= {"labels": {"ray.io/node-group": "small"}}
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        steps = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        return {
            "cluster_name": "fake",
            "max_workers": max_workers,
            "provider": provider,
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "idle_timeout_minutes": 1.0,
            "available_node_types": {self.HEAD_TYPE: head, "small": small},
            "head_node_type": self.HEAD_TYPE,
            **{f"{step}_commands": [] for step in steps},
        }

    def close(self) -> None:
        """End all processes of the cluster: those with its mark."""
        mine = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(self._MARK) == str(self.home):
                    mine.append(process)
            except psutil.Error:
                continue
        for process in mine:
            process.kill()
        psutil.wait_procs(mine, timeout=30)
        self._process.wait(30)


def run(sweeps: Sweeps, address: str, *arguments: str, code: int = 0, **environment: str) -> str:
    """`orpo-ray ARGUMENTS` on a cluster, to its end."""
    process = sweeps.start(*arguments, env={"RAY_ADDRESS": address, **environment})
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def run_on(hosts: Hosts, name: str, *command: str, code: int = 0, **environment: str) -> str:
    """The same on a host, whose node is the head."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    environment = inherited | {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"} | environment
    arguments = (sys.executable, "-m", "orpo_ray.cli", *command)
    process = hosts.start(name, *arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return str(output)


def words(output: str) -> str:
    """As one line."""
    return " ".join(output.split())


def nodes_of(run_dir: Path) -> dict[str, dict[int, str]]:
    """Trial -> rank -> the node it trained on, by the workers' logs."""
    found: dict[str, dict[int, str]] = {}
    for file in (run_dir / "logs").glob("*.jsonl"):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if "trial_id" in line:
                found.setdefault(line["trial_id"], {})[line["rank"]] = line["node"]
    return found


def most_at_once(events: list[dict[str, Any]]) -> int:
    """Workers that were in a trial at the same time, at most."""
    most, workers = 0, {}
    for event in events:
        if event["event"] == "started":
            workers[event["trial_id"]] = event["devices"]
            most = max(most, sum(workers.values()))
        elif event["event"] == "finished":
            workers.pop(event["trial_id"], None)
    return most


def test_trials_of_different_sizes_are_placed_where_there_is_room(cluster: Cluster, sizes: Sweeps) -> None:
    trials = sizes.results("sizes")["trials"]
    assert [trial["status"] for trial in trials] == ["finished"] * 4
    assert most_at_once(sizes.events("sizes")) == 2
    workers = {node.node_id for node in cluster.worker_nodes}
    placed = nodes_of(sizes.folder / "runs" / "sizes")
    for trial in trials:
        nodes = placed[trial["trial_id"]]
        assert set(nodes) == ({0, 1} if trial["bundle"] == "both" else {0})
        assert set(nodes.values()) <= workers
        assert len(set(nodes.values())) == len(nodes)  # a node of its own for each rank


def test_an_autoscaler_adds_the_nodes_that_trials_wait_for(sweeps: Sweeps, tmp_path: Path) -> None:
    """Three are promised and two can be had: a group may still wait for the third one when all trials have ended."""
    cloud = FakeCloud(tmp_path / "home", max_nodes=3, quota=2)
    try:
        too_large = sweeps.write("too_large", THREE, **SHORT, **{"scaling.num_workers": 4})
        output = run(sweeps, cloud.address, "sweep", str(too_large), code=REFUSED, HOME=str(cloud.home))
        assert "a trial needs 4 workers × 1 CPU and 0 GPU, but the cluster has 0 CPU and 0 GPU on 1 nodes" in output
        assert "and may add 3 nodes of 1 CPU and 0 GPU: it would wait for ever" in output
        assert not (sweeps.folder / "runs").exists() or not any((sweeps.folder / "runs").iterdir())

        file = sweeps.write("grows", THREE, **SHORT | {"train.max_steps": 24})
        run(sweeps, cloud.address, "sweep", str(file), HOME=str(cloud.home))
        assert [trial["status"] for trial in sweeps.results("grows")["trials"]] == ["finished"] * 3
        placed = nodes_of(sweeps.folder / "runs" / "grows")
        used = {node for by_rank in placed.values() for node in by_rank.values()}
        added = {cloud.HEAD_ID[:-1] + number for number in "12"}
        assert cloud.nodes() == {cloud.HEAD_ID, *added}
        assert used
        assert used <= added
    finally:
        cloud.close()


def test_a_trial_goes_on_when_its_node_is_gone(cluster: Cluster, sweeps: Sweeps, undisturbed: dict[str, float]) -> None:
    cluster.add_node(num_cpus=1)
    nodes = set(cluster.worker_nodes)
    file = sweeps.write("removed", ONE, **SHORT, **TWO_RANKS)
    process = sweeps.start("sweep", str(file), env={"RAY_ADDRESS": cluster.address})
    sweeps.wait_for("removed", "log", step=5)
    logs = sweeps.folder / "runs" / "removed"
    before = nodes_of(logs)["00000"]
    gone = next(node for node in nodes if node.node_id == before[1])
    cluster.remove_node(gone, allow_graceful=False)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    (trial,) = sweeps.results("removed")["trials"]
    assert trial["metrics"] == pytest.approx(undisturbed, rel=1e-5)
    events = sweeps.events("removed")
    assert [e["step"] for e in events if e["event"] == "log"] == list(range(1, 9))
    first, *_, last = [e for e in events if e["event"] == "started"]
    assert first["step"] == 0
    assert last["step"] == 4  # the checkpoint
    assert set(nodes_of(logs)["00000"].values()) == {node.node_id for node in nodes} - {gone.node_id}


def test_hosts_that_share_nothing_but_an_object_store(tmp_path: Path, undisturbed: dict[str, float]) -> None:
    """A trial cut over two hosts by ZeRO-3; nobody but the head sees the run directory."""
    sweeps, runs, names = Sweeps(tmp_path), tmp_path / "runs", ("head", "one", "two")
    runs.mkdir()
    of_head = tmp_path / "runs.head"
    with Hosts(*names, private={name: [runs] for name in names}) as hosts:
        store = S3(tmp_path, address=hosts.outside)
        cluster = RayCluster(tmp_path, auth=False, num_cpus=0, hosts=hosts, **store.environment)
        try:
            for name in names[1:]:
                cluster.add_node(num_cpus=1, host=name)
            aware = {"RAY_ADDRESS": cluster.address, **store.environment}
            file = sweeps.write("local", ONE, **SHORT, **TWO_RANKS)
            output = run_on(hosts, "head", "sweep", str(file), code=REFUSED, **aware)
            blind = (
                f"is not visible to {hosts.address('one')}, {hosts.address('two')}; on several nodes it must be on a"
            )
            assert blind in words(output)
            assert not any(of_head.iterdir())

            file = sweeps.write("kept", ONE, **SHORT, **TWO_RANKS)
            run_on(hosts, "head", "sweep", str(file), f"storage={store.uri}", **aware)
            objects = objects_of(store, "kept")
        finally:
            cluster.close()
            store.stop()
    (trial,) = json.loads((of_head / "kept" / "results.json").read_text(encoding="utf-8"))["trials"]
    assert trial["metrics"] == pytest.approx(undisturbed, rel=1e-5)
    assert trial["checkpoint"] == f"{store.uri}/kept/trials/00000/step-00000008"
    for step in (4, 8):
        folder = f"trials/00000/step-{step:08d}"
        written = {name.removeprefix(f"{folder}/") for name in objects if name.startswith(folder)}
        shards = {
            f"engine/zero_pp_rank_{rank}_mp_rank_00_{part}_states.pt" for rank in (0, 1) for part in ("model", "optim")
        }
        assert written == {*shards, "manifest.json", "random-rank-0.pt", "random-rank-1.pt"}
    journal = b"".join(objects[name] for name in sorted(objects) if name.startswith("journal/"))
    assert journal == (of_head / "kept" / "events.jsonl").read_bytes()
    (started,) = [e for e in map(json.loads, journal.splitlines()) if e["event"] == "started"]
    assert sorted(process.partition(":")[0] for process in started["processes"]) == ["one", "two"]
    assert any(name.startswith("groups/") for name in objects)  # Ray Train's
    kept = {name: content for name, content in objects.items() if name.startswith("logs/")}
    last = [json.loads(content.splitlines()[-1]) for _, content in sorted(kept.items())]
    assert [(line["trial_id"], line["rank"], line["message"]) for line in last] == [
        ("00000", rank, "the trial is finished at step 8") for rank in (0, 1)
    ]
    assert {line["host"] for line in last} == {"one", "two"}
    for name, content in kept.items():
        assert (of_head / "kept" / name).read_bytes() == content
    assert [path.name for path in (tmp_path / "runs.one").iterdir()] == []


def objects_of(store: S3, name: str) -> dict[str, bytes]:
    """Every object of a sweep, with what is in it."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in store.environment.items():
            patch.setenv(variable, value)
        object_store._open.cache_clear()
        try:
            sweep = object_store.Storage(f"{store.uri}/{name}", patience_s=5.0)
            return {file: sweep.read(file) or b"" for file in sweep.list()}
        finally:
            object_store._open.cache_clear()
