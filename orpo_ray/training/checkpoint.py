"""A trial's checkpoints: saved by all ranks, committed in the background, restored from the newest undamaged one.

A folder `step-NNNNNNNN` holds DeepSpeed's files of every rank, the ranks' random states and a manifest. The manifest is
written last and names every file with its size and SHA-256. A folder without a manifest never became a checkpoint. A
checkpoint that differs from its manifest is damaged, and the one before it is used.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from orpo_ray.config import CheckpointConfig
from orpo_ray.storage.checkpoint_files import (
    damage_of,
    partial_folder,
    pull_checkpoint,
    read_manifest,
    step_name,
    step_of,
    tidy_and_list,
)
from orpo_ray.storage.object_store import Storage
from orpo_ray.training.checkpoint_commit import Committer
from orpo_ray.training.collectives import broadcast, gather
from orpo_ray.training.engine_state import ENGINE_FOLDER, read_state, write_state

_RETRY_PAUSES_S = (1.0, 5.0, 15.0, 40.0)
"""Pauses between attempts at a checkpoint that the trial should not continue without."""


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """An undamaged checkpoint on this node."""

    path: Path
    manifest: dict[str, Any]
    skipped: tuple[str, ...]
    """Newer checkpoints that are damaged, and how."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.manifest["step"])


class Checkpoints:
    """The checkpoints of one trial, seen from one rank. Methods are collectives unless said otherwise.

    `save` blocks until this rank's files are written; a thread then hashes, flushes and uploads them and writes the
    manifest (`Committer`). A crash at any moment leaves the previous checkpoints intact.
    """

    def __init__(
        self,
        folder: Path,
        keep: CheckpointConfig,
        remote: Storage | None = None,
        control: Any = None,
        before_commit: Callable[[], None] = lambda: None,
        on_problem: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Set up only; no file is read or written yet.

        Args:
            folder: the trial's folder, on storage that every rank sees or, with `remote`, on each node's own disk.
            keep: which checkpoints to keep.
            remote: the trial's folder in an object store.
            control: process group for small host-side messages; the default group if None.
            before_commit: called on rank 0 when all files are stored, before the manifest makes them a checkpoint.
            on_problem: called on rank 0 with what went wrong without ending the trial.
        """
        self._folder, self._remote, self._control = folder, remote, control
        self._committer = Committer(folder, keep, remote, before_commit, on_problem)

    @property
    def committed_step(self) -> int:
        """Step of the newest checkpoint that is safe; 0 if there is none. Not a collective."""
        return self._committer.committed_step

    @property
    def committed(self) -> str | None:
        """The newest safe checkpoint: a path, or a URI in an object store; None if there is none. Not a collective."""
        home = self._folder if self._remote is None else self._remote
        return str(home / step_name(self.committed_step)) if self.committed_step else None

    def find(self) -> FoundCheckpoint | None:
        """Find the newest undamaged checkpoint and remove unfinished ones."""
        metrics = broadcast(tidy_and_list(self._folder, self._remote) if dist.get_rank() == 0 else None, self._control)
        skipped: list[str] = []
        found: FoundCheckpoint | None = None
        for name in sorted(metrics, reverse=True):
            if problems := [p for p in gather(self._fetch(name), self._control) if p]:
                skipped.append(f"{name}: {problems[0]}")
                continue
            found = FoundCheckpoint(self._folder / name, read_manifest(self._folder / name), tuple(skipped))
            self._committer.committed_step = found.step
            self._committer.metrics = {step_of(n): m for n, m in metrics.items() if step_of(n) <= found.step}
            break
        if skipped:
            fallback = f"going on from step {found.step}" if found else "there is no other: starting over"
            self._committer.report(f"damaged checkpoint {'; '.join(skipped)}; {fallback}")
        return found

    def load(self, engine: deepspeed.DeepSpeedEngine, found: FoundCheckpoint) -> tuple[int, dict[str, Any]]:
        """Restore a checkpoint in a new engine; any number of workers may have written it.

        Returns:
            Optimizer steps done, and the loop's progress as saved.

        Raises:
            CheckpointError: the checkpoint has another ZeRO stage, or holds more than tensors.
        """
        read_state(engine, found.path, leads=self._committer.leads, control=self._control)
        return found.step, dict(found.manifest["progress"])

    def save(self, engine: deepspeed.DeepSpeedEngine, step: int, progress: dict[str, Any]) -> bool:
        """Begin a checkpoint.

        Args:
            engine: the engine to save.
            step: optimizer steps done.
            progress: JSON-able state of the loop.

        Returns:
            Whether it was begun. While an object store is slow or unreachable, the previous checkpoint may still be
            uploading; this one is then skipped.
        """
        if self._remote is None:
            self.wait()
        if any(gather(self._committer.is_busy, self._control)):
            return False
        self.wait()
        partial, problem = partial_folder(self._folder, step), None
        try:
            if self._committer.leads:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / ENGINE_FOLDER).mkdir(parents=True)
        except OSError as error:
            problem = str(error)
        if problems := [p for p in gather(problem, self._control) if p]:
            self._committer.report(f"no checkpoint of step {step}: {problems[0]}")
            return False
        problem = write_state(engine, partial)
        about = {
            "step": step,
            "num_workers": dist.get_world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "progress": json.loads(json.dumps(progress)),  # a copy: the loop goes on
        }
        self._committer.begin(about, problem)
        return True

    def save_with_retry(self, engine: deepspeed.DeepSpeedEngine, step: int, progress: dict[str, Any]) -> None:
        """Make a checkpoint and wait until it is safe; retry for a minute while it cannot be written.

        After that, the trial falls back on the previous checkpoint.
        """
        for pause in (*_RETRY_PAUSES_S, None):
            self.wait()
            if self.committed_step != step:
                self.save(engine, step, progress)
                self.wait()
            if self.committed_step == step or pause is None:
                return
            time.sleep(pause)

    def wait(self) -> None:
        """Wait until the pending checkpoint is safe or has failed. Not a collective, but then all ranks agree."""
        self._committer.wait()

    def publish(self, *files: Path) -> None:
        """Start to copy files of the trial's folder into the object store, if there is one. Call on rank 0 only."""
        self._committer.upload(*files)

    def close(self) -> None:
        """Wait for the background thread and end it. Not a collective."""
        self._committer.close()

    def _fetch(self, name: str) -> str | None:
        """Have a checkpoint on this node and check this rank's share of it. Returns what is wrong with it."""
        folder = self._folder / name
        if self._remote is None:
            return damage_of(folder, share=(dist.get_rank(), dist.get_world_size()))
        return pull_checkpoint(self._remote, folder) if self._committer.leads else None
