"""A lease in an object store: one process at a time runs a sweep."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import psutil

from orpo_ray.errors import UserError
from orpo_ray.storage.object_store import Storage, StorageError

OWNER_FILE = "owner.json"
_BEAT_S = 10.0
_DEAD_AFTER_S = 45.0
"""An owner without a heartbeat for this long counts as dead."""


class LeaseError(UserError, RuntimeError):
    """Another process runs this sweep."""


class Lease:
    """The right to run a sweep: an object that its owner rewrites periodically. No clocks are compared."""

    def __init__(self, remote: Storage, on_loss: Callable[[str], None], notify: Callable[[str], None]) -> None:
        """Acquire the lease; if it has an owner, wait until the owner shows no heartbeat.

        Args:
            remote: the sweep's folder.
            on_loss: called from a thread with a message if another process has taken the lease.
            notify: tells the user why acquiring takes a while.

        Raises:
            LeaseError: the owner is alive.
        """
        self._remote, self._on_loss = remote, on_loss
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._over = threading.Event()
        seen = remote.read(OWNER_FILE)
        if seen is not None and not _has_died_here(seen):
            notify(
                f"{remote}: waiting {_DEAD_AFTER_S:.0f} s to see whether {_name(seen)}, which ran this sweep, is alive"
            )
            deadline = time.monotonic() + _DEAD_AFTER_S
            while time.monotonic() < deadline and (now := remote.read(OWNER_FILE)) is not None:
                if now != seen:
                    raise LeaseError(f"{remote}: {_name(now)} runs this sweep now; wait for it, or choose another name")
                time.sleep(_BEAT_S / 5)
        self._beats = 0
        self._beat()
        threading.Thread(target=self._run, name="lease", daemon=True).start()

    def release(self) -> None:
        """Release the lease."""
        self._over.set()
        if self._is_mine(self._remote.read(OWNER_FILE)):
            self._remote.delete(OWNER_FILE)

    def _run(self) -> None:
        while not self._over.wait(_BEAT_S):
            try:
                owner = self._remote.read(OWNER_FILE)
                if not self._is_mine(owner):
                    self._on_loss(f"{self._remote}: {_name(owner)} has taken this sweep over")
                    return
                self._beat()
            except StorageError:
                continue  # the journal waits as well, and logs the error

    def _beat(self) -> None:
        self._beats += 1
        self._remote.write(OWNER_FILE, json.dumps(self._me | {"beats": self._beats}).encode())

    def _is_mine(self, content: bytes | None) -> bool:
        return _parsed(content).get("id") == self._me["id"]


def _has_died_here(content: bytes) -> bool:
    owner = _parsed(content)
    return owner.get("host") == socket.gethostname() and not psutil.pid_exists(int(owner.get("pid", 0)))


def _name(content: bytes | None) -> str:
    owner = _parsed(content)
    return f"process {owner.get('pid')} on {owner.get('host')}" if owner else "an unknown process"


def _parsed(content: bytes | None) -> dict[str, Any]:
    try:
        return dict(json.loads(content or b"{}"))
    except (ValueError, TypeError):
        return {}
