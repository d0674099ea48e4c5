"""Checks before a sweep starts: GPUs, room for each model size, and folders that all nodes share."""

from __future__ import annotations

import ray

from orpo_ray.config import ExperimentConfig, SweepConfig
from orpo_ray.errors import UserError
from orpo_ray.orchestration.capacity import Capacity, Resources


class SweepError(UserError, RuntimeError):
    """The sweep cannot start here; the message says why and what to do."""


def resolve_use_gpu(config: ExperimentConfig, sweep: SweepConfig, capacity: Capacity) -> bool:
    """Whether `scaling.use_gpu: auto` means GPUs on this cluster.

    Raises:
        SweepError: it is unknown whether the cluster could add GPUs.
    """
    asks = any(request != other for request, other in zip(*_with_and_without_gpus(config, sweep), strict=True))
    if asks and capacity.has_gpus is None:
        raise SweepError(
            f"scaling.use_gpu is auto, but {capacity.describe()} whose limits are unknown, so it may or may not add "
            "GPUs: set scaling.use_gpu to true or false"
        )
    return bool(capacity.has_gpus)


def _with_and_without_gpus(config: ExperimentConfig, sweep: SweepConfig) -> tuple[list[Resources], list[Resources]]:
    with_gpus, without = (group_resources(config, sweep, has_gpus).values() for has_gpus in (True, False))
    return list(with_gpus), list(without)


def group_resources(config: ExperimentConfig, sweep: SweepConfig, has_gpus: bool) -> dict[str, Resources]:
    """Bundle label (`""` without a bundle axis) -> resources of a worker group."""
    axis = sweep.bundle_axis
    if axis is None:
        return {"": Resources.of(config.scaling, has_gpus)}
    labels = sweep.space[axis].candidates()
    return {str(label): Resources.of(config.trial({axis: label}).scaling, has_gpus) for label in labels}


def require_room(resources: dict[str, Resources], capacity: Capacity) -> None:
    """Check that a worker group of every bundle fits the cluster.

    Raises:
        SweepError: one would never fit.
    """
    for bundle, request in resources.items():
        if not capacity.could_hold([request]):
            name = f"bundle {bundle}" if bundle else "a trial"
            raise SweepError(
                f"{name} needs {request.num_workers} workers × {request.cpus_per_worker} CPU and "
                f"{request.gpus_per_worker} GPU, but {capacity.describe()}: "
                "it would wait for ever; lower scaling.num_workers or scaling.cpus_per_worker, or add nodes"
            )


def require_shared_folders(config: ExperimentConfig, nodes: list[str]) -> None:
    """Fail if some nodes do not see the run directory.

    Args:
        config: the experiment.
        nodes: ids of nodes that do not see it.

    Raises:
        SweepError: there are such nodes.
    """
    if nodes:
        where = ", ".join(sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] in nodes))
        raise SweepError(
            f"output_dir {config.output_dir}: {config.run_dir} is not visible to {where}; on several nodes it must be "
            "on a file system that all of them mount, or set storage to an object store"
        )
