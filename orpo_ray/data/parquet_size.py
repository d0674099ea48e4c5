"""Decompressed size of a parquet file, from the headers of its pages.

A reader allocates for a page the size in the page's header, not the totals in the file's footer
(https://parquet.apache.org/docs/file-format/). Footer and headers use Thrift's compact protocol; this module reads just
enough of it to go from page to page. (pyarrow shows a footer's columns as well, but on a damaged footer
`RowGroupMetaData.column` ends the process with a C++ exception.)
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Wanted = dict[int, Any]
"""Ids of the fields to read from a struct, each with the fields to read from the struct in it; {} for an integer."""

_GROUPS, _ROWS, _COLUMNS, _METADATA = 4, 3, 1, 3
_CHUNK_BYTES, _FIRST_PAGE, _DICTIONARY = 7, 9, 11
"""Fields of a column chunk: its bytes in the file, and where its pages begin."""
_CHUNK: Wanted = {_CHUNK_BYTES: {}, _FIRST_PAGE: {}, _DICTIONARY: {}}
_FOOTER: Wanted = {_GROUPS: {_COLUMNS: {_METADATA: _CHUNK}, _ROWS: {}}}
_INSIDE, _OUTSIDE = 2, 3
_PAGE: Wanted = {_INSIDE: {}, _OUTSIDE: {}}
"""Fields of a page's header: its bytes in memory and in the file."""

_BOOLEANS, _INTEGERS, _BINARY, _LISTS, _STRUCT = (1, 2), (4, 5, 6), 8, (9, 10), 12
_SIZES = {1: 1, 2: 1, 3: 1, 7: 8}
"""Kinds of values in Thrift's compact protocol, and the bytes of those of fixed size."""
_MAX_DEPTH = 16


class _Thrift:
    """Reads structs from a position in a file; raises IndexError past the end."""

    def __init__(self, content: mmap.mmap, at: int) -> None:
        self._content, self.at = content, at

    def struct(self, wanted: Wanted, depth: int = 0) -> dict[int, Any]:
        """The wanted fields that are present: integers, structs, lists of structs."""
        found: dict[int, Any] = {}
        field = 0
        while start := self._byte():
            kind, delta = start & 15, start >> 4
            field = field + delta if delta else self._integer()
            value = None if kind in _BOOLEANS else self._value(kind, wanted.get(field, {}), depth + 1)
            if field in wanted:
                found[field] = value
        return found

    def _value(self, kind: int, wanted: Wanted, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("its metadata is nested too deeply")
        if kind in _INTEGERS:
            return self._integer()
        if kind == _STRUCT:
            return self.struct(wanted, depth)
        if kind in _LISTS:
            start = self._byte()
            count = start >> 4 if start >> 4 != 15 else self._varint()
            if count > len(self._content):
                raise ValueError("its metadata holds a list that is longer than the file")
            values = (self._value(start & 15, wanted, depth + 1) for _ in range(count))
            return [value for value in values if wanted]
        if kind != _BINARY and kind not in _SIZES:
            raise ValueError(f"its metadata holds a value of the unknown kind {kind}")
        size = self._varint() if kind == _BINARY else _SIZES[kind]
        self.at += size
        return None

    def _byte(self) -> int:
        self.at += 1
        return self._content[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("its metadata holds a number of more than 64 bits")

    def _integer(self) -> int:
        coded = self._varint()
        return (coded >> 1) ^ -(coded & 1)


def inflated_bytes(path: Path) -> int:
    """Bytes of all pages of all columns, decompressed.

    Raises:
        ValueError: it is not a parquet file, or is damaged.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
            if content[-4:] != b"PAR1" or footer < 0:
                raise ValueError("it does not end as a parquet file does")
            groups = _Thrift(content, footer).struct(_FOOTER)[_GROUPS]
            chunks = [column[_METADATA] for group in groups if group[_ROWS] for column in group[_COLUMNS]]
            if sum(chunk[_CHUNK_BYTES] for chunk in chunks if chunk[_CHUNK_BYTES] > 0) > len(content):
                raise ValueError("its metadata says that its columns are larger than the file")
            return sum(size for chunk in chunks for size in _pages(content, chunk))
        except (IndexError, KeyError, TypeError):
            raise ValueError("its metadata is damaged") from None


def _pages(content: mmap.mmap, chunk: dict[int, int]) -> Iterator[int]:
    """Bytes of each page of a column chunk, decompressed."""
    at = chunk[_FIRST_PAGE]
    if 0 < chunk.get(_DICTIONARY, 0) < at:
        at = chunk[_DICTIONARY]
    end = at + chunk[_CHUNK_BYTES]
    if not 0 <= at <= end <= len(content):
        raise ValueError("its metadata places a column outside the file")
    while at < end:
        header = _Thrift(content, at)
        page = header.struct(_PAGE)
        if page[_INSIDE] < 0 or page[_OUTSIDE] < 0:
            raise ValueError("a page header has a negative size")
        yield page[_INSIDE]
        at = header.at + page[_OUTSIDE]
