"""Reasons why a planned sweep would not run, or would not do what its file asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orpo_ray.config import AshaConfig, MedianConfig, SweepConfig
from orpo_ray.formatting import byte_size, gib
from orpo_ray.hardware import NodeMemory
from orpo_ray.planning.fit import SAFETY, workers_on
from orpo_ray.planning.sizes import Size


@dataclass(frozen=True, slots=True)
class Problem:
    """Something to know before the sweep is started."""

    kind: Literal["error", "warning"]
    """An error keeps trials from running; a warning does not."""
    text: str
    """The problem, its reason, and what to do."""


def without_room(sizes: list[Size], sweep: SweepConfig, node: NodeMemory) -> list[Problem]:
    """Sizes that lack devices or memory, alone or together."""
    found = [problem for size in sizes if (problem := _without_room(size, sweep, node))]
    apart = [
        f"{a.label} and {b.label}"
        for number, a in enumerate(sizes)
        for b in sizes[number + 1 :]
        if a.at_once and b.at_once and not _fit_together(a, b, node)
    ]
    if apart and sweep.max_concurrent != 1:
        found.append(
            Problem(
                "warning",
                f"{'; '.join(apart)} have no room at the same time: they train in turn, and at each switch the worker "
                "groups of one must end before those of the other start",
            )
        )
    return found


def _without_room(size: Size, sweep: SweepConfig, node: NodeMemory) -> Problem | None:
    name, on_gpu = size.label or "a trial", size.gpus_per_worker > 0
    if not size.at_once:
        return Problem(
            "error",
            f"{name} needs {size.num_workers} workers × {size.cpus_per_worker} CPU and {size.gpus_per_worker} "
            f"GPU, but the cluster has {node.cpus} CPU and {node.gpus} GPU: it would wait for ever",
        )
    if on_gpu and (size.memory is None or not node.gpu_memory_bytes):
        return Problem("warning", f"{name}: give --gpu-memory-gib to check that it fits the GPU")
    if size.memory is None:
        return None
    holds = workers_on(node, size.memory, size.cpus_per_worker, on_gpu)
    wanted = min(size.at_once, sweep.max_concurrent or size.at_once, size.trials or size.at_once)
    each, has = f"{gib(size.memory.peak)} each", gib(node.memory_bytes)
    if on_gpu:
        each = f"{gib(size.memory.peak)} of GPU and {gib(size.memory.host)} of host memory each"
        has = f"{gib(node.gpu_memory_bytes)} per GPU and {has}"
    if holds < size.num_workers:
        return Problem(
            "error",
            f"{name} does not fit in memory: {size.num_workers} workers take {each}, and {SAFETY:.0%} of {has} may be "
            "filled; use scaling: auto, model.gradient_checkpointing, model.lora or a smaller "
            "train.max_tokens_per_micro_batch",
        )
    if holds < wanted * size.num_workers:
        at_once = holds // size.num_workers
        return Problem(
            "error",
            f"{name}: {wanted} trials would train at once, but memory holds {at_once} ({size.num_workers} workers per "
            f"trial take {each}, and {SAFETY:.0%} of {has} may be filled): use scaling: auto, or "
            f"sweep.max_concurrent={at_once}",
        )
    return None


def _fit_together(a: Size, b: Size, node: NodeMemory) -> bool:
    cpus = sum(size.num_workers * size.cpus_per_worker for size in (a, b))
    return cpus <= node.cpus and sum(size.num_workers * size.gpus_per_worker for size in (a, b)) <= node.gpus


def without_effect(sizes: list[Size], sweep: SweepConfig) -> list[Problem]:
    """A scheduler that can stop no trial, or a budget that cannot pay for one."""
    found = []
    fewest = min((size.trials for size in sizes if size.trials is not None), default=None)
    match sweep.scheduler:
        case AshaConfig(reduction_factor=needed):
            what = "asha keeps one in"
        case MedianConfig(min_trials=needed):
            what = "median compares with at least"
        case _:
            needed, what = 0, ""
    if fewest is not None and fewest < needed:
        found.append(
            Problem(
                "warning",
                f"{what} {needed:g} trials of a size, but a size has only {fewest}: no trial would be stopped early",
            )
        )
    cheapest = min(
        (size.seconds_per_trial * size.num_workers / 3600 for size in sizes if size.seconds_per_trial is not None),
        default=None,
    )
    if sweep.budget is not None and cheapest is not None and cheapest > sweep.budget.device_hours:
        found.append(
            Problem(
                "error",
                f"sweep.budget of {sweep.budget.device_hours:g} device-hours is below one trial of the cheapest size "
                f"({cheapest:.2g}): raise it, or shorten trials",
            )
        )
    return found


def without_disk(needed: int | None, free: int, folder: Path) -> list[Problem]:
    """Checkpoints that do not fit on the disk. Sizes are in bytes; `needed` is None where it is not known."""
    if needed is None or needed <= free:
        return []
    return [
        Problem(
            "error",
            f"checkpoints need {byte_size(needed)}, but {folder} has {byte_size(free)} free: choose another "
            "output_dir, use model.lora, or fewer trials",
        )
    ]
