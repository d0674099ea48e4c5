"""Commit a checkpoint in the background: hash and upload the files of all ranks, then write the manifest."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

from orpo_ray.config import CheckpointConfig
from orpo_ray.storage.checkpoint_files import (
    MANIFEST,
    file_facts,
    flush_folder,
    owner_rank,
    partial_folder,
    remove_others,
    remove_others_from_store,
    step_name,
    steps_to_keep,
    write_durably,
)
from orpo_ray.storage.object_store import Storage, StorageError
from orpo_ray.training.collectives import gather

_COMMIT_TIMEOUT = timedelta(hours=4)
"""Longer than any upload: ranks wait for the slowest."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Committer:
    """Commits one trial's checkpoints on one rank, in a thread. All ranks commit the same checkpoints in order."""

    folder: Path
    keep: CheckpointConfig
    remote: Storage | None
    before_commit: Callable[[], None]
    """Called on rank 0 when all files are stored, before the manifest makes them a checkpoint."""
    on_problem: Callable[[str], None]
    """Called on rank 0 with what went wrong without ending the trial."""
    committed_step: int = 0
    """Step of the newest checkpoint that is safe; 0 if there is none."""
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    """Held-out metrics of the checkpoints that are kept, by step."""
    leads: bool = field(init=False)
    """Whether this rank creates and removes folders for all ranks that share its disk."""
    _group: Any = field(init=False)
    _thread: ThreadPoolExecutor = field(init=False)
    _pending: Future[None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # Without an object store all ranks share one folder; with one, each node has a folder on its own disk.
        local_rank = dist.get_rank() if self.remote is None else int(os.environ.get("LOCAL_RANK", 0))
        self.leads = local_rank == 0
        self._group = _commit_group(dist.group.WORLD)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is still on its way."""
        return self._pending is not None and not self._pending.done()

    def begin(self, about: dict[str, Any], problem: str | None) -> None:
        """Start to commit the files in the partial folder of a step. Every rank calls this.

        Args:
            about: the manifest without its files; `about["step"]` is the step.
            problem: what went wrong on this rank while it wrote its files.
        """
        self._pending = self._thread.submit(self._commit, about, problem)

    def wait(self) -> None:
        """Wait until the pending checkpoint is safe or has failed. Not a collective, but then all ranks agree."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def upload(self, *files: Path) -> None:
        """Start to copy files of the trial's folder into the object store, if there is one. Not a collective."""
        if self.remote is not None:
            for file in files:
                self._thread.submit(self._upload, self.remote, file)

    def close(self) -> None:
        """Wait for the thread and end it. Not a collective."""
        self._thread.shutdown(wait=True)

    def report(self, message: str) -> None:
        """Log a problem that does not end the trial, on rank 0."""
        if dist.get_rank() == 0:
            _log.warning(message)
            self.on_problem(message)

    def _commit(self, about: dict[str, Any], problem: str | None) -> None:
        step = about["step"]
        partial = partial_folder(self.folder, step)
        files: dict[str, Any] = {}
        if problem is None:
            try:
                files = self._store(partial, step)
            except Exception as error:  # of any kind: the other ranks wait for this one below
                problem = f"{type(error).__name__}: {error}"
        stored = gather((files, problem), self._group)
        problem = next((p for _, p in stored if p), None)
        manifest = json.dumps(about | {"files": {k: v for files, _ in stored for k, v in sorted(files.items())}})
        if problem is None and self.leads:
            problem = self._seal(partial, step, manifest)
        if problem := next((p for p in gather(problem, self._group) if p), None):
            if self.leads:
                shutil.rmtree(partial, ignore_errors=True)
            self.report(f"no checkpoint of step {step}: {problem}; training goes on")
            return
        self.committed_step = step
        self.metrics[step] = about["progress"].get("metrics", {})
        if self.leads:
            self._remove_old()

    def _store(self, partial: Path, step: int) -> dict[str, Any]:
        """Flush, hash and upload this rank's files. Returns their size and hash by name."""
        files = {}
        for path in sorted(partial.rglob("*")):
            name = str(path.relative_to(partial))
            if path.is_file() and owner_rank(name) == dist.get_rank():
                files[name] = file_facts(path, flush=True)
                if self.remote is not None:
                    self.remote.upload(path, f"{step_name(step)}/{name}")
        return files

    def _seal(self, partial: Path, step: int, manifest: str) -> str | None:
        """Write the manifest and give the folder its final name. Returns what went wrong."""
        try:
            if dist.get_rank() == 0:
                self.before_commit()
            write_durably(partial / MANIFEST, manifest)
            if dist.get_rank() == 0 and self.remote is not None:
                self.remote.write(f"{step_name(step)}/{MANIFEST}", manifest.encode())
            final = self.folder / step_name(step)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            flush_folder(self.folder)
        except Exception as error:  # of any kind, as above
            return f"{type(error).__name__}: {error}"
        return None

    def _remove_old(self) -> None:
        newest, wanted = max(self.metrics), steps_to_keep(self.metrics, self.keep)
        self.metrics = {step: values for step, values in self.metrics.items() if step in wanted}
        remove_others(self.folder, wanted, before=newest)
        if self.remote is not None and dist.get_rank() == 0:
            try:
                remove_others_from_store(self.remote, wanted, before=newest)
            except StorageError as error:
                self.report(f"old checkpoints were not removed: {error}")

    def _upload(self, remote: Storage, file: Path) -> None:
        try:
            remote.upload(file, file.name)
        except (OSError, StorageError) as error:
            self.report(f"{file.name} is not in the object store: {error}")


@cache
def _commit_group(world: Any) -> Any:
    """A group for the threads alone, as the loop uses others at the same time. One per default process group."""
    return dist.new_group(backend="gloo", timeout=_COMMIT_TIMEOUT)
