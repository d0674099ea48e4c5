"""Save a DeepSpeed engine's state with all ranks, restore it on any number of ranks, or read only its weights.

Files are read as tensors and plain values only, so that a manipulated checkpoint cannot run code.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import shutil
from argparse import Namespace
from collections.abc import Iterator
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

from orpo_ray.errors import UserError
from orpo_ray.storage.checkpoint_files import damage_of, read_manifest

ENGINE_FOLDER = "engine"
"""Subfolder of DeepSpeed's files, which calls it a tag."""
_UNIVERSAL_FOLDER = "universal"
_SAFE_CLASSES = (LossScaler, ZeroStageEnum, fragment_address)
"""Classes in DeepSpeed's files besides tensors and plain values: two numbers, and the name of a stage."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be used; the message says why and what to do."""


def write_state(engine: deepspeed.DeepSpeedEngine, folder: Path) -> str | None:
    """Write the engine's state and this rank's random state into a folder with an `ENGINE_FOLDER`. A collective.

    Returns:
        What went wrong on this rank, e.g. a full disk; None if nothing did.
    """
    with _tolerant(engine) as writer:
        engine.save_checkpoint(
            str(folder), tag=ENGINE_FOLDER, save_latest=False, exclude_frozen_parameters=_has_frozen(engine)
        )
    writer.save(_random_state(), str(_random_file(folder)))
    return writer.problem


def read_state(engine: deepspeed.DeepSpeedEngine, folder: Path, *, leads: bool, control: Any) -> None:
    """Restore the state of a checkpoint in a new engine. A collective.

    If another number of workers wrote it, the state is partitioned anew (DeepSpeed's universal checkpoint). The random
    states of those workers, which only dropout uses, are then not restored.

    Args:
        engine: a new engine.
        folder: an undamaged checkpoint.
        leads: whether this rank converts the files for all ranks that share its disk.
        control: process group for small host-side messages; the default group if None.

    Raises:
        CheckpointError: the checkpoint has another ZeRO stage, or holds more than tensors.
    """
    manifest, stage = read_manifest(folder), engine.zero_optimization_stage()
    if manifest["zero_stage"] != stage:
        raise CheckpointError(
            f"{folder} was written with zero_stage {manifest['zero_stage']}, this run has {stage}: the optimizer state "
            f"is partitioned differently; continue with zero_stage {manifest['zero_stage']}, or remove the folder to "
            "start over"
        )
    same_world = manifest["num_workers"] == dist.get_world_size()
    tagged: contextlib.AbstractContextManager[str] = contextlib.nullcontext(ENGINE_FOLDER)
    if not same_world and stage != 0:
        tagged = _repartitioned(engine, folder, leads, control)
    with _tensors_only(folder), tagged as tag:
        loaded, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not _has_frozen(engine))
    if loaded is None:
        raise CheckpointError(f"{folder}: DeepSpeed found no engine state in it; remove this folder")
    if same_world:
        with _tensors_only(folder):
            state = torch.load(_random_file(folder), weights_only=True)
        _restore_random_state(state)


def full_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint of any ZeRO stage and any number of workers; needs no process group.

    Args:
        path: a checkpoint's folder.

    Returns:
        fp32 tensors on the CPU by the names that they have in the engine's module (those of the language model begin
        with `lm.`). Tied weights are listed under each of their names; frozen weights are left out, as in the
        checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds more than tensors.
    """
    if (damage := damage_of(path)) is not None:
        raise CheckpointError(f"{path}: {damage}; its weights cannot be read")
    if read_manifest(path)["zero_stage"] == 3:
        # The weights are partitioned over the ranks' files.
        with _tensors_only(path), _silent():
            return dict(
                get_fp32_state_dict_from_zero_checkpoint(str(path), tag=ENGINE_FOLDER, exclude_frozen_parameters=True)
            )
    # Up to stage 2 every rank has all weights, and they are the fp32 ones (`engine.build_engine`).
    file = path / ENGINE_FOLDER / "mp_rank_00_model_states.pt"
    with _tensors_only(path):
        return dict(torch.load(file, map_location="cpu", mmap=True, weights_only=True)["module"])


class _Writer(TorchCheckpointEngine):
    """Writes files as DeepSpeed does, but records a failure instead of raising: other ranks wait in a barrier."""

    def __init__(self) -> None:
        super().__init__()
        self.problem: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Like torch.save, which on a full disk raises OSError or, from C++, RuntimeError."""
        try:
            torch.save(state_dict, path)
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(os.path.dirname(path)).free
            self.problem = f"{path}: {'no space left on the device' if free < 2**20 else error}"
            Path(path).unlink(missing_ok=True)  # the other ranks' files may still fit


@contextlib.contextmanager
def _tolerant(engine: deepspeed.DeepSpeedEngine) -> Iterator[_Writer]:
    """Make an engine write through a `_Writer`, and without the script that DeepSpeed puts beside its files."""
    usual, engine.checkpoint_engine = engine.checkpoint_engine, _Writer()
    engine._copy_recovery_script = lambda folder: None
    try:
        yield engine.checkpoint_engine
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script


@contextlib.contextmanager
def _repartitioned(engine: deepspeed.DeepSpeedEngine, folder: Path, leads: bool, control: Any) -> Iterator[str]:
    """Tag of the same state in DeepSpeed's universal format, which any number of workers can load."""
    universal = folder / _UNIVERSAL_FOLDER
    if leads:
        shutil.rmtree(universal, ignore_errors=True)
        arguments = Namespace(
            input_folder=str(folder / ENGINE_FOLDER),
            output_folder=str(universal),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=engine.zero_optimization_stage() < 3,
        )
        with _silent():
            ds_to_universal.main(arguments)
    dist.barrier(group=control)
    groups = engine.basic_optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    engine._config.load_universal_checkpoint = True
    try:
        yield _UNIVERSAL_FOLDER
        # At stage 3, DeepSpeed 0.19.8 gives all groups the first group's settings, weight decay included, and all
        # parameters one shared step counter, which each of them then increments.
        for group, own in zip(groups, settings, strict=True):
            group.update(own)
        for state in engine.basic_optimizer.state.values():
            state["step"] = state["step"].clone()
    finally:
        engine._config.load_universal_checkpoint = False
        dist.barrier(group=control)
        if leads:
            shutil.rmtree(universal, ignore_errors=True)
            (folder / "latest_universal").unlink(missing_ok=True)


@contextlib.contextmanager
def _tensors_only(path: Path) -> Iterator[None]:
    """Refuse pickles that could run code: they may hold tensors, plain values and `_SAFE_CLASSES`.

    DeepSpeed always loads with `weights_only=False`, which lets a pickle name any class; a torch environment variable
    overrules it.

    Raises:
        CheckpointError: a pickle holds more. Nothing of it was run.
    """
    forced, unforced = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (forced, unforced)}
    os.environ[forced] = "1"
    try:
        with torch.serialization.safe_globals(list(_SAFE_CLASSES)):
            yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: a file of it holds more than tensors and could run code; nothing of it was run. Check who can "
            "write there. Remove the folder, and training continues from the checkpoint before it "
            f"({error!s:.300})"
        ) from error
    finally:
        del os.environ[forced]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep DeepSpeed's report of each of its steps off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _has_frozen(engine: deepspeed.DeepSpeedEngine) -> bool:
    return any(not p.requires_grad for p in engine.module.parameters())


def _random_file(folder: Path) -> Path:
    return folder / f"random-rank-{dist.get_rank()}.pt"


def _random_state() -> dict[str, Any]:
    """Random states as tensors and plain values, so that reading them back runs no code."""
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
