"""Synchronise a run directory with an object store.

Workers write checkpoints there themselves (`training.checkpoint`), the broker its journal (`storage.journal`); this
module copies all other files. `storage.lease` makes sure that one process at a time runs the sweep.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from orpo_ray.errors import NoSuchRunError
from orpo_ray.storage import journal
from orpo_ray.storage.lease import OWNER_FILE
from orpo_ray.storage.object_store import Storage, StorageError
from orpo_ray.storage.run_dir import EVENTS_FILE, FITTED_FILE, SWEEP_FILE

_CHECKPOINT = "step-"


def restore(run_dir: Path, remote: Storage) -> None:
    """Replace config and journal of a run directory by those in the store, if the store has the sweep.

    Events that only the local journal has are dropped: they were never acted on.
    """
    for name in (SWEEP_FILE, FITTED_FILE):
        if (content := remote.read(name)) is not None:
            _replace(run_dir / name, content)
    if remote.read(SWEEP_FILE) is not None:
        journal.fetch(run_dir / EVENTS_FILE, remote)


def pull(run_dir: Path, remote: Storage) -> None:
    """Download report inputs; skip checkpoints, journal and Ray state."""
    files = {}
    for name, size in remote.list().items():
        parts = name.split("/")
        if parts[0] in (journal.FOLDER, "groups", OWNER_FILE) or any(p.startswith(_CHECKPOINT) for p in parts):
            continue
        if any(p in ("", ".", "..") for p in parts):
            raise StorageError(f"{remote}: an object named {name!r} would be written outside of {run_dir}; remove it")
        file = run_dir / name
        if not file.exists() or file.stat().st_size != size or parts[0] == "trials":
            files[name] = file
    remote.download_all(files)


def fetch_run_dir(uri: str, output_dir: Path) -> Path:
    """Download a sweep from an object store, without checkpoints. Returns its run directory below `output_dir`.

    Args:
        uri: `storage` of its config and its name, e.g. `s3://bucket/orpo/quickstart`.
        output_dir: where run directories are.

    Raises:
        NoSuchRunError: there is no such sweep.
        StorageError: the store cannot be read.
    """
    remote = Storage(uri.rstrip("/"), patience_s=30.0)
    if remote.read(SWEEP_FILE) is None:
        raise NoSuchRunError(f"{uri} holds no sweep: give the storage of its config and its name, storage/NAME")
    run_dir = output_dir.expanduser().absolute() / remote.uri.rpartition("/")[2]
    run_dir.mkdir(parents=True, exist_ok=True)
    restore(run_dir, remote)
    pull(run_dir, remote)
    return run_dir


def put(run_dir: Path, remote: Storage, *names: str) -> None:
    """Copy files of the run directory into the store."""
    for name in names:
        remote.upload(run_dir / name, name)


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    shutil.move(partial, path)
