"""The sweep's journal: an append-only file and, with an object store, its segments there.

An event is durable when it is on disk and in the store. MLflow and checkpoints act on an event only then: events lost
in a crash were never acted on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
from pathlib import Path

from orpo_ray.errors import UserError
from orpo_ray.storage.events import Event, from_json
from orpo_ray.storage.object_store import Storage, StorageError

FOLDER = "journal"
"""Folder of the segments in the object store. `FIRST-LAST.jsonl` holds the lines of segments FIRST to LAST."""
_SEGMENT = re.compile(rf"{FOLDER}/(\d{{10}})-(\d{{10}})\.jsonl")
_LOCAL_CYCLE_S, _REMOTE_CYCLE_S = 0.05, 0.5
"""Shortest interval between flushes, in seconds; events in between are flushed together."""
_MERGED = 100
"""Segments are merged above this number: each costs a request when a sweep is continued."""

_log = logging.getLogger(__name__)


class JournalError(UserError, ValueError):
    """A line of a journal is damaged; the message names the file and the line."""


class Journal:
    """Appends events from one thread; another thread makes them durable."""

    def __init__(self, path: Path, remote: Storage | None) -> None:
        """Append after the events that `path` holds.

        Args:
            path: the file; with `remote`, as `fetch` left it.
            remote: the sweep's folder in an object store.
        """
        self._path, self._remote = path, remote
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._changed = threading.Condition()
        self._new: list[tuple[str, Event]] = []
        self._durable: list[Event] = []
        self._appended = self._flushed = 0
        self._waiting: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._segments = _segments(remote) if remote else []
        threading.Thread(target=self._run, name="journal", daemon=True).start()

    def append(self, event: Event) -> None:
        """Append one event. It survives a crash of this process at once, and one of the machine after `flushed`."""
        line = json.dumps(event.to_json()) + "\n"
        self._file.write(line)
        self._file.flush()
        with self._changed:
            self._new.append((line, event))
            self._appended += 1
            self._changed.notify()

    def take(self) -> list[Event]:
        """Events that have become durable since the last call, in order."""
        with self._changed:
            durable, self._durable = self._durable, []
        return durable

    async def flushed(self) -> None:
        """Wait until all appended events are durable."""
        loop = asyncio.get_running_loop()
        with self._changed:
            if self._flushed >= self._appended:
                return
            future: asyncio.Future[None] = loop.create_future()
            self._waiting.append((self._appended, loop, future))
        await future

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._new)
            pause.wait(_REMOTE_CYCLE_S if self._remote else _LOCAL_CYCLE_S)
            with self._changed:
                batch, self._new = self._new, []
            os.fsync(self._file.fileno())
            if self._remote is not None:
                self._upload(self._remote, "".join(line for line, _ in batch))
            with self._changed:
                self._durable += [event for _, event in batch]
                self._flushed += len(batch)
                ready = [w for w in self._waiting if w[0] <= self._flushed]
                self._waiting = [w for w in self._waiting if w[0] > self._flushed]
            for _, loop, future in ready:
                loop.call_soon_threadsafe(_resolve, future)

    def _upload(self, remote: Storage, text: str) -> None:
        number = self._segments[-1][1] + 1 if self._segments else 0
        while True:  # no time limit: without its journal the sweep can only wait
            try:
                remote.write(_name(number, number), text.encode())
                self._segments.append((number, number))
                if len(self._segments) > _MERGED:
                    remote.write(_name(0, number), self._path.read_bytes())
                    for old in self._segments:
                        remote.delete(_name(*old))
                    self._segments = [(0, number)]
                return
            except StorageError as error:
                _log.warning("the journal cannot be stored; trials go on, but nothing is reported: %s", error)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():  # the waiting task may have been cancelled
        future.set_result(None)


def fetch(path: Path, remote: Storage) -> bool:
    """Replace a local journal by the one in the object store. Returns whether the store has one."""
    segments = _segments(remote)
    if not segments:
        path.unlink(missing_ok=True)
        return False
    folder = path.with_name(f".{path.name}.segments")
    files = {_name(*s): folder / f"{s[0]}" for s in segments}
    remote.download_all(files)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as whole:
        for file in files.values():
            whole.write(file.read_bytes())
            file.unlink()
    folder.rmdir()
    os.replace(partial, path)
    return True


def _segments(remote: Storage) -> list[tuple[int, int]]:
    """(first, last) of each segment to read, in order; segments covered by a merged one are left out."""
    matches = [m for name in remote.list(FOLDER) if (m := _SEGMENT.fullmatch(name))]
    chosen: list[tuple[int, int]] = []
    for first, last in sorted(((int(m[1]), int(m[2])) for m in matches), key=lambda s: (s[0], -s[1])):
        if not chosen or first > chosen[-1][1]:
            chosen.append((first, last))
    return chosen


def _name(first: int, last: int) -> str:
    return f"{FOLDER}/{first:010d}-{last:010d}.jsonl"


def read_events(path: str | Path) -> list[Event]:
    """Events of a sweep in the order they were written; an empty list if there is no journal yet.

    The last line may be incomplete (the process died while writing it) and is then left out.

    Raises:
        JournalError: any other line is not an event, so the journal is damaged.
    """
    path = Path(path)
    if not path.exists():
        return []
    # Bytes, not text: a torn line can end inside a UTF-8 character.
    lines = path.read_bytes().splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(from_json(json.loads(line)))
        except ValueError as error:
            if number == len(lines):
                break
            raise JournalError(
                f"{path}, line {number}: {error}. Only the last line may be torn; this file was damaged otherwise: "
                "restore it, or delete that line and lose what it recorded"
            ) from None
    return events


def drop_torn_tail(path: Path) -> None:
    """Cut off a line that a crash left incomplete, so that the next event starts on a new line."""
    with path.open("rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            file.truncate(whole)
            os.fsync(file.fileno())
