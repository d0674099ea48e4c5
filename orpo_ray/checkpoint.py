"""Atomic checkpoints of engine, progress and random state, and how to find the last good one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

_TAG = "engine"
_MANIFEST = "manifest.json"
_PARTIAL = ".partial"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says why and what to do."""


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, step: int, progress: dict[str, Any]) -> Path:
    """Write `folder/step-NNNNNNNN`, then drop older checkpoints. A collective: every rank calls it with the same step.

    All ranks write into a folder of another name; rank 0 lists what is there in a manifest and renames it when
    everybody is done. A crash at any moment leaves the previous checkpoint whole.

    Args:
        engine: what is saved.
        folder: the trial's own, on storage that every rank sees.
        step: optimizer steps done.
        progress: JSON-able state of the loop.
    """
    rank = dist.get_rank()
    final = folder / f"step-{step:08d}"
    partial = folder / f"step-{step:08d}{_PARTIAL}"
    if rank == 0:
        for leftover in (partial, final):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    frozen = any(not p.requires_grad for p in engine.module.parameters())
    engine.save_checkpoint(str(partial), tag=_TAG, exclude_frozen_parameters=frozen)
    torch.save(_random_state(), partial / f"random-rank-{rank}.pt")
    dist.barrier()
    if rank == 0:
        manifest = {
            "step": step,
            "num_workers": dist.get_world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "progress": progress,
            "files": {
                str(path.relative_to(partial)): path.stat().st_size
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            },
        }
        _write_durably(partial / _MANIFEST, json.dumps(manifest, indent=1))
        os.rename(partial, final)
        for older in folder.glob("step-*"):
            if older != final:
                shutil.rmtree(older, ignore_errors=True)
    dist.barrier()
    return final


def latest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there with the sizes they were written with; None if there is none."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if not path.name.endswith(_PARTIAL) and _missing(path) is None:
            return path
    return None


def load(engine: deepspeed.DeepSpeedEngine, path: Path) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint into a fresh engine. A collective.

    Returns:
        Optimizer steps done, and the loop's progress as saved.

    Raises:
        CheckpointError: it is incomplete, or was written by another number of workers or another ZeRO stage.
    """
    if (missing := _missing(path)) is not None:
        raise CheckpointError(
            f"{path}: {missing}; remove this folder to continue from an earlier step or from the start"
        )
    manifest = read_manifest(path)
    for name, now in (("num_workers", dist.get_world_size()), ("zero_stage", engine.zero_optimization_stage())):
        if manifest[name] != now:
            raise CheckpointError(
                f"{path} was written with {name} {manifest[name]}, this run has {now}: the optimizer state is cut "
                f"differently; continue with {name} {manifest[name]}, or remove the folder to start over"
            )
    frozen = any(not p.requires_grad for p in engine.module.parameters())
    loaded, _ = engine.load_checkpoint(str(path), tag=_TAG, load_module_strict=not frozen)
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed found no engine state in it; remove this folder")
    _restore_random_state(torch.load(path / f"random-rank-{dist.get_rank()}.pt", weights_only=False))
    return int(manifest["step"]), dict(manifest["progress"])


def full_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint of any ZeRO stage and any number of workers; no process group is needed.

    Args:
        path: as `save` returned it.

    Returns:
        fp32 tensors on the CPU by the names they have in the engine's module (`lm.` before those of the language
        model). Tied weights stand under all of their names; frozen ones are left out, as `save` does.

    Raises:
        CheckpointError: it is incomplete.
    """
    if (missing := _missing(path)) is not None:
        raise CheckpointError(f"{path}: {missing}; its weights cannot be read")
    if read_manifest(path)["zero_stage"] == 3:
        # The weights are cut over the ranks' files. DeepSpeed tells the terminal about each of its steps.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(path), tag=_TAG, exclude_frozen_parameters=True))
    # Up to stage 2 every rank has all weights, and they are the fp32 ones (`engine.build_engine`).
    file = path / _TAG / "mp_rank_00_model_states.pt"
    return dict(torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"])


def read_manifest(path: Path) -> dict[str, Any]:
    """What `save` recorded: step, num_workers, zero_stage, progress, files with their sizes in bytes."""
    return dict(json.loads((path / _MANIFEST).read_text(encoding="utf-8")))


def _missing(path: Path) -> str | None:
    try:
        files = read_manifest(path)["files"]
    except (OSError, ValueError, KeyError):
        return "its manifest is missing or unreadable"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not the {size} it was written with"
    return None


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _random_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
