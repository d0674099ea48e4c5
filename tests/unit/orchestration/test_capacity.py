import pytest

from orpo_ray.config import ScalingConfig
from orpo_ray.orchestration.capacity import Resources, fits, most_groups

TWO_CPUS = [{"CPU": 2.0}]
GPU_NODES = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}]


def cpu(workers: int, cpus: int = 1) -> Resources:
    return Resources(workers, cpus, 0)


def gpu(workers: int, cpus: int = 1) -> Resources:
    return Resources(workers, cpus, 1)


@pytest.mark.parametrize(
    ("requests", "nodes", "possible"),
    [
        ([cpu(2)], TWO_CPUS, True),
        ([cpu(3)], TWO_CPUS, False),
        ([cpu(1), cpu(1)], TWO_CPUS, True),
        ([cpu(1), cpu(2)], TWO_CPUS, False),
        ([cpu(1, cpus=2)], [{"CPU": 1.0}, {"CPU": 1.0}], False),  # a worker is not cut over nodes
        ([cpu(2)], [{"CPU": 1.0}, {"CPU": 1.0}], True),  # a group is
        ([gpu(8)], GPU_NODES, True),
        ([gpu(8), gpu(1)], GPU_NODES, False),
        ([gpu(4, cpus=2), cpu(8)], GPU_NODES, True),
        ([gpu(1)], TWO_CPUS, False),
        ([cpu(4, cpus=1), cpu(1, cpus=3)], [{"CPU": 4.0}, {"CPU": 3.0}], True),  # the widest is placed first
    ],
)
def test_fits(requests: list[Resources], nodes: list[dict[str, float]], possible: bool) -> None:
    assert fits(requests, nodes) is possible


def test_most_groups_counts_the_smallest() -> None:
    assert most_groups([cpu(2), cpu(1)], TWO_CPUS) == 2
    assert most_groups([cpu(2)], TWO_CPUS) == 1
    assert most_groups([gpu(2)], GPU_NODES) == 4
    assert most_groups([cpu(3)], TWO_CPUS) == 0


def test_use_gpu_auto_follows_the_cluster() -> None:
    assert Resources.of(ScalingConfig(), cluster_has_gpus=True) == Resources(1, 1, 1)
    assert Resources.of(ScalingConfig(), cluster_has_gpus=False) == Resources(1, 1, 0)
    assert Resources.of(ScalingConfig(use_gpu=False), cluster_has_gpus=True) == Resources(1, 1, 0)
    assert Resources.of(ScalingConfig(use_gpu=True), cluster_has_gpus=False) == Resources(1, 1, 1)


def test_a_lane_is_what_is_occupied() -> None:
    assert cpu(2).resource_class != cpu(1).resource_class != gpu(1).resource_class
    assert cpu(2, cpus=3).resource_class == "2x3cpu0gpu"
