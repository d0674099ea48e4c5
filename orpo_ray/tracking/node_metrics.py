"""How busy the nodes of a sweep are: an actor on each samples with MLflow's own monitors, the driver collects."""

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
            except (ImportError, RuntimeError):  # no GPU of this make, or no library that asks it
                continue
        self.sample()  # the first CPU utilisation is of no time at all,
        time.sleep(_SETTLING_S)  # and one right after it of next to none

    def sample(self) -> dict[str, float]:
        """What MLflow calls it -> value: percentages, megabytes, watts. CPU utilisation is since the last sample."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {name: float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values


class ClusterMonitor:
    """A `NodeMonitor` on every node that is alive, asked every 10 s; `tick` never waits and never fails for a node.

    Nodes are numbered in the order in which they are seen, the head node first. A sweep that ends within the first
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
        self._asked: dict[str, Any] = {}  # node -> answer that is on its way
        self._fresh: dict[str, float] = {}
        self._untold: set[str] = set()  # nodes with GPUs of which nothing has been heard

    def tick(self) -> dict[str, float]:
        """What the nodes answered since the last call, all together; asks them again when it is time.

        Returns:
            `system/node_<i>/<what>` -> value, the keys of which MLflow's UI draws charts per node.
        """
        self._gather()
        is_due = time.monotonic() >= self._due_at
        if self._asked and not is_due:
            return {}  # one node is slower than the others
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
            except RayError as error:  # the node is gone, or going
                log.info("no system metrics of node %d: %s", self._numbers[node], error)
                self._actors.pop(node, None)
                continue
            if node in self._untold and not any(name.startswith("gpu_") for name in sample):
                log.warning("no metrics of the GPUs of node %d: install nvidia-ml-py there", self._numbers[node])
            self._untold.discard(node)
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
                    self._untold.add(node)
                self._actors[node] = ray.remote(num_cpus=0, scheduling_strategy=there)(NodeMonitor).remote()
            if node not in self._asked:
                self._asked[node] = self._actors[node].sample.remote()
        for node in self._actors.keys() - {info["NodeID"] for info in alive}:
            del self._actors[node]
