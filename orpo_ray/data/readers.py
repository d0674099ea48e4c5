"""Read rows from jsonl, json, csv and parquet files, and refuse files that would expand beyond their limits."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orpo_ray.data import parquet_size
from orpo_ray.data.rows import COLUMNS, DataError

BATCH_ROWS = 1000
"""Rows held in memory as Python objects at a time."""
BATCH_CHARACTERS = 1 << 23
"""And fewer, where their texts are longer than this: tokenizers need some 250 bytes per character."""
MAX_ROW_BYTES = 4 << 20
"""Longest row: some million tokens. What is longer is no row, and would be read into memory whole."""
MAX_ARRAY_BYTES = 512 << 20
"""Longest file that is one JSON array: it is read whole, at about ten times its size in memory."""
MAX_INFLATION = 200
"""Compressed files may be so many times larger inside; text is 3 to 10 times, gzip ends at 1032 times."""
_ANY_INFLATION_BYTES = 64 << 20
"""Up to this size, however compressed."""
_PARQUET_ROWS = 64
"""Rows decoded at a time."""
_MAX_CSV_COLUMNS = 1000
"""Every row becomes a dict of all of them."""


@contextlib.contextmanager
def naming_file(file: Path) -> Iterator[None]:
    """Raise what goes wrong while a file is read as a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, ValueError, OverflowError, LookupError, zlib.error, csv.Error, pa.ArrowException) as bad:
        raise DataError(
            f"{file}: cannot be read as {suffix_of(file)}: {bad!s:.300}; was it cut short, is it another format, or "
            "text that is not UTF-8?"
        ) from bad


class _Inflated(io.RawIOBase):
    """A gzip file that stops where it becomes absurdly larger than it is on disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, gzip.GzipFile(path)
        self._most = max(_ANY_INFLATION_BYTES, MAX_INFLATION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        if self._file.tell() > self._most:
            raise DataError(
                f"{self._path}: more than {MAX_INFLATION} times as large inside as on disk, which text is not: a "
                "decompression bomb? If you know that it is not, unpack it"
            )
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path) -> io.BufferedReader:
    return io.BufferedReader(_Inflated(path), 1 << 18) if path.suffix == ".gz" else path.open("rb")


def _lines(stream: io.BufferedReader | io.TextIOWrapper, path: Path) -> Iterator[bytes | str]:
    """Lines of bounded length, in whatever the stream gives."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(
                f"{path}, line {number}: longer than {MAX_ROW_BYTES >> 20} MiB, which no row is; does a line end "
                "behind every row?"
            )
        yield line


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands in one object twice")
    return found


def _read_json(path: Path) -> Iterator[tuple[int, object]]:
    with _open(path) as stream:
        start = stream.peek(4096)[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
        if start.startswith(b"["):
            yield from enumerate(_json_array(stream, path), start=1)
            return
        for number, line in enumerate(_lines(stream, path), start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError):  # not JSON, not UTF-8, or lists in lists in lists
                yield number, line[:200]


def _json_array(stream: io.BufferedReader, path: Path) -> list[object]:
    is_too_long = path.suffix != ".gz" and path.stat().st_size > MAX_ARRAY_BYTES
    content = b"" if is_too_long else stream.read(MAX_ARRAY_BYTES + 1)
    if is_too_long or len(content) > MAX_ARRAY_BYTES:
        raise DataError(
            f"{path}: a JSON array of more than {MAX_ARRAY_BYTES >> 20} MiB, which would be read into memory whole; "
            "write it as .jsonl, a row per line"
        )
    try:
        return list(json.loads(content, object_pairs_hook=_object))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: begins as a JSON array and is none ({error}); write a row per line, or mend it"
        ) from None


def _read_csv(path: Path) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(MAX_ROW_BYTES)  # the default, 128 KiB, is shorter than some conversations
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(cast(Iterator[str], _lines(text, path)))
        if reader.fieldnames is None:
            return
        if len(reader.fieldnames) > _MAX_CSV_COLUMNS:
            raise DataError(f"{path}: {len(reader.fieldnames)} columns; at most {_MAX_CSV_COLUMNS} are read")
        _require_each_once(reader.fieldnames, path)
        line = reader.line_num + 1
        for row in reader:
            yield line, row
            line = reader.line_num + 1


def _read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    inside = parquet_size.inflated_bytes(path)
    if inside > max(_ANY_INFLATION_BYTES, MAX_INFLATION * path.stat().st_size):
        raise DataError(
            f"{path}: holds {inside} bytes, more than {MAX_INFLATION} times its size on disk, which text is not: a "
            "decompression bomb? If you know that it is not, write it as .jsonl"
        )
    with pq.ParquetFile(path) as file:
        metadata, names = file.metadata, file.schema_arrow.names
    columns = [name for name in names if name in COLUMNS] if {"chosen", "rejected"} <= set(names) else names
    _require_each_once(columns, path)
    leaves = [metadata.schema.column(number).path for number in range(len(metadata.schema))]
    number = 0
    # As dictionaries: one long value may stand in all rows, and is held once until it is known how long they become.
    with pq.ParquetFile(path, metadata=metadata, read_dictionary=leaves) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            if _bytes_written_out(batch) > MAX_ROW_BYTES:
                for row in range(len(batch)):
                    if _bytes_written_out(batch.slice(row, 1)) > MAX_ROW_BYTES:
                        at = number + 1 + row
                        raise DataError(f"{path}:{at}: longer than {MAX_ROW_BYTES >> 20} MiB, which no row is")
            for found in batch.to_pylist():
                number += 1
                yield number, found


def _bytes_written_out(values: Any) -> int:
    """Bytes of a batch or an array with every value of a dictionary as often as it is used."""
    if isinstance(values, pa.RecordBatch):
        return sum(map(_bytes_written_out, values.columns))
    kind = values.type
    if pa.types.is_dictionary(kind):
        return pc.sum(pc.take(pc.binary_length(values.dictionary), values.indices)).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(map(_bytes_written_out, values.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _bytes_written_out(values.flatten())
    return int(values.nbytes)


def _require_each_once(columns: Sequence[str], path: Path) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1 and name in COLUMNS]
    if twice:
        raise DataError(f"{path}: {len(columns)} columns, {twice[0]} is among them twice; which of the two is meant?")


READERS: dict[str, Callable[[Path], Iterator[tuple[int, object]]]] = {
    ".jsonl": _read_json,
    ".jsonl.gz": _read_json,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".parquet": _read_parquet,
}


def suffix_of(path: Path) -> str | None:
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), None)
