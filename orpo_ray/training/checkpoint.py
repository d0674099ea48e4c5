"""A trial's checkpoints: written by all ranks, hashed, stored and committed in the background, found again when whole.

A folder `step-NNNNNNNN` has DeepSpeed's files of every rank, the ranks' random states and a manifest, which is written
last and names every file with its size and SHA-256. What has no manifest was never a checkpoint; what differs from its
manifest is damaged, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import random
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from orpo_ray.config import CheckpointConfig
from orpo_ray.errors import UserError
from orpo_ray.storage.checkpoint_files import (
    MANIFEST,
    STEP_NAME,
    best_step,
    damage_of,
    file_facts,
    flush_folder,
    manifest_metrics,
    owner_rank,
    pull_checkpoint,
    read_manifest,
    step_name,
    write_durably,
)
from orpo_ray.storage.object_store import Storage, StorageError

_TAG = "engine"
_UNIVERSAL = "universal"
_PARTIAL = ".partial"
_STATE_CLASSES = (LossScaler, ZeroStageEnum, fragment_address)
"""What DeepSpeed's files hold besides tensors and plain values: two numbers, and the name of a stage."""
_PAUSES_S = (1.0, 5.0, 15.0, 40.0)
"""Between the attempts at a checkpoint that a trial must not go on without."""
_COMMIT_TIMEOUT = timedelta(hours=4)
"""Longer than any upload: ranks wait for the slowest."""

_log = logging.getLogger(__name__)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Found:
    """A whole checkpoint on this node."""

    path: Path
    manifest: dict[str, Any]
    skipped: tuple[str, ...]
    """Newer ones that are damaged, and how."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.manifest["step"])


class Checkpoints:
    """The checkpoints of one trial, seen from one rank. Methods are collectives unless said otherwise.

    `save` blocks until this rank's files are written; hashes, flushes to disk, the upload and the manifest follow in a
    thread. A crash at any moment leaves the previous checkpoints whole.
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
        """Nothing is read or written yet.

        Args:
            folder: the trial's own: on storage that every rank sees or, with `remote`, on each node's disk.
            keep: which ones to keep.
            remote: the trial's folder in an object store.
            control: process group for small host-side messages; the default group if None.
            before_commit: called on rank 0 when all files are stored, before the manifest makes them a checkpoint.
            on_problem: called on rank 0 with what went wrong without ending the trial.
        """
        self._folder, self._keep, self._remote, self._control = folder, keep, remote, control
        self._before_commit, self._on_problem = before_commit, on_problem
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        # Without an object store all ranks share one folder; with one, the first rank of each node tidies its node's.
        self._leads = self._rank == 0 if remote is None else int(os.environ.get("LOCAL_RANK", 0)) == 0
        self._group = _commit_group(dist.group.WORLD)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None
        self._kept: dict[int, dict[str, Any]] = {}  # step -> held-out metrics
        self.committed_step = 0
        """Of the newest checkpoint that is safe; 0 if there is none."""

    @property
    def committed(self) -> str | None:
        """Where the newest safe checkpoint is: a path, or a URI in an object store. Not a collective."""
        name = step_name(self.committed_step)
        home = self._folder if self._remote is None else self._remote
        return str(home / name) if self.committed_step else None

    def find(self) -> Found | None:
        """The newest checkpoint whose files are all as they were written; sweeps away what a crash left half done."""
        listed: list[Any] = [self._tidy() if self._rank == 0 else None]
        dist.broadcast_object_list(listed, src=0, group=self._control)
        skipped: list[str] = []
        found: Found | None = None
        for name in sorted(listed[0], reverse=True):
            if problems := [p for p in self._gather(self._fetch(name)) if p]:
                skipped.append(f"{name}: {problems[0]}")
                continue
            found = Found(self._folder / name, read_manifest(self._folder / name), tuple(skipped))
            self.committed_step = found.step
            self._kept = {step: m for n, m in listed[0].items() if (step := int(n[5:])) <= found.step}
            break
        if skipped:
            fallback = f"going on from step {found.step}" if found else "there is no other: starting over"
            self._tell(f"damaged checkpoint {'; '.join(skipped)}; {fallback}")
        return found

    def load(self, engine: deepspeed.DeepSpeedEngine, found: Found) -> tuple[int, dict[str, Any]]:
        """Put a checkpoint into a fresh engine.

        One that another number of workers wrote is cut anew (DeepSpeed's universal checkpoint); their random states,
        which only dropout draws from, then begin at the seed again.

        Returns:
            Optimizer steps done, and the loop's progress as saved.

        Raises:
            CheckpointError: it was written at another ZeRO stage, or holds more than tensors.
        """
        manifest, stage = found.manifest, engine.zero_optimization_stage()
        if manifest["zero_stage"] != stage:
            raise CheckpointError(
                f"{found.path} was written with zero_stage {manifest['zero_stage']}, this run has {stage}: the "
                f"optimizer state is cut differently; continue with zero_stage {manifest['zero_stage']}, or remove "
                "the folder to start over"
            )
        frozen = any(not p.requires_grad for p in engine.module.parameters())
        same_cut = manifest["num_workers"] == self._world
        recut = contextlib.nullcontext(_TAG) if same_cut or stage == 0 else self._recut(engine, found, stage)
        with _tensors_only(found.path), recut as tag:
            loaded, _ = engine.load_checkpoint(str(found.path), tag=tag, load_module_strict=not frozen)
        if loaded is None:
            raise CheckpointError(f"{found.path}: DeepSpeed found no engine state in it; remove this folder")
        if same_cut:
            with _tensors_only(found.path):
                state = torch.load(found.path / f"random-rank-{self._rank}.pt", weights_only=True)
            _restore_random_state(state)
        return found.step, dict(manifest["progress"])

    def save(self, engine: deepspeed.DeepSpeedEngine, step: int, progress: dict[str, Any]) -> bool:
        """Begin a checkpoint. Returns whether it was begun: while an object store is slow or away, the one before it
        may still be on its way; then this one is left out.

        Args:
            engine: what is saved.
            step: optimizer steps done.
            progress: JSON-able state of the loop.
        """
        if self._remote is None:
            self.wait()
        is_busy = self._pending is not None and not self._pending.done()
        partial = self._folder / f"{step_name(step)}{_PARTIAL}"
        if any(self._gather(is_busy)):
            return False
        self.wait()
        problem = None
        try:
            if self._leads:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / _TAG).mkdir(parents=True)
        except OSError as error:
            problem = str(error)
        if problems := [p for p in self._gather(problem) if p]:
            self._tell(f"no checkpoint of step {step}: {problems[0]}")
            return False
        frozen = any(not p.requires_grad for p in engine.module.parameters())
        with _tolerant(engine) as writer:
            engine.save_checkpoint(str(partial), tag=_TAG, save_latest=False, exclude_frozen_parameters=frozen)
        writer.save(_random_state(), str(partial / f"random-rank-{self._rank}.pt"))
        about = {
            "step": step,
            "num_workers": self._world,
            "zero_stage": engine.zero_optimization_stage(),
            "progress": json.loads(json.dumps(progress)),  # as it is now: the loop goes on
        }
        self._pending = self._thread.submit(self._commit, partial, about, writer.problem)
        return True

    def save_surely(self, engine: deepspeed.DeepSpeedEngine, step: int, progress: dict[str, Any]) -> None:
        """Make a checkpoint and wait until it is safe; where it cannot be written, try again for a minute.

        After that the trial has to do with the one before it.
        """
        for pause in (*_PAUSES_S, None):
            self.wait()
            if self.committed_step != step:
                self.save(engine, step, progress)
                self.wait()
            if self.committed_step == step or pause is None:
                return
            time.sleep(pause)

    def wait(self) -> None:
        """Until what was begun is safe, or has failed. Not a collective, but afterwards all ranks agree."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def publish(self, *files: Path) -> None:
        """Copy files of the trial's folder into the object store, where there is one. Rank 0 only; it does not wait."""
        if self._remote is not None:
            remote = self._remote
            for file in files:
                self._thread.submit(_upload_quietly, remote, file, self._tell)

    def close(self) -> None:
        """Wait for the thread and end it. Not a collective."""
        self._thread.shutdown(wait=True)

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _gather(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * self._world
        dist.all_gather_object(everyone, mine, group=self._control)
        return everyone

    def _tell(self, message: str) -> None:
        if self._rank == 0:
            _log.warning(message)
            self._on_problem(message)

    def _tidy(self) -> dict[str, dict[str, float]]:
        """Name of everything that is called a checkpoint -> held-out metrics; the rest of its kind is removed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(f"step-*{_PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)
        if self._remote is None:
            own = [p for p in self._folder.glob("step-*") if STEP_NAME.fullmatch(p.name)]
            return {
                p.name: manifest_metrics((p / MANIFEST).read_bytes() if (p / MANIFEST).exists() else b"") for p in own
            }
        names = self._remote.list()
        folders = {folder for name in names if STEP_NAME.fullmatch(folder := name.partition("/")[0])}
        for folder in folders:
            if f"{folder}/{MANIFEST}" not in names:
                self._remote.delete(folder)  # an upload that a crash cut off
        for name, file in ((n, self._folder / n) for n in names if "/" not in n):
            if not file.exists():
                self._remote.download(name, file)  # what the trial's files beside the checkpoints go on from
        whole = [f for f in folders if f"{f}/{MANIFEST}" in names]
        return {folder: manifest_metrics(self._remote.read(f"{folder}/{MANIFEST}") or b"") for folder in whole}

    def _fetch(self, name: str) -> str | None:
        """Have a checkpoint here, and look at this rank's share of it. Returns what is wrong with it."""
        here = self._folder / name
        if self._remote is None:
            return damage_of(here, share=(self._rank, self._world))
        if not self._leads:
            return None
        return pull_checkpoint(self._remote, here)

    @contextlib.contextmanager
    def _recut(self, engine: deepspeed.DeepSpeedEngine, found: Found, stage: int) -> Iterator[str]:
        """Tag of the same state in DeepSpeed's universal form, which any number of workers can load."""
        universal = found.path / _UNIVERSAL
        if self._leads:
            shutil.rmtree(universal, ignore_errors=True)
            arguments = Namespace(
                input_folder=str(found.path / _TAG),
                output_folder=str(universal),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=stage < 3,
            )
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                ds_to_universal.main(arguments)
        dist.barrier(group=self._control)
        groups = engine.basic_optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        engine._config.load_universal_checkpoint = True
        try:
            yield _UNIVERSAL
            # DeepSpeed 0.19.8 gives all groups the first one's settings at stage 3, weight decay with them, and all
            # parameters one and the same step counter, which each of them then moves on.
            for group, own in zip(groups, settings, strict=True):
                group.update(own)
            for state in engine.basic_optimizer.state.values():
                state["step"] = state["step"].clone()
        finally:
            engine._config.load_universal_checkpoint = False
            dist.barrier(group=self._control)
            if self._leads:
                shutil.rmtree(universal, ignore_errors=True)
                (found.path / "latest_universal").unlink(missing_ok=True)

    def _commit(self, partial: Path, about: dict[str, Any], problem: str | None) -> None:
        """Make a checkpoint of this rank's files and the others'. In the thread of every rank alike."""
        step = about["step"]
        files: dict[str, Any] = {}
        if problem is None:
            try:
                files = self._store(partial, step)
            except Exception as error:  # whatever it is, the other ranks wait for this one below
                problem = f"{type(error).__name__}: {error}"
        everyone: list[Any] = [None] * self._world
        dist.all_gather_object(everyone, (files, problem), group=self._group)
        problem = next((p for _, p in everyone if p), None)
        manifest = json.dumps(about | {"files": {k: v for files, _ in everyone for k, v in sorted(files.items())}})
        if problem is None and self._leads:
            problem = self._seal(partial, step, manifest)
        dist.all_gather_object(everyone, problem, group=self._group)
        if problem := next((p for p in everyone if p), None):
            if self._leads:
                shutil.rmtree(partial, ignore_errors=True)
            self._tell(f"no checkpoint of step {step}: {problem}; training goes on")
            return
        self.committed_step = step
        self._kept[step] = about["progress"].get("metrics", {})
        if self._leads:
            self._prune()

    def _store(self, partial: Path, step: int) -> dict[str, Any]:
        """Flush, hash and upload this rank's files: name -> size and hash."""
        files = {}
        for path in sorted(partial.rglob("*")):
            name = str(path.relative_to(partial))
            if path.is_file() and owner_rank(name) == self._rank:
                files[name] = file_facts(path, flush=True)
                if self._remote is not None:
                    self._remote.upload(path, f"{step_name(step)}/{name}")
        return files

    def _seal(self, partial: Path, step: int, manifest: str) -> str | None:
        """Write the manifest and give the folder its name. Returns what went wrong."""
        try:
            if self._rank == 0:
                self._before_commit()
            write_durably(partial / MANIFEST, manifest)
            if self._rank == 0 and self._remote is not None:
                self._remote.write(f"{step_name(step)}/{MANIFEST}", manifest.encode())
            final = self._folder / step_name(step)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            flush_folder(self._folder)
        except Exception as error:  # as above
            return f"{type(error).__name__}: {error}"
        return None

    def _prune(self) -> None:
        wanted = set(sorted(self._kept)[-self._keep.keep_last :])
        if (best := best_step(self._kept, self._keep.keep_best)) is not None:
            wanted.add(best)
        newest = max(self._kept)
        for step in [s for s in self._kept if s not in wanted]:
            del self._kept[step]
        here = self._folder.glob("step-*")
        for path in here:
            if STEP_NAME.fullmatch(path.name) and int(path.name[5:]) < newest and int(path.name[5:]) not in wanted:
                shutil.rmtree(path, ignore_errors=True)
        if self._remote is not None and self._rank == 0:
            try:
                names = [name.partition("/")[0] for name in self._remote.list()]
                there = {name for name in names if STEP_NAME.fullmatch(name)}
                for name in there:
                    if int(name[5:]) < newest and int(name[5:]) not in wanted:
                        self._remote.delete(f"{name}/{MANIFEST}")  # first: what is half deleted is no checkpoint
                        self._remote.delete(name)
            except StorageError as error:
                self._tell(f"old checkpoints stay: {error}")


class _Writer(TorchCheckpointEngine):
    """Writes files as DeepSpeed does, but remembers a failure instead of raising: other ranks wait in a barrier."""

    def __init__(self) -> None:
        super().__init__()
        self.problem: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Like torch.save; on a full disk that raises OSError or, from C++, RuntimeError."""
        try:
            torch.save(state_dict, path)
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(os.path.dirname(path)).free
            self.problem = f"{path}: {'no space left on the device' if free < 2**20 else error}"
            Path(path).unlink(missing_ok=True)  # what others write may still fit


@contextlib.contextmanager
def _tolerant(engine: deepspeed.DeepSpeedEngine) -> Iterator[_Writer]:
    """Let an engine write through a `_Writer`, and leave out the script that DeepSpeed puts beside its files."""
    usual, engine.checkpoint_engine = engine.checkpoint_engine, _Writer()
    engine._copy_recovery_script = lambda folder: None
    try:
        yield engine.checkpoint_engine
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script


def full_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint of any ZeRO stage and any number of workers; no process group is needed.

    Args:
        path: a whole checkpoint.

    Returns:
        fp32 tensors on the CPU by the names they have in the engine's module (`lm.` before those of the language
        model). Tied weights stand under all of their names; frozen ones are left out, as `save` does.

    Raises:
        CheckpointError: it is damaged, or holds more than tensors.
    """
    if (damage := damage_of(path)) is not None:
        raise CheckpointError(f"{path}: {damage}; its weights cannot be read")
    if read_manifest(path)["zero_stage"] == 3:
        # The weights are cut over the ranks' files. DeepSpeed tells the terminal about each of its steps.
        with _tensors_only(path), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(path), tag=_TAG, exclude_frozen_parameters=True))
    # Up to stage 2 every rank has all weights, and they are the fp32 ones (`engine.build_engine`).
    file = path / _TAG / "mp_rank_00_model_states.pt"
    with _tensors_only(path):
        return dict(torch.load(file, map_location="cpu", mmap=True, weights_only=True)["module"])


@contextlib.contextmanager
def _tensors_only(path: Path) -> Iterator[None]:
    """No pickle that is loaded within may run code: it may hold tensors, plain values and `_STATE_CLASSES`.

    DeepSpeed asks torch for whatever a pickle says (`weights_only=False`), everywhere; torch has a variable that
    overrules it.

    Raises:
        CheckpointError: one holds more. Nothing of it was run.
    """
    forced, unforced = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (forced, unforced)}
    os.environ[forced] = "1"
    try:
        with torch.serialization.safe_globals(list(_STATE_CLASSES)):
            yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: a file of it holds more than tensors and could run code; nothing of it was run. Who can write "
            f"there? Remove the folder, and training goes on from the checkpoint before it ({error!s:.300})"
        ) from error
    finally:
        del os.environ[forced]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@cache
def _commit_group(world: Any) -> Any:
    """For the threads alone: the loop uses other groups at the same time. One for each process group there is."""
    return dist.new_group(backend="gloo", timeout=_COMMIT_TIMEOUT)


def _upload_quietly(remote: Storage, file: Path, tell: Callable[[str], None]) -> None:
    try:
        remote.upload(file, file.name)
    except (OSError, StorageError) as error:
        tell(f"{file.name} is not in the object store: {error}")


def _random_state() -> dict[str, Any]:
    """Tensors and plain values only, so that reading it back runs no code."""
    name, keys, *numbers = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *map(float, numbers)),
        "python": random.getstate(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    random.setstate(state["python"])
