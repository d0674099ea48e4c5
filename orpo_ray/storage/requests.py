"""A user's requests to a running sweep: lines of `requests.jsonl` in its run directory. No Ray.

A file, not an RPC: any process that sees the run directory can write it, and requests persist until the sweep reads
them. The outcome of a request is recorded in the journal.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

_LAST_MS = 253_402_300_800_000
"""The year 10000, past which `datetime` does not go."""
REQUESTS_FILE = "requests.jsonl"

What = Literal["stop_trial", "stop_sweep"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """One request, a line of the file."""

    what: What
    """`stop_trial`: end that trial at its next evaluation. `stop_sweep`: interrupt the sweep, to be continued."""
    trial_id: str | None
    """Trial to stop; None for `stop_sweep`."""
    time: int
    """Time of the request, in milliseconds since 1970, UTC."""

    @property
    def reason(self) -> str:
        """Reason of the stop, for the journal, the report and MLflow."""
        at = datetime.fromtimestamp(self.time / 1000, UTC)
        return f"stopped by the user at {at:%Y-%m-%d %H:%M:%S} UTC"


def request(run_dir: Path, what: What, trial_id: str | None = None) -> Request:
    """Append a request to the sweep in `run_dir`; the caller checks whether the sweep runs.

    Raises:
        ValueError: `stop_trial` without a trial, or `stop_sweep` with one.
        OSError: the run directory cannot be written.
    """
    if (what == "stop_trial") != (trial_id is not None):
        raise ValueError(f"{what} with trial {trial_id!r}: stop_trial names a trial, stop_sweep names none")
    asked = Request(what, trial_id, int(time.time() * 1000))
    line = json.dumps(asdict(asked)).encode() + b"\n"
    # A single write in append mode, so that lines of several viewers never mix. An incomplete last line is ended first.
    file = os.open(run_dir / REQUESTS_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, b"\n" + line if torn else line)
    finally:
        os.close(file)
    return asked


def asked_so_far(run_dir: Path) -> list[Request]:
    """All requests of a run directory, including old ones; invalid lines are left out."""
    file = run_dir / REQUESTS_FILE
    lines = file.read_bytes().splitlines() if file.exists() else []
    return [found for line in lines if isinstance(found := _parse(line), Request)]


class Inbox:
    """A sweep's requests, each returned once."""

    def __init__(self, run_dir: Path) -> None:
        """Create it when the sweep starts: an existing `stop_sweep` was meant for an earlier run and is ignored.

        An existing `stop_trial` is returned again: its trial may not have ended before a crash, and stopping an ended
        trial has no effect.
        """
        self._path = run_dir / REQUESTS_FILE
        self._began = self._path.stat().st_size if self._path.exists() else 0
        self._offset = 0

    def new(self) -> list[Request]:
        """Requests since the last call. An incomplete line is read later; an invalid line is logged."""
        if not self._path.exists() or self._path.stat().st_size == self._offset:
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        requests = []
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            is_old = self._offset < self._began
            self._offset += len(line)
            found = _parse(line)
            if isinstance(found, str):
                _log.warning("%s: ignored a line: %s", self._path, found)
            elif found is not None and not (is_old and found.what == "stop_sweep"):
                requests.append(found)
        return requests


def _parse(line: bytes) -> Request | str | None:
    """A request, or a text why the line is invalid; None for an empty line."""
    if not line.strip():
        return None
    try:
        fields = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error})"
    match fields:
        case {"what": "stop_trial", "trial_id": str(trial_id), "time": int(at)} if 0 <= at < _LAST_MS:
            return Request("stop_trial", trial_id, at)
        case {"what": "stop_sweep", "time": int(at)} if 0 <= at < _LAST_MS:
            return Request("stop_sweep", None, at)
    return f"not a known request ({' or '.join(get_args(What))}): {fields!r:.200}"
