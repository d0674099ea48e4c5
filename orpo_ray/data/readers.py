"""Read rows from jsonl, json, csv and parquet files, with limits on row length and decompressed size."""

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
"""Characters held at a time; fewer rows if theirs are more. Tokenizers need some 250 bytes per character."""
MAX_ROW_BYTES = 4 << 20
"""Maximum length of a row, about a million tokens: a row is read into memory whole."""
MAX_ARRAY_BYTES = 512 << 20
"""Maximum size of a JSON array: it is read whole, and takes about ten times its size in memory."""
MAX_INFLATION = 200
"""Maximum ratio of decompressed to compressed size; text has 3 to 10, and gzip reaches 1032 at most."""
_ANY_INFLATION_BYTES = 64 << 20
"""Decompressed size up to which any ratio is accepted."""
_PARQUET_ROWS = 64
"""Rows decoded at a time."""
_MAX_CSV_COLUMNS = 1000
"""Maximum columns of a csv file: every row becomes a dict of all of them."""


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn errors while reading a file into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, ValueError, OverflowError, LookupError, zlib.error, csv.Error, pa.ArrowException) as bad:
        raise DataError(
            f"{file}: cannot be read as {suffix_of(file)}: {bad!s:.300}; it may be cut short, in another format, or "
            "not UTF-8"
        ) from bad


class _Inflated(io.RawIOBase):
    """A gzip file that raises DataError once its decompressed size exceeds the limit."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, gzip.GzipFile(path)
        self._most = max(_ANY_INFLATION_BYTES, MAX_INFLATION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        if self._file.tell() > self._most:
            raise DataError(
                f"{self._path}: decompresses to more than {MAX_INFLATION} times its size, which text does not: it may "
                "be a decompression bomb; if you trust it, unpack it first"
            )
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path) -> io.BufferedReader:
    return io.BufferedReader(_Inflated(path), 1 << 18) if path.suffix == ".gz" else path.open("rb")


def _lines(stream: io.BufferedReader | io.TextIOWrapper, path: Path) -> Iterator[bytes | str]:
    """Lines of bounded length, as bytes or text like the stream."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(
                f"{path}, line {number}: longer than {MAX_ROW_BYTES >> 20} MiB, too long for a row; is there a "
                "line break after every row?"
            )
        yield line


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
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
            except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deeply
                yield number, line[:200]


def _json_array(stream: io.BufferedReader, path: Path) -> list[object]:
    is_too_long = path.suffix != ".gz" and path.stat().st_size > MAX_ARRAY_BYTES
    content = b"" if is_too_long else stream.read(MAX_ARRAY_BYTES + 1)
    if is_too_long or len(content) > MAX_ARRAY_BYTES:
        raise DataError(
            f"{path}: a JSON array of more than {MAX_ARRAY_BYTES >> 20} MiB, which is too large to read into memory; "
            "write it as .jsonl, one row per line"
        )
    try:
        return list(json.loads(content, object_pairs_hook=_object))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: starts like a JSON array but is not valid ({error}); fix it, or write one row per line"
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
            f"{path}: decompresses to {inside} bytes, more than {MAX_INFLATION} times its size, which text does not: "
            "it may be a decompression bomb; if you trust it, write it as .jsonl"
        )
    with pq.ParquetFile(path) as file:
        metadata, names = file.metadata, file.schema_arrow.names
    columns = [name for name in names if name in COLUMNS] if {"chosen", "rejected"} <= set(names) else names
    _require_each_once(columns, path)
    leaves = [metadata.schema.column(number).path for number in range(len(metadata.schema))]
    number = 0
    # As dictionaries: a long value that all rows share is held once, until the length of the rows is known.
    with pq.ParquetFile(path, metadata=metadata, read_dictionary=leaves) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            if _bytes_written_out(batch) > MAX_ROW_BYTES:
                for row in range(len(batch)):
                    if _bytes_written_out(batch.slice(row, 1)) > MAX_ROW_BYTES:
                        at = number + 1 + row
                        raise DataError(f"{path}:{at}: longer than {MAX_ROW_BYTES >> 20} MiB, too long for a row")
            for found in batch.to_pylist():
                number += 1
                yield number, found


def _bytes_written_out(values: Any) -> int:
    """Bytes of a batch or an array if every dictionary value were written out at each use."""
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
        raise DataError(f"{path}: {twice[0]} occurs twice among its {len(columns)} columns; rename or remove one")


READERS: dict[str, Callable[[Path], Iterator[tuple[int, object]]]] = {
    ".jsonl": _read_json,
    ".jsonl.gz": _read_json,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".parquet": _read_parquet,
}
"""File suffix -> function that yields (row number from 1, row); for text files the number is that of the line."""


def suffix_of(path: Path) -> str | None:
    """The suffix in `READERS` that a file name ends with; None for other formats."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), None)
