"""Cached remote tasks (sampling, scoring), run in parallel on Ray workers.

Tasks do not run in the driver, because a cluster's head node may have no GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from rich.console import Console
from rich.progress import Progress

from orpo_ray.config import ScalingConfig
from orpo_ray.errors import UserError
from orpo_ray.orchestration.capacity import Capacity, Resources, snapshot
from orpo_ray.storage.run_dir import write_results

_RETRIES = 2
"""Retries of a task whose process was lost; Ray restarts it and passes on the missing parts."""


class TaskError(UserError, RuntimeError):
    """A task was lost with its process, or Ray could not start it; the message names the task and what to do."""


@dataclass(frozen=True, slots=True)
class Task:
    """A computation whose result is cached in a file."""

    name: str
    """Name of the file that keeps the result, without suffix."""
    title: str
    """Label of its progress bar."""
    asked: Any
    """Cache key, as JSON: everything that the result depends on."""
    parts: Callable[..., Iterator[tuple[int, Any]]]
    """Runs on a worker and yields (units done, partial result) for each part."""
    arguments: tuple[Any, ...]
    """Arguments of `parts`; paths must be on a file system that the workers share with this process."""
    units: int
    """Total units of all parts, for the progress bar."""
    joined: Callable[[list[Any]], Any]
    """Combines the partial results into the JSON result."""
    uses_gpu: bool = True
    """False for a task that computes on CPUs everywhere."""


def run_all(tasks: Sequence[Task], folder: Path, scaling: ScalingConfig, console: Console) -> dict[str, Any]:
    """Run the tasks that are not cached. Returns task name -> result, as read back from JSON. Ray must be initialised.

    Args:
        tasks: in the order in which they are started.
        folder: of the cached results.
        scaling: each task gets the resources of one worker.
        console: shows a progress bar for each task.

    Raises:
        TaskError: a worker's process or node died, or Ray could not start a task.
        Exception: an error that a task raised. Errors are raised after all other tasks have ended and been cached.
    """
    missing = [task for task in tasks if not _is_cached(task, folder)]
    cluster = snapshot()
    streams = {_started(task, scaling, cluster): task for task in missing}
    done: dict[str, list[Any]] = {task.name: [] for task in missing}
    failures: list[Exception] = []
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bars = {task.name: progress.add_task(task.title, total=task.units) for task in missing}
            while streams:
                (stream, *_), _ = ray.wait(list(streams), num_returns=1)
                task = streams[stream]
                try:
                    units, part = ray.get(next(stream))
                except StopIteration:
                    del streams[stream]
                    _keep(task, folder, task.joined(done[task.name]))
                    console.print(f"{task.title}: done", soft_wrap=True)
                except RayError as error:
                    del streams[stream]
                    failures.append(_failure(task, error))
                    console.print(f"{task.title}: failed: {failures[-1]}", style="red", markup=False, soft_wrap=True)
                else:
                    done[task.name].append(part)
                    progress.advance(bars[task.name], units)
    finally:
        for stream in streams:  # interrupted
            ray.cancel(stream)
    if failures:
        raise failures[0]
    return {task.name: _read(task, folder)["found"] for task in tasks}


def _started(task: Task, scaling: ScalingConfig, cluster: Capacity) -> Any:
    needs = Resources.of(scaling, bool(cluster.has_gpus))
    cpus, gpus = needs.cpus_per_worker, needs.gpus_per_worker
    if gpus and not task.uses_gpu:  # one CPU would be too few, and nodes with GPUs have more
        cpus, gpus = max(1, int(max(node.get("CPU", 0) for node in cluster.nodes.values())) // 2), 0
    options: dict[str, Any] = {"num_returns": "streaming", "num_cpus": cpus, "num_gpus": gpus, "max_retries": _RETRIES}
    if not gpus and any(node.get("GPU", 0) for node in cluster.nodes.values()):
        # Ray leaves GPUs visible to a task that has requested none.
        options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    return ray.remote(**options)(task.parts).remote(*task.arguments)


def _failure(task: Task, error: RayError) -> Exception:
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error.cause.__cause__ = error  # its text has the worker's traceback
        return error.cause
    told = TaskError(
        f"{task.title}: {type(error).__name__}: {error!s:.300}; results of other tasks are kept, and the same command "
        "restarts this one"
    )
    told.__cause__ = error
    return told


def _file(task: Task, folder: Path) -> Path:
    return folder / f"{task.name}.json"


def _read(task: Task, folder: Path) -> dict[str, Any]:
    return dict(json.loads(_file(task, folder).read_text(encoding="utf-8")))


def _is_cached(task: Task, folder: Path) -> bool:
    return _file(task, folder).exists() and _read(task, folder)["asked"] == json.loads(json.dumps(task.asked))


def _keep(task: Task, folder: Path, found: Any) -> None:
    write_results(_file(task, folder), {"asked": task.asked, "found": found})
