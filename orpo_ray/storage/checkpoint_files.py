"""Checkpoint folders as files: manifests, checksums, and the copy in an object store."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from orpo_ray.config import METRIC_MODES, CheckpointConfig
from orpo_ray.storage.object_store import Storage

MANIFEST = "manifest.json"
"""Written last, it makes a folder a checkpoint; it names every file with its size in bytes and SHA-256."""
STEP_NAME = re.compile(r"step-\d{8}")
_PARTIAL = ".partial"
_RANK_IN_NAME = re.compile(r"(?:zero_pp_rank_|random-rank-|/rank)0*(\d+)")


def exists(checkpoint: str, remote: Storage | None) -> bool:
    """Whether a checkpoint exists at its address, on this machine or in the sweep's folder of an object store."""
    if remote is None:
        return Path(checkpoint).is_dir()
    return remote.read(f"{_below(remote, checkpoint)}/{MANIFEST}") is not None


def copy_to_trial(checkpoint: str, trial_id: str, run_dir: Path, remote: Storage | None) -> str:
    """Replace a trial's checkpoints by a copy of another trial's. Returns the address of the copy.

    On disk, files are hard-linked: checkpoint files are never changed, only replaced.

    Args:
        checkpoint: address of the other trial's checkpoint.
        trial_id: trial that gets the copy.
        run_dir: of the sweep.
        remote: the sweep's folder in an object store, if checkpoints are kept there.
    """
    if remote is None:
        return str(_link_checkpoint(Path(checkpoint), run_dir / "trials" / trial_id))
    source, folder = _below(remote, checkpoint), f"trials/{trial_id}"
    target = f"{folder}/{checkpoint.rpartition('/')[2]}"
    # Copy the manifest last, and only then delete the older checkpoints.
    remote.delete(f"{target}/{MANIFEST}")
    remote.copy(source, target, last=MANIFEST)
    names = {name.split("/")[2] for name in remote.list(folder) if name.split("/")[2].startswith("step-")}
    for name in names - {target.rpartition("/")[2]}:
        remote.delete(f"{folder}/{name}")
    return f"{remote}/{target}"


def _below(remote: Storage, uri: str) -> str:
    return uri.removeprefix(f"{remote}/")


def _link_checkpoint(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    incoming, target = folder / f".fork-{source.name}", folder / source.name
    shutil.rmtree(incoming, ignore_errors=True)
    shutil.copytree(source, incoming, copy_function=os.link)
    for old in folder.glob("step-*"):
        shutil.rmtree(old)
    return incoming.rename(target)


def chosen(folder: Path, metric: str | None = None, remote: Storage | None = None) -> Path | None:
    """The checkpoint that represents a trial: the best by a held-out metric, or the newest without a metric.

    If that one is damaged, the newest undamaged one is used. Needs no process group.

    Args:
        folder: of the trial.
        metric: `checkpoint.keep_best`.
        remote: the trial's folder in an object store; the checkpoint is downloaded from there into `folder`.

    Returns:
        The checkpoint's folder; None if there is none.

    Raises:
        StorageError: the store cannot be read.
    """
    if remote is None:
        here = {p.name: p / MANIFEST for p in folder.glob("step-*") if STEP_NAME.fullmatch(p.name)}
        manifests = {name: file.read_bytes() for name, file in here.items() if file.is_file()}
    else:
        there = {name.partition("/")[0] for name in remote.list() if name.endswith(f"/{MANIFEST}")}
        manifests = {name: remote.read(f"{name}/{MANIFEST}") or b"" for name in there if STEP_NAME.fullmatch(name)}
    names = sorted(manifests, reverse=True)
    best = best_step({step_of(name): manifest_metrics(content) for name, content in manifests.items()}, metric)
    if best is not None:
        names.insert(0, step_name(best))
    for name in names:
        if (damage_of(folder / name) if remote is None else pull_checkpoint(remote, folder / name)) is None:
            return folder / name
    return None


def best_step(metrics: dict[int, dict[str, float]], metric: str | None) -> int | None:
    """The step at which a held-out metric was best, the newest on a tie; None without a metric or a value."""
    if metric is None:
        return None
    sign = 1 if METRIC_MODES[metric] == "max" else -1
    values = [(sign * found[metric], step) for step, found in metrics.items() if metric in found]
    return max(values)[1] if values else None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest: step, num_workers, zero_stage, progress, and files with their sizes in bytes and SHA-256."""
    return dict(json.loads((path / MANIFEST).read_text(encoding="utf-8")))


def step_name(step: int) -> str:
    """Folder name of the checkpoint of an optimizer step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """Optimizer steps done at the checkpoint of this name."""
    return int(name.removeprefix("step-"))


def partial_folder(folder: Path, step: int) -> Path:
    """Where the files of a checkpoint are written before it gets its name."""
    return folder / f"{step_name(step)}{_PARTIAL}"


def tidy_and_list(folder: Path, remote: Storage | None = None) -> dict[str, dict[str, float]]:
    """Prepare a trial's folder for resuming: remove unfinished checkpoints and list the others, damaged ones included.

    With an object store, the trial's files beside its checkpoints are downloaded too, unless they are here.

    Returns:
        Held-out metrics by checkpoint name; empty where the manifest is damaged.

    Raises:
        StorageError: the store cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
    if remote is None:
        manifests = {p.name: p / MANIFEST for p in folder.glob("step-*") if STEP_NAME.fullmatch(p.name)}
        return {name: manifest_metrics(m.read_bytes() if m.exists() else b"") for name, m in manifests.items()}
    names = remote.list()
    stored = {name for n in names if STEP_NAME.fullmatch(name := n.partition("/")[0])}
    complete = {name for name in stored if f"{name}/{MANIFEST}" in names}
    for name in stored - complete:
        remote.delete(name)  # an upload that a crash interrupted
    for name, file in ((n, folder / n) for n in names if "/" not in n):
        if not file.exists():
            remote.download(name, file)  # the resumed trial appends to it
    return {name: manifest_metrics(remote.read(f"{name}/{MANIFEST}") or b"") for name in complete}


def steps_to_keep(metrics: dict[int, dict[str, float]], keep: CheckpointConfig) -> set[int]:
    """The newest `keep.keep_last` steps, and the step where `keep.keep_best` was best.

    Args:
        metrics: held-out metrics by step.
        keep: the `checkpoint` section.
    """
    best = best_step(metrics, keep.keep_best)
    return set(sorted(metrics)[-keep.keep_last :]) | (set() if best is None else {best})


def remove_others(folder: Path, keep: set[int], before: int) -> None:
    """Remove the checkpoints in a trial's folder that are older than step `before` and not to be kept."""
    for path in folder.glob("step-*"):
        if _is_outdated(path.name, keep, before):
            shutil.rmtree(path, ignore_errors=True)


def remove_others_from_store(remote: Storage, keep: set[int], before: int) -> None:
    """Do the same in the trial's folder in an object store.

    Raises:
        StorageError: the store cannot be read or written.
    """
    for name in {name.partition("/")[0] for name in remote.list()}:
        if _is_outdated(name, keep, before):
            remote.delete(f"{name}/{MANIFEST}")  # first: a half-deleted folder must not look like a checkpoint
            remote.delete(name)


def _is_outdated(name: str, keep: set[int], before: int) -> bool:
    return STEP_NAME.fullmatch(name) is not None and step_of(name) < before and step_of(name) not in keep


def owner_rank(name: str) -> int:
    """The rank that writes a file; files without a rank in their name belong to rank 0."""
    found = _RANK_IN_NAME.search(name)
    return int(found[1]) if found else 0


def file_facts(path: Path, flush: bool = False) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file; with `flush`, after an fsync."""
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _difference(path: Path, facts: dict[str, Any]) -> str | None:
    """How a file differs from its manifest entry; None if it does not."""
    if not path.is_file():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != facts["size"]:
        return f"{path.name} has {size} bytes, not the {facts['size']} it was written with"
    if file_facts(path) != facts:
        return f"{path.name} has other content than was written (SHA-256 differs)"
    return None


class _Outside(ValueError):
    """A manifest names a file outside its checkpoint's folder."""


def _files_of(manifest: dict[str, Any]) -> dict[str, Any]:
    files = dict(manifest["files"])
    for name in files:
        if Path(name).is_absolute() or any(part in ("", ".", "..") for part in name.split("/")):
            raise _Outside(f"its manifest names {name!r:.100}, which is not a file inside of it")
    return files


def damage_of(path: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint; None if it is whole.

    Args:
        path: its folder.
        share: (rank, world); every world-th file is checked, beginning with file number `rank`.
    """
    try:
        mine = sorted(_files_of(read_manifest(path)).items())[share[0] :: share[1]]
        return next((problem for name, facts in mine if (problem := _difference(path / name, facts))), None)
    except _Outside as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is missing or unreadable"


def pull_checkpoint(remote: Storage, here: Path) -> str | None:
    """Download a checkpoint from a trial's folder in an object store. Returns what is wrong with it, or None.

    Args:
        remote: the trial's folder in the store.
        here: local folder of the checkpoint, named as in the store; undamaged files in it are kept.
    """
    name = here.name
    try:
        content = remote.read(f"{name}/{MANIFEST}")
        files = _files_of(json.loads(content or b""))
        missing = {f: here / f for f, facts in files.items() if _difference(here / f, facts) is not None}
        remote.download_all({f"{name}/{f}": path for f, path in missing.items()})
        write_durably(here / MANIFEST, (content or b"").decode())
    except FileNotFoundError as error:
        return f"a file is missing ({error})"
    except _Outside as error:
        return str(error)
    except (ValueError, KeyError, TypeError):
        return "its manifest is unreadable"
    return damage_of(here)


def manifest_metrics(manifest: bytes) -> dict[str, float]:
    """Held-out metrics measured at a checkpoint; empty if the manifest is damaged."""
    try:
        return dict(json.loads(manifest)["progress"].get("metrics", {}))
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_durably(path: Path, text: str) -> None:
    """Write a text file and fsync it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Fsync a folder, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
