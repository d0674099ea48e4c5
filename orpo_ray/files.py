"""Write files atomically, and read the JSON files of a run directory."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from orpo_ray.errors import DamagedFileError


def write_atomically(path: Path, data: str | bytes, *, durable: bool = False) -> None:
    """Write a file, replacing an earlier one, such that a reader never sees half of it.

    Args:
        path: the file; its folder is created if missing.
        data: its content; text is written as UTF-8, line ends as they are.
        durable: return only once the content is on the disk (fsync), so that it survives a crash of the machine.
    """
    with replacing(path, durable=durable) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A binary stream that becomes the file when the block ends; if the block raises, the file stays as it was.

    Args:
        path: the file; its folder is created if missing.
        durable: as in `write_atomically`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, and with another suffix: a glob for the folder's files does not match it.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The content of a JSON file that orpo_ray wrote.

    Raises:
        DamagedFileError: it is not JSON.
        OSError: it cannot be opened.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(f"{path}: damaged ({error}); restore it from a copy, or remove it") from None
