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

from orpo_ray.capacity import Resources
from orpo_ray.config import ScalingConfig
from orpo_ray.results import write_results


class TaskError(RuntimeError):
    """A task was lost with its process; the message says which one, and what to do."""


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


def run_all(tasks: Sequence[Task], folder: Path, scaling: ScalingConfig, console: Console) -> dict[str, Any]:
    """What the tasks give, as JSON gives it back. Ray must be initialised.

    Args:
        tasks: in the order in which they are begun.
        folder: keeps what was computed.
        scaling: each of them occupies what it gives one worker.
        console: shows a bar for each.

    Raises:
        TaskError: a worker's process died, or its node.
        Exception: whatever a task raises.
    """
    needs = Resources.of(scaling, cluster_has_gpus=ray.cluster_resources().get("GPU", 0) > 0)
    missing = [task for task in tasks if not _is_kept(task, folder)]
    streams = {_started(task, needs): task for task in missing}
    done: dict[str, list[Any]] = {task.name: [] for task in missing}
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
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:
                raise TaskError(
                    f"{task.title}: the worker's process was lost ({error!s:.300}); the same command goes on from here"
                ) from error
            else:
                done[task.name].append(part)
                progress.advance(bars[task.name], units)
    return {task.name: _read(task, folder)["found"] for task in tasks}


def _started(task: Task, needs: Resources) -> Any:
    remote = ray.remote(num_returns="streaming", num_cpus=needs.cpus_per_worker, num_gpus=needs.gpus_per_worker)
    return remote(task.parts).remote(*task.arguments)


def _file(task: Task, folder: Path) -> Path:
    return folder / f"{task.name}.json"


def _read(task: Task, folder: Path) -> dict[str, Any]:
    return dict(json.loads(_file(task, folder).read_text(encoding="utf-8")))


def _is_kept(task: Task, folder: Path) -> bool:
    return _file(task, folder).exists() and _read(task, folder)["asked"] == json.loads(json.dumps(task.asked))


def _keep(task: Task, folder: Path, found: Any) -> None:
    write_results(_file(task, folder), {"asked": task.asked, "found": found})
