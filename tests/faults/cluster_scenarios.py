"""Faults of clusters: nodes, the head, all of it, and the network between its hosts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.disturbed import EVAL_EVERY, Disturbed
from tests.faults.scenarios import Bench, Outcome, Run
from tests.support.hosts import Hosts
from tests.support.ray_clusters import RayCluster
from tests.support.s3 import S3

_PATIENCE_S = 180.0
"""For Ray to see that a node is gone, and for that node to end."""


class OnHost(Disturbed):
    """Gives the sweep's command on a host."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        super().__init__(folder)
        self._hosts = hosts
        self.host = "head"
        """Where the next command is given."""

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`orpo-ray ARGUMENTS` there."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        environment |= {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"} | self.environment
        command = (sys.executable, "-m", "orpo_ray.cli", *arguments)
        with (self.folder / "output.log").open("a", encoding="utf-8") as output:
            streams = {"stdout": output, "stderr": output}
            process = self._hosts.start(self.host, *command, env=environment, cwd=self.folder, **streams)
        self._started.append(process)
        return process


@dataclass
class HostRun(Run):
    """A disturbed sweep whose command is given on a host."""

    hosts: Hosts | None = None

    @cached_property
    def sweeps(self) -> Disturbed:
        assert self.hosts is not None
        return OnHost(self.bench.folder / self.name, self.hosts)


@contextmanager
def hosts_called(*names: str) -> Iterator[Hosts]:
    """Hosts in network namespaces.

    Raises:
        PermissionError: they cannot be made here.
    """
    try:
        made = Hosts(*names)
    except pytest.skip.Exception as reason:
        raise PermissionError(str(reason)) from None
    with made as hosts:
        yield hosts


@contextmanager
def cluster_of(
    folder: Path, hosts: Hosts | None = None, head: str = "head", nodes: Sequence[str] = ("", ""), **environment: str
) -> Iterator[RayCluster]:
    """A head without CPUs, and nodes with one each.

    Args:
        folder: for logs.
        hosts: where nodes are; by default all on loopback.
        head: the head's host.
        nodes: the host of each other node.
        environment: further variables of all their processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cluster = RayCluster(folder, auth=False, num_cpus=0, hosts=hosts, head=head, **environment)
    try:
        for host in nodes:
            cluster.add_node(num_cpus=1, host=host)
        yield cluster
    finally:
        cluster.close()


def node_of_rank(run: Run, cluster: RayCluster, rank: int) -> Any:
    """The `ray start` of the node that a rank of the latest group trains on."""
    started = [e for e in run.sweeps.events(run.name) if e["event"] == "started"][-1]
    above = {p.pid for p in psutil.Process(int(started["processes"][rank].rpartition(":")[2])).parents()}
    (node,) = [node for node in cluster.nodes if node.pid in above]
    return node


def node_removed(bench: Bench) -> Outcome:
    """Every process of a node that trains is killed; there is another one to go on with."""
    with Run(bench, "node_removed") as run, cluster_of(run.sweeps.folder / "ray", nodes=["", "", ""]) as cluster:
        run.sweeps.environment = {"RAY_ADDRESS": cluster.address}
        process = run.start()
        run.sweeps.reached(run.name, 6)
        run.when.append(time.time())
        cluster.kill_node(node_of_rank(run, cluster, 1))
        run.complete(process)
        return run.outcome()


def head_restarted(bench: Bench) -> Outcome:
    """The head dies, and the command that runs on it; a new head is up while the old one's nodes still train."""
    with Run(bench, "head_restarted") as run, cluster_of(run.sweeps.folder / "before") as before:
        run.sweeps.environment = {"RAY_ADDRESS": before.address}
        process = run.start()
        run.sweeps.reached(run.name, 6)
        run.when.append(time.time())
        run.sweeps.kill(process)
        head, *others = before.nodes
        before.kill_node(head)
        with cluster_of(run.sweeps.folder / "after") as after:
            run.sweeps.environment = {"RAY_ADDRESS": after.address}
            run.complete(run.start())
            give_up = run.when[-1] + _PATIENCE_S
            while any(node.poll() is None for node in others) and time.time() < give_up:
                time.sleep(0.5)
            return run.outcome(**{"its nodes ended by themselves": all(node.poll() is not None for node in others)})


def cluster_restarted(bench: Bench) -> Outcome:
    """Every machine is gone; a new cluster, on machines that have nothing, goes on with what is in the object store."""
    names = ("head", "one", "two")
    with (
        hosts_called(*names, "new-head", "new-one", "new-two") as hosts,
        HostRun(bench, "cluster_restarted", hosts=hosts) as run,
    ):
        store = S3(run.sweeps.folder, address=hosts.outside)
        try:
            # A database that outlives the cluster stands for an MLflow server.
            run.database = run.sweeps.folder / "mlflow.db"
            run.settings |= {"storage": store.uri, "tracking.uri": f"sqlite:///{run.database}"}
            run.settings["data.cache_dir"] = str(run.sweeps.folder / "runs" / "cache")
            assert isinstance(run.sweeps, OnHost)
            with cluster_of(run.sweeps.folder / "before", hosts, *_places(names), **store.environment) as before:
                run.sweeps.environment = {"RAY_ADDRESS": before.address, **store.environment}
                run.start()
                _is_kept(run, store)
                run.when.append(time.time())
                for name in names:
                    hosts.kill_host(name)
            shutil.rmtree(run.sweeps.folder / "runs")
            run.sweeps.host = "new-head"
            places = _places(("new-head", "new-one", "new-two"))
            with cluster_of(run.sweeps.folder / "after", hosts, *places, **store.environment) as after:
                run.sweeps.environment = {"RAY_ADDRESS": after.address, **store.environment}
                run.complete(run.start())
            return _from_a_checkpoint(run.outcome())
        finally:
            store.stop()


def _places(names: Sequence[str]) -> tuple[str, Sequence[str]]:
    return names[0], names[1:]


def partition(bench: Bench) -> Outcome:
    """A host that trains is off the network until Ray gives it up; back again, its node has to be started anew."""
    with (
        hosts_called("head", "one", "two") as hosts,
        HostRun(bench, "partition", hosts=hosts) as run,
        _in_store(run, hosts) as (store, cluster),
    ):
        process = run.start()
        _is_kept(run, store)
        run.when.append(time.time())
        hosts.cut("two")
        run.sweeps.wait_until(lambda: len(cluster.alive_nodes()) == 2, "the node is given up", _PATIENCE_S)
        given_up_s = time.time() - run.when[-1]
        hosts.heal("two")
        node = cluster.nodes[2]
        run.sweeps.wait_until(lambda: node.poll() is not None, "the node that was given up ends", _PATIENCE_S)
        cluster.add_node(num_cpus=1, host="two")
        run.complete(process)
        return _from_a_checkpoint(run.outcome(**{"seconds until Ray gave the node up": round(given_up_s, 1)}))


def short_partition(bench: Bench) -> Outcome:
    """A host that trains is off the network for 20 s, too short for Ray to give it up. Training goes on where it was;
    Ray Train may start the group anew even so, because it could not reach a worker."""
    with (
        hosts_called("head", "one", "two") as hosts,
        HostRun(bench, "short_partition", hosts=hosts) as run,
        _in_store(run, hosts) as (store, _),
    ):
        process = run.start()
        _is_kept(run, store)
        run.when.append(time.time())
        hosts.cut("two")
        time.sleep(20)
        hosts.heal("two")
        run.complete(process)
        return run.outcome()


@contextmanager
def _in_store(run: Run, hosts: Hosts) -> Iterator[tuple[S3, RayCluster]]:
    """A cluster on three hosts for a sweep in an object store, which is on none of them."""
    store = S3(run.sweeps.folder, address=hosts.outside)
    try:
        with cluster_of(run.sweeps.folder / "ray", hosts, nodes=["one", "two"], **store.environment) as cluster:
            run.settings["storage"] = store.uri
            run.sweeps.environment = {"RAY_ADDRESS": cluster.address, **store.environment}
            yield store, cluster
    finally:
        store.stop()


def _is_kept(run: Run, store: S3) -> None:
    """Wait until training is past its first checkpoint and that one is in the store: both go on by themselves."""
    run.sweeps.reached(run.name, EVAL_EVERY + 1)
    manifest = f"{run.name}/trials/00000/step-{EVAL_EVERY:08d}/manifest.json"
    run.sweeps.wait_until(lambda: store.has(manifest), manifest)


def _from_a_checkpoint(outcome: Outcome) -> Outcome:
    from_checkpoints = {"continued from checkpoints": all(step > 0 for step in outcome.damage.continued_from)}
    return replace(outcome, notes=outcome.notes | from_checkpoints)


CLUSTER_SCENARIOS: Sequence[tuple[str, Callable[[Bench], Outcome]]] = (
    ("node removed", node_removed),
    ("head node killed, and a new one started", head_restarted),
    ("whole cluster killed, and a new one started", cluster_restarted),
    ("network partition, until Ray gives the host up", partition),
    ("network partition of 20 s", short_partition),
)
"""As `scenarios.SCENARIOS`."""
