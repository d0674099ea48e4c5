"""Work besides training: on the cluster's workers, as much of it at once as they have room for, and kept on disk.

The head node of a cluster may have no GPU, and a driver there does not see the workers'.
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
"""Of a task whose process was lost; Ray begins it again and hands on the parts that are missing."""


class TaskError(UserError, RuntimeError):
    """A task was lost with its process, or Ray could not begin it; the message says which one, and what to do."""


@dataclass(frozen=True, slots=True)
class Task:
    """Something to compute once."""

    name: str
    """Of the file that keeps it."""
    title: str
    """For the progress bar."""
    asked: Any
    """JSON: what the outcome depends on. It is computed again where this has changed."""
    parts: Callable[..., Iterator[tuple[int, Any]]]
    """Runs on a worker and yields, part by part, units done and what came out."""
    arguments: tuple[Any, ...]
    """Of `parts`; paths must be those of a file system that the workers share with this process."""
    units: int
    """Over all parts."""
    joined: Callable[[list[Any]], Any]
    """From what came out of the parts to JSON."""
    uses_gpu: bool = True
    """False: it computes on CPUs wherever it runs."""


def run_all(tasks: Sequence[Task], folder: Path, scaling: ScalingConfig, console: Console) -> dict[str, Any]:
    """What the tasks give, as JSON gives it back. Ray must be initialised.

    Args:
        tasks: in the order in which they are begun.
        folder: keeps what was computed.
        scaling: each of them occupies what it gives one worker.
        console: shows a bar for each.

    Raises:
        TaskError: a worker's process died, or its node, or Ray could not begin it.
        Exception: whatever a task raises. Either is raised when the others have ended, and what they gave is kept.
    """
    missing = [task for task in tasks if not _is_kept(task, folder)]
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
    if gpus and not task.uses_gpu:  # then one CPU would be too few, and there are more where GPUs are
        cpus, gpus = max(1, int(max(node.get("CPU", 0) for node in cluster.nodes.values())) // 2), 0
    options: dict[str, Any] = {"num_returns": "streaming", "num_cpus": cpus, "num_gpus": gpus, "max_retries": _RETRIES}
    if not gpus and any(node.get("GPU", 0) for node in cluster.nodes.values()):
        # Ray leaves them visible to a task that has asked for none.
        options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    return ray.remote(**options)(task.parts).remote(*task.arguments)


def _failure(task: Task, error: RayError) -> Exception:
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error.cause.__cause__ = error  # whose text has the worker's traceback
        return error.cause
    told = TaskError(
        f"{task.title}: {type(error).__name__}: {error!s:.300}; what other tasks gave is kept, and the same command "
        "begins this one again"
    )
    told.__cause__ = error
    return told


def _file(task: Task, folder: Path) -> Path:
    return folder / f"{task.name}.json"


def _read(task: Task, folder: Path) -> dict[str, Any]:
    return dict(json.loads(_file(task, folder).read_text(encoding="utf-8")))


def _is_kept(task: Task, folder: Path) -> bool:
    return _file(task, folder).exists() and _read(task, folder)["asked"] == json.loads(json.dumps(task.asked))


def _keep(task: Task, folder: Path, found: Any) -> None:
    write_results(_file(task, folder), {"asked": task.asked, "found": found})
