"""A sweep in an object store: which of its files are kept there, and that one process at a time runs it.

Checkpoints are written by the workers (`checkpoint`), the journal by the broker (`journal`); this is the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from orpo_ray.storage import journal
from orpo_ray.storage.object_store import Storage, StorageError
from orpo_ray.storage.results import EVENTS_FILE, FITTED_FILE, SWEEP_FILE

_OWNER = "owner.json"
_BEAT_S = 10.0
_SILENCE_S = 45.0
"""An owner that has not been heard of for so long has died."""
_CHECKPOINT = "step-"


class LeaseError(RuntimeError):
    """Another process runs this sweep."""


def take_up(run_dir: Path, remote: Storage) -> None:
    """Make a run directory what the store has of the sweep: its config and its journal. Nothing where it has none.

    What the journal's file holds beyond the store's is dropped: nobody has acted on it.
    """
    for name in (SWEEP_FILE, FITTED_FILE):
        if (content := remote.read(name)) is not None:
            _replace(run_dir / name, content)
    if remote.read(SWEEP_FILE) is not None:
        journal.fetch(run_dir / EVENTS_FILE, remote)


def bring(run_dir: Path, remote: Storage) -> None:
    """Copy all that is not a checkpoint, the journal or Ray's from the store: what reports are made of."""
    files = {}
    for name, size in remote.list().items():
        parts = name.split("/")
        if parts[0] in (journal.FOLDER, "groups", _OWNER) or any(p.startswith(_CHECKPOINT) for p in parts):
            continue
        if any(p in ("", ".", "..") for p in parts):
            raise StorageError(f"{remote}: an object named {name!r} would be written outside of {run_dir}; remove it")
        file = run_dir / name
        if not file.exists() or file.stat().st_size != size or parts[0] == "trials":
            files[name] = file
    remote.download_all(files)


def fetched(uri: str, output_dir: Path) -> Path:
    """The run directory below `output_dir` of a sweep in an object store, brought up to date.

    Args:
        uri: `storage` of its config and its name, e.g. `s3://bucket/orpo/quickstart`.
        output_dir: where run directories are.

    Raises:
        FileNotFoundError: there is no such sweep.
        StorageError: the store cannot be read.
    """
    remote = Storage(uri.rstrip("/"), patience_s=30.0)
    if remote.read(SWEEP_FILE) is None:
        raise FileNotFoundError(f"{uri} holds no sweep: give the storage of its config and its name, storage/NAME")
    run_dir = output_dir.expanduser().absolute() / remote.uri.rpartition("/")[2]
    run_dir.mkdir(parents=True, exist_ok=True)
    take_up(run_dir, remote)
    bring(run_dir, remote)
    return run_dir


def put(run_dir: Path, remote: Storage, *names: str) -> None:
    """Copy files of the run directory into the store."""
    for name in names:
        remote.upload(run_dir / name, name)


class Lease:
    """The right to run a sweep: an object that its owner keeps changing. No clocks are compared."""

    def __init__(self, remote: Storage, on_loss: Callable[[str], None], say: Callable[[str], None]) -> None:
        """Take it, waiting for the silence of an owner that seems to have died.

        Args:
            remote: the sweep's folder.
            on_loss: called, from a thread, with a sentence when another process has taken it.
            say: tells the user why it takes a while.

        Raises:
            LeaseError: its owner is alive.
        """
        self._remote, self._on_loss = remote, on_loss
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._over = threading.Event()
        seen = remote.read(_OWNER)
        if seen is not None and not _has_died_here(seen):
            say(f"{remote}: waiting {_SILENCE_S:.0f} s to see whether {_name(seen)}, which ran this sweep, is alive")
            deadline = time.monotonic() + _SILENCE_S
            while time.monotonic() < deadline and (now := remote.read(_OWNER)) is not None:
                if now != seen:
                    raise LeaseError(f"{remote}: {_name(now)} runs this sweep now; wait for it, or choose another name")
                time.sleep(_BEAT_S / 5)
        self._beats = 0
        self._beat()
        threading.Thread(target=self._run, name="lease", daemon=True).start()

    def release(self) -> None:
        """Give it back."""
        self._over.set()
        if self._is_mine(self._remote.read(_OWNER)):
            self._remote.delete(_OWNER)

    def _run(self) -> None:
        while not self._over.wait(_BEAT_S):
            try:
                owner = self._remote.read(_OWNER)
                if not self._is_mine(owner):
                    self._on_loss(f"{self._remote}: {_name(owner)} has taken this sweep over")
                    return
                self._beat()
            except StorageError:
                continue  # the journal waits as well, and tells

    def _beat(self) -> None:
        self._beats += 1
        self._remote.write(_OWNER, json.dumps(self._me | {"beats": self._beats}).encode())

    def _is_mine(self, content: bytes | None) -> bool:
        return _parsed(content).get("id") == self._me["id"]


def _has_died_here(content: bytes) -> bool:
    owner = _parsed(content)
    return owner.get("host") == socket.gethostname() and not psutil.pid_exists(int(owner.get("pid", 0)))


def _name(content: bytes | None) -> str:
    owner = _parsed(content)
    return f"process {owner.get('pid')} on {owner.get('host')}" if owner else "somebody"


def _parsed(content: bytes | None) -> dict[str, Any]:
    try:
        return dict(json.loads(content or b"{}"))
    except (ValueError, TypeError):
        return {}


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    shutil.move(partial, path)
