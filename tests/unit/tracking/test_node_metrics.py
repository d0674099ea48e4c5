"""What a node says of itself; actors on nodes of a cluster: tests/integration/test_mlflow_server.py."""

import time

import psutil
import pytest

from orpo_ray.tracking.node_metrics import NodeMonitor


def test_a_sample_is_of_now_and_of_nothing_before():
    monitor = NodeMonitor()
    first = monitor.sample()
    busy_until = time.monotonic() + 0.3
    while time.monotonic() < busy_until:
        pass
    second = monitor.sample()
    assert second["cpu_utilization_percentage"] > 0.9 * 100 / psutil.cpu_count()  # one core was busy all the time
    memory = psutil.virtual_memory()
    assert second["system_memory_usage_megabytes"] == pytest.approx(memory.used / 1e6, rel=0.2)
    assert second["disk_usage_percentage"] == pytest.approx(psutil.disk_usage("/").percent, abs=1)
    assert second["network_receive_megabytes"] >= first["network_receive_megabytes"] >= 0
    assert first.keys() == second.keys()
