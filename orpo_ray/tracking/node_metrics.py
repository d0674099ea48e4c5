"""System metrics of a sweep's nodes, sampled by an actor on each node with MLflow's own monitors."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger(__name__)

_INTERVAL_S, _SETTLING_S = 10.0, 0.5


class NodeMonitor:
    """Samples the node it runs on: CPU, memory, disk, network since it began, and GPUs where there are any."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
        from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        for monitor in (GPUMonitor, ROCMMonitor):
            try:
                self._monitors.append(monitor())
            except (ImportError, RuntimeError):  # no GPU of this vendor, or its library is missing
                continue
        # CPU utilisation is measured since the last sample: take a first one, and wait so that the next is meaningful.
        self.sample()
        time.sleep(_SETTLING_S)

    def sample(self) -> dict[str, float]:
        """MLflow's metric name -> value in percent, megabytes or watts. CPU utilisation is since the last call."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {name: float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values


class ClusterMonitor:
    """Samples a `NodeMonitor` on every live node every 10 s; `tick` never waits and never fails because of a node.

    Nodes are numbered in the order in which they appear, the head node first. A sweep that ends within the first
    10 s starts no actor.
    """

    def __init__(self, interval_s: float | None = None) -> None:
        """Args:
        interval_s: seconds between samples; by default MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, else 10.
        """
        self._interval_s = interval_s or MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or _INTERVAL_S
        self._due_at = time.monotonic() + self._interval_s
        self._numbers: dict[str, int] = {}
        self._actors: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}  # node -> pending answer
        self._fresh: dict[str, float] = {}
        self._without_gpu_metrics: set[str] = set()  # nodes with GPUs that have not answered yet

    def tick(self) -> dict[str, float]:
        """Collect the nodes' answers since the last call, and request new samples when they are due.

        Returns:
            `system/node_<i>/<metric>` -> value; MLflow's UI draws charts per node from these keys. Empty until all
            nodes have answered or the next sample is due.
        """
        self._gather()
        is_due = time.monotonic() >= self._due_at
        if self._asked and not is_due:
            return {}  # wait for the slower nodes
        found, self._fresh = self._fresh, {}
        if is_due:
            self._due_at = time.monotonic() + self._interval_s
            self._ask()
        return found

    def _gather(self) -> None:
        for node, answer in list(self._asked.items()):
            if not ray.wait([answer], timeout=0)[0]:
                continue
            del self._asked[node]
            try:
                sample = ray.get(answer)
            except RayError as error:  # the node is gone or shutting down
                log.info("no system metrics from node %d: %s", self._numbers[node], error)
                self._actors.pop(node, None)
                continue
            if node in self._without_gpu_metrics and not any(name.startswith("gpu_") for name in sample):
                log.warning("no GPU metrics from node %d: install nvidia-ml-py there", self._numbers[node])
            self._without_gpu_metrics.discard(node)
            prefix = f"system/node_{self._numbers[node]}/"
            self._fresh |= {prefix + name: value for name, value in sample.items()}

    def _ask(self) -> None:
        alive = [node for node in ray.nodes() if node["Alive"]]
        for info in sorted(alive, key=lambda node: "node:__internal_head__" not in node["Resources"]):
            node = info["NodeID"]
            self._numbers.setdefault(node, len(self._numbers))
            if node not in self._actors:
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                if info["Resources"].get("GPU", 0) > 0:
                    self._without_gpu_metrics.add(node)
                self._actors[node] = ray.remote(num_cpus=0, scheduling_strategy=there)(NodeMonitor).remote()
            if node not in self._asked:
                self._asked[node] = self._actors[node].sample.remote()
        for node in self._actors.keys() - {info["NodeID"] for info in alive}:
            del self._actors[node]
