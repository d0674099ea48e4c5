"""JSON log lines of worker processes, each with its trial and rank, so that a cluster's logs can be searched.

A line goes to the process's standard error, which Ray keeps and its dashboard shows, and to a file of the rank. Fields:
`time` (UTC, ISO 8601, milliseconds), `level`, `logger`, `message`, `group`, `rank`, `node` (Ray's id), `host`, `pid`,
and where they apply `trial_id`, `attempt` and `exception` (a traceback). Based on "Implementing
structured logging" in the logging cookbook of docs.python.org.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from orpo_ray.provenance import without_password

LOGS_DIR = "logs"
"""Folder in the run directory, with files `GROUP-rank-N.jsonl`."""
MAX_BYTES, BACKUPS = 10 * 2**20, 2
"""A file of this size is renamed to `.1`, and `.1` to `.2`, the last backup."""

_log = logging.getLogger(__name__)
_trial: dict[str, Any] = {}
"""Log fields of the trial that this process trains. Global rather than per thread, because a process has one trial at a
time, and threads that prepare batches or finish transfers belong to that trial."""


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON, with passwords removed from addresses."""

    def __init__(self, **where: Any) -> None:
        """Args:
        where: fields added to every line of this process.
        """
        super().__init__()
        self._where = where

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a newline."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": without_password(record.getMessage()),
            **self._where,
            **_trial,
        }
        if record.exc_info:
            entry["exception"] = without_password(self.formatException(record.exc_info))
        return json.dumps(entry, default=str, ensure_ascii=False)


def configure(folder: Path, group: str, rank: int, node: str) -> Path:
    """Send all logging and warnings of this process to standard error and to a file, as JSON.

    orpo_ray logs from INFO on, libraries from WARNING on, unless they set a level of their own.

    Args:
        folder: of the file; created if it is missing.
        group: name of the worker group.
        rank: of this process in it.
        node: Ray's id of the node.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{group}-rank-{rank}.jsonl"
    formatter = JsonFormatter(group=group, rank=rank, node=node, host=socket.gethostname(), pid=os.getpid())
    handlers: list[logging.Handler] = [
        logging.StreamHandler(sys.stderr),
        RotatingFileHandler(file, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8"),
    ]
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    logging.getLogger("orpo_ray").setLevel(logging.INFO)
    logging.captureWarnings(True)
    threading.excepthook = _log_dead_thread
    return file


@contextmanager
def trial(trial_id: str, attempt: int) -> Iterator[None]:
    """Context in which lines logged by any thread carry this trial's fields."""
    _trial.update(trial_id=trial_id, attempt=attempt)
    try:
        yield
    finally:
        _trial.clear()


def adopt_libraries() -> None:
    """Redirect libraries that print their own log lines (DeepSpeed, transformers) to this process's handlers.

    Call it after they are imported. Ray's own loggers are left alone, because Ray reads their output.
    """
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if not isinstance(logger, logging.Logger) or name.partition(".")[0] == "ray":
            continue
        for handler in [h for h in logger.handlers if type(h) is logging.StreamHandler]:
            logger.removeHandler(handler)
            logger.propagate = True


def _log_dead_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit or args.exc_value is None:
        return
    name = args.thread.name if args.thread else "?"
    _log.error("thread %s died", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))
