"""What a user asks of a running sweep: lines of `requests.jsonl` in its run directory, read by the sweep. No Ray.

A file, because whoever can read the journal can also write beside it, and because nobody need listen: the request waits
there until the sweep looks. The journal stays the truth; it tells what has become of a request.
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
    """One line."""

    what: What
    """`stop_trial`: end that trial at its next evaluation. `stop_sweep`: interrupt the sweep, to be continued."""
    trial_id: str | None
    """Of a `stop_trial`, else None."""
    time: int
    """When it was asked, in milliseconds since 1970."""

    @property
    def reason(self) -> str:
        """For the journal, the report and MLflow."""
        at = datetime.fromtimestamp(self.time / 1000, UTC)
        return f"stopped by the user at {at:%Y-%m-%d %H:%M:%S} UTC"


def request(run_dir: Path, what: What, trial_id: str | None = None) -> Request:
    """Ask something of the sweep of `run_dir`; whether it runs is for the caller to see.

    Raises:
        ValueError: `stop_trial` without a trial, or `stop_sweep` with one.
        OSError: the run directory cannot be written.
    """
    if (what == "stop_trial") != (trial_id is not None):
        raise ValueError(f"{what} with trial {trial_id!r}: stop_trial names a trial, stop_sweep names none")
    asked = Request(what, trial_id, int(time.time() * 1000))
    line = json.dumps(asdict(asked)).encode() + b"\n"
    # One write in append mode: lines of several viewers never mix. One that died in the middle of a line gets its end.
    file = os.open(run_dir / REQUESTS_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, b"\n" + line if torn else line)
    finally:
        os.close(file)
    return asked


def asked_so_far(run_dir: Path) -> list[Request]:
    """All requests of a run directory, old ones too; lines that are none are left out."""
    file = run_dir / REQUESTS_FILE
    lines = file.read_bytes().splitlines() if file.exists() else []
    return [found for line in lines if isinstance(found := _parse(line), Request)]


class Inbox:
    """A sweep's requests, each given out once."""

    def __init__(self, run_dir: Path) -> None:
        """Create it when the sweep starts: a `stop_sweep` that is there already was asked of an earlier run.

        A `stop_trial` from before is given out again: that trial may have been left without its end, and to stop one
        that has ended changes nothing.
        """
        self._path = run_dir / REQUESTS_FILE
        self._began = self._path.stat().st_size if self._path.exists() else 0
        self._offset = 0

    def new(self) -> list[Request]:
        """Requests since the last call. A line still being written waits; one that is no request is logged."""
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
                _log.warning("%s: a line is left out: %s", self._path, found)
            elif found is not None and not (is_old and found.what == "stop_sweep"):
                requests.append(found)
        return requests


def _parse(line: bytes) -> Request | str | None:
    """A request, or why it is none; None for an empty line."""
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
    return f"no request that is known here ({' or '.join(get_args(What))}): {fields!r:.200}"
