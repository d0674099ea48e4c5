"""Log lines of worker processes as JSON, each with its trial and rank, so that a cluster's logs can be searched.

A line goes to the process's standard error, which Ray keeps and its dashboard shows, and to a file of the rank. Fields:
`time` (UTC, ISO 8601, milliseconds), `level`, `logger`, `message`, `group`, `rank`, `node` (Ray's id), `host`, `pid`,
and where there is one `trial_id`, `attempt` and `exception` (a traceback). After docs.python.org, logging cookbook,
"implementing structured logging".
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
"""In the run directory: `GROUP-rank-N.jsonl`."""
MAX_BYTES, BACKUPS = 10 * 2**20, 2
"""A file that has grown so far is renamed to `.1`, and that to `.2`, the last."""

_log = logging.getLogger(__name__)
_trial: dict[str, Any] = {}
"""The trial of this process. Of the process, not of a thread or context: it has one trial at a time, and threads that
prepare its batches or end its transfers belong to it."""


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, without the passwords of addresses."""

    def __init__(self, **where: Any) -> None:
        """Args:
        where: fields that every line of this process has.
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

    Of orpo_ray from INFO on, of libraries from WARNING on, unless they set a level of their own.

    Args:
        folder: for the file; made if it is missing.
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
    """Lines logged meanwhile, by whatever thread, are of this trial."""
    _trial.update(trial_id=trial_id, attempt=attempt)
    try:
        yield
    finally:
        _trial.clear()


def adopt_libraries() -> None:
    """Let libraries that print their log lines themselves, as DeepSpeed and transformers do, hand them on instead.

    To be called once they are imported. Ray's own loggers are left alone: Ray reads what they write.
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
