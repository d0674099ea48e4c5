"""`orpo-ray watch`: read a running sweep, on this machine or on a cluster, and send it the user's requests.

The view reads new events from the sweep's journal; requests are written with `storage.requests`. Watching is otherwise
read-only: the sweep is unaffected by viewers.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from orpo_ray.config import ExperimentConfig
from orpo_ray.errors import NoSuchRunError, UserError
from orpo_ray.files import read_json
from orpo_ray.reports.live_state import About, Reading, about_sweep
from orpo_ray.storage import requests, results
from orpo_ray.storage.events import Event, Logged, from_json
from orpo_ray.storage.find import find_run_dir
from orpo_ray.storage.journal import JournalError
from orpo_ray.storage.run_dir import EVENTS_FILE, LOCK_FILE, SWEEP_FILE

_CHUNK = 1 << 22
"""Bytes of the journal per read."""
_HEAD_NODE = {"node:__internal_head__": 1e-4}


class WatchError(UserError, RuntimeError):
    """The sweep cannot be watched; the message says why and what to do."""


# ---- reading --------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """A run directory, on this machine or on a cluster."""

    def read(self, sweep_id: str | None, offset: int) -> Reading:
        """Read events from `offset` on; from the beginning if the directory holds a sweep other than `sweep_id`."""

    def ask(self, what: requests.What, trial_id: str | None = None) -> None:
        """See `storage.requests.request`."""


class RunDir:
    """A run directory on this machine. On a cluster this class is an actor on the head node."""

    def __init__(self) -> None:
        """Read nothing before `open`: unlike a constructor's, its errors reach a remote caller unchanged."""
        self._path = Path()
        self._about: About | None = None

    def open(self, name: str, output_dir: str) -> None:
        """Find the sweep.

        Raises:
            NoSuchRunError: there is no sweep of that name.
        """
        self._path = find_run_dir(name, output_dir)
        if not (self._path / SWEEP_FILE).is_file():
            raise NoSuchRunError(
                f"{self._path / SWEEP_FILE}: no such file, so this cannot be watched; see orpo-ray report"
            )

    def read(self, sweep_id: str | None, offset: int) -> Reading:
        """See `Source`.

        Raises:
            DamagedFileError: sweep.json or a line of the journal is damaged.
        """
        # Check the lock first: once the sweep's process is gone, nothing more is written.
        is_running = _is_locked(self._path / LOCK_FILE)
        kept = read_json(self._path / SWEEP_FILE)
        if self._about is None or kept["sweep_id"] != self._about.sweep_id:
            self._about = about_sweep(ExperimentConfig.model_validate(kept["config"]), kept["sweep_id"], self._path)
        if sweep_id != self._about.sweep_id:
            offset = 0
        events, end, size = _read_from(self._path / EVENTS_FILE, offset)
        is_complete = not is_running and not results.is_open(self._path)
        if is_complete:
            is_complete = not results.load_results(self._path).get("interrupted", False)
        return Reading(
            self._about,
            events,
            end,
            end in (size, offset),
            is_running,
            is_complete,
            frozenset(r.trial_id for r in requests.asked_so_far(self._path) if r.trial_id is not None),
            int(time.time() * 1000),
        )

    def ask(self, what: requests.What, trial_id: str | None = None) -> None:
        """See `storage.requests.request`."""
        requests.request(self._path, what, trial_id)


class _Remote:
    """A `RunDir` on the head node of a cluster."""

    def __init__(self, address: str, name: str, output_dir: str) -> None:
        import ray

        self._address = address
        there = ray.remote(num_cpus=0, resources=_HEAD_NODE)(RunDir)
        self._actor = there.remote()
        self._call("open", name, output_dir)

    def read(self, sweep_id: str | None, offset: int) -> Reading:
        reading: Reading = self._call("read", sweep_id, offset)
        return reading

    def ask(self, what: requests.What, trial_id: str | None = None) -> None:
        self._call("ask", what, trial_id)

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=60)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
            raise WatchError(
                f"the head node of the Ray cluster at {self._address} does not answer ({error}). orpo_ray must be "
                "installed there; the sweep itself is not affected"
            ) from error


@contextmanager
def opened(name: str, output_dir: str, address: str | None) -> Iterator[Source]:
    """Open the sweep `name`, below `output_dir` on this machine or on the head node of the Ray cluster at `address`.

    Raises:
        NoSuchRunError: there is no such sweep.
        WatchError: no cluster answers, or a relative path is given for a cluster.
    """
    if address is None:
        here = RunDir()
        here.open(name, output_dir)
        yield here
        return
    if not (Path(output_dir).is_absolute() or Path(name).is_absolute()):
        raise WatchError(
            f"--output-dir {output_dir} is relative, which means nothing on another machine: give the absolute path "
            "that it has on the head node"
        )
    import ray

    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise WatchError(
            f"no Ray cluster answers at {address} ({error}): give ray://HEAD:10001 or, on a machine of the cluster, "
            "auto or the head node's HOST:PORT"
        ) from error
    try:
        yield _Remote(address, name, output_dir)
    finally:
        ray.shutdown()


def _is_locked(path: Path) -> bool:
    """Whether another process holds the lock, tested by taking a shared lock for a moment."""
    if not path.exists():
        return False
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _read_from(path: Path, offset: int) -> tuple[list[Event], int, int]:
    """Events of the complete lines from `offset` on, the offset after them, and the file's size in bytes."""
    if not path.exists():
        return [], 0, 0
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(_CHUNK)
        while len(data) >= _CHUNK and b"\n" not in data and (more := file.read(_CHUNK)):
            data += more
    whole = data[: data.rfind(b"\n") + 1]
    events = []
    for line in whole.splitlines():
        try:
            event = from_json(json.loads(line))
        except ValueError as error:
            raise JournalError(f"{path}: damaged between bytes {offset} and {offset + len(whole)}: {error}") from None
        events.append(_trimmed(event) if isinstance(event, Logged) else event)
    return events, offset + len(whole), path.stat().st_size


def _trimmed(event: Logged) -> Logged:
    """The event with only the training metric that the view shows, so that less is sent between machines."""
    shown = {name: value for name, value in event.metrics.items() if name == "perf/pairs_per_second"}
    return replace(event, metrics=shown)
