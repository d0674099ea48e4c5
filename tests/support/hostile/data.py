"""Hostile data: files, folders and rows."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.hostile.bounded import within_memory
from tests.support.hostile.case import ROOT, Case, Feed
from tests.support.hostile.pairs import ROW, among_good, data_file, data_path, load_as_a_trial_does, rows


def _sparse(start: bytes) -> Callable[[Path], object]:
    """1 GiB that takes no room on the disk: NUL bytes behind a start."""

    def write(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, 1 << 30)

    return write


def _gzip_bomb(path: Path) -> None:
    member = gzip.compress((b" " * ((1 << 20) - 1) + b"\n") * 16)
    path.write_bytes(member * 64)


def _parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def _varint(number: int, size: int) -> bytes:
    """As Thrift writes it, in so many bytes."""
    coded = number << 1
    return bytes((coded >> 7 * n) & 127 | (128 if n < size - 1 else 0) for n in range(size))


def _lying_parquet(path: Path) -> None:
    """200 MiB in one value, of which the footer says that it is a kilobyte."""
    table = pa.table({name: [text] for name, text in (ROW | {"chosen": "x" * (200 << 20)}).items()})
    content = bytearray(_parquet(table, compression="zstd", use_dictionary=False, write_statistics=False))
    metadata = pq.ParquetFile(io.BytesIO(bytes(content))).metadata.row_group(0)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for size in (metadata.total_byte_size, metadata.column(1).total_uncompressed_size):
        written = _varint(size, 5)
        at = content.index(written, footer)
        content[at : at + 5] = _varint(1000, 5)
    assert pq.ParquetFile(io.BytesIO(bytes(content))).metadata.row_group(0).total_byte_size == 1000
    path.write_bytes(content)


def _one_value_for_all(path: Path) -> None:
    """One text of 40 MiB, which 64 messages of one row refer to: 2.5 GiB in 3 kB."""
    talk = pa.StructArray.from_arrays(
        [
            pa.array(["user", "assistant"] * 32),
            pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array(["x" * (40 << 20)])),
        ],
        ["role", "content"],
    )
    table = pa.table({"chosen": pa.ListArray.from_arrays([0, 64], talk), "rejected": ["That."]})
    pq.write_table(table, path, compression="zstd", store_schema=False)


def _every_byte_damaged(folder: Path) -> Feed:
    """Files that differ in one byte of their footer; read elsewhere, since a reader in C++ may end its process."""
    content = _parquet(pa.Table.from_pylist(rows(3)))
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for at in range(footer, len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 0xFF
        (folder / f"{at}.parquet").write_bytes(damaged)

    def feed() -> str:
        code = (
            "import pathlib, sys\n"
            "from orpo_ray.config import DataConfig\n"
            "from orpo_ray.data.rows import DataError\n"
            "from orpo_ray.data.sources import choose_splits\n"
            "outcomes = [0, 0]\n"
            "for path in sorted(pathlib.Path(sys.argv[1]).glob('*.parquet')):\n"
            "    try:\n"
            "        outcomes[0] += len(list(choose_splits(DataConfig(path=str(path)))[0].read())) == 3\n"
            "    except DataError as error:\n"
            "        assert path.name in str(error)\n"
            "        outcomes[1] += 1\n"
            "print(sum(outcomes), *outcomes)\n"
        )
        command = [sys.executable, "-c", code, str(folder)]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
        assert ran.returncode == 0, ran.stderr[-2000:]
        total, whole, refused = map(int, ran.stdout.split())
        assert total == len(content) - footer
        assert refused > whole
        return "each is refused with its name, or is still read whole"

    return feed


def _fifo(folder: Path) -> Feed:
    os.mkfifo(folder / "pairs.jsonl")
    return lambda: load_as_a_trial_does(folder / "pairs.jsonl", folder)


def _device(folder: Path) -> Feed:
    (folder / "pairs.jsonl").symlink_to("/dev/zero")
    return lambda: load_as_a_trial_does(folder / "pairs.jsonl", folder)


def _link_to_itself(folder: Path) -> Feed:
    (folder / "pairs.jsonl").symlink_to(folder / "pairs.jsonl")
    return lambda: load_as_a_trial_does(folder / "pairs.jsonl", folder)


def _folder_in_itself(folder: Path) -> Feed:
    data = folder / "data"
    (data / "inner").mkdir(parents=True)
    (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows(10))))
    (data / "inner" / "back").symlink_to(data)
    (data / "endless.jsonl").symlink_to("/dev/zero")
    return lambda: f"links to folders and devices are left out; {load_as_a_trial_does(data, folder)}"


def _traversal(folder: Path) -> Feed:
    (folder / "secret").write_text("x")
    (folder / "data").mkdir()
    return lambda: load_as_a_trial_does(folder / "data" / ".." / "secret", folder)


def _many_columns() -> bytes:
    return json.dumps({f"\x1b[2J{n}": n for n in range(50_000)}).encode()


_WRONG_TYPES = [
    "[]",
    "5",
    "null",
    '"text"',
    '{"prompt": "Q", "chosen": 5, "rejected": "b"}',
    '{"prompt": "Q", "chosen": ["a"], "rejected": "b"}',
    '{"prompt": {"role": "user"}, "chosen": "a", "rejected": "b"}',
    '{"prompt": "Q", "chosen": [{"role": "assistant", "content": null}], "rejected": "b"}',
    '{"prompt": "Q", "system": 1, "chosen": "a", "rejected": "b"}',
]

_DATA = [
    (
        "a line of 1 GiB",
        within_memory("pairs.jsonl", _sparse(b'{"prompt": "')),
        "line 1: longer than 4 MiB, too long for a row",
    ),
    ("a JSON array of 1 GiB", within_memory("pairs.json", _sparse(b"[1,")), "a JSON array of more than 512 MiB"),
    (
        "a CSV field of 1 GiB",
        within_memory("pairs.csv", _sparse(b'prompt,chosen,rejected\n"')),
        "line 2: longer than 4 MiB",
    ),
    (
        "a CSV field that a quote leaves open over a million lines",
        data_file("pairs.csv", lambda: b'prompt,chosen,rejected\n"' + b"x,\n" * 2_000_000),
        "field larger than field limit",
    ),
    (
        "a gzip bomb, 1 GiB in 1 MB",
        within_memory("pairs.jsonl.gz", _gzip_bomb),
        "decompresses to more than 200 times its size",
    ),
    (
        "gzip cut short",
        data_file("pairs.jsonl.gz", lambda: gzip.compress("\n".join(map(json.dumps, rows(99))).encode())[:-20]),
        "cannot be read as .jsonl.gz: Compressed file ended before",
    ),
    ("text named .gz", data_file("pairs.jsonl.gz", b"{}"), "cannot be read as .jsonl.gz: Not a gzipped file"),
    (
        "parquet that says 1 kB and is 200 MiB inside",
        within_memory("pairs.parquet", _lying_parquet),
        "bytes, more than 200 times its size",
    ),
    (
        "parquet in which 64 messages are one text of 40 MiB",
        within_memory("pairs.parquet", _one_value_for_all),
        "pairs.parquet:1: longer than 4 MiB, too long for a row",
    ),
    (
        "parquet cut short",
        data_file("pairs.parquet", lambda: _parquet(pa.Table.from_pylist(rows(9)))[:-300]),
        "it does not end as a parquet file does",
    ),
    (
        "parquet with text that is not UTF-8",
        data_file(
            "pairs.parquet",
            lambda: _parquet(
                pa.table({"prompt": ["Q"], "chosen": pa.array([b"\xff\xfe"]).view(pa.string()), "rejected": ["b"]})
            ),
        ),
        "cannot be read as .parquet: 'utf-8' codec can't decode",
    ),
    (
        "parquet with one name for two fields of a message",
        data_file(
            "pairs.parquet",
            lambda: _parquet(
                pa.table(
                    {
                        "chosen": pa.ListArray.from_arrays(
                            [0, 1], pa.StructArray.from_arrays([pa.array(["a"])] * 2, ["role", "role"])
                        ),
                        "rejected": ["b"],
                    }
                )
            ),
        ),
        "cannot be read as .parquet: … duplicate field names",
    ),
    (
        "CSV that is not UTF-8",
        data_file("pairs.csv", b"prompt,chosen,rejected\nQ,\xff\xfe,b\n"),
        "cannot be read as .csv: 'utf-8' codec can't decode",
    ),
    (
        "CSV with 300,000 columns",
        data_file("pairs.csv", lambda: ",".join(map(str, range(300_000))).encode() + b"\n1\n"),
        "300000 columns; at most 1000 are read",
    ),
    (
        "CSV with the column `rejected` twice",
        data_file("pairs.csv", b"prompt,chosen,rejected,rejected\nQ,a,b,c\n"),
        "rejected occurs twice among its",
    ),
    (
        "a row of 50,000 columns that are control sequences",
        data_file("pairs.jsonl", _many_columns),
        "hold no pair … accepted shapes of a row",
    ),
    (
        "JSON 1,000,000 levels deep, as an array",
        data_file("pairs.json", b"[" * 1_000_000),
        "starts like a JSON array but is not valid",
    ),
    (
        "a malformed row under `on_bad_rows: error`",
        among_good('{"chosen": 1}', on_bad_rows="error"),
        "pairs.jsonl:6: chosen is neither text nor a list of messages: 1; fix the row",
    ),
    ("`data.path` that leads to another kind of file", _traversal, "unknown format"),
    ("`data.path: ../../no/such`", data_path("../../no/such"), "not a valid name of a hub dataset"),
    (
        "`data.path: https://...`, `s3://...`",
        data_path("https://example.org/x.jsonl"),
        "not a valid name of a hub dataset",
    ),
    (
        "`data.path: json`, which `datasets` takes for the current folder",
        data_path("json"),
        "the name of a format, not of a dataset",
    ),
    ("a named pipe", _fifo, "neither a file nor a folder"),
    ("a link to `/dev/zero` named .jsonl", _device, "neither a file nor a folder"),
    ("a link to itself", _link_to_itself, "no such file or folder here"),
]
_DATA_ACCEPTED = [
    (
        "parquet with one byte of its footer damaged, each in turn",
        _every_byte_damaged,
        "each is refused with its name, or is still read whole",
    ),
    (
        "a folder with links to itself and to `/dev/zero`",
        _folder_in_itself,
        "links to folders and devices are left out; read, 8 pairs to train on",
    ),
    (
        "a line that is not UTF-8",
        among_good(b'{"prompt": "Q", "chosen": "\xff", "rejected": "b"}'),
        "dropped and counted (dropped_malformed 1), 8 pairs to train on",
    ),
    (
        "a NUL character in an answer",
        among_good(r'{"prompt": "Q", "chosen": "a\u0000b", "rejected": "b"}'),
        "dropped and counted (dropped_malformed 1), 8 pairs to train on",
    ),
    (
        "half of a surrogate pair",
        among_good(r'{"prompt": "Q", "chosen": "\ud83d", "rejected": "b"}'),
        "dropped and counted (dropped_malformed 1), 8 pairs to train on",
    ),
    (
        "the same key twice in an object",
        among_good('{"prompt": "Q", "chosen": "a", "rejected": "b", "chosen": "c"}'),
        "dropped and counted (dropped_malformed 1), 8 pairs to train on",
    ),
    (
        "a line of JSON 100,000 levels deep",
        among_good('{"a":' * 100_000),
        "dropped and counted (dropped_malformed 1), 8 pairs to train on",
    ),
    (
        "numbers of 5,000 digits, NaN",
        among_good('{"prompt": ' + "9" * 5000 + "}", '{"prompt": NaN, "chosen": "a", "rejected": "b"}'),
        "dropped and counted (dropped_malformed 2), 8 pairs to train on",
    ),
    (
        "values of every wrong type",
        among_good(*_WRONG_TYPES),
        f"dropped and counted (dropped_malformed {len(_WRONG_TYPES)}), 8 pairs to train on",
    ),
    (
        "an answer of 300,000 end-of-turn tokens",
        among_good(json.dumps(ROW | {"chosen": "</s>" * 300_000 + "x"})),
        "read, 9 pairs to train on",
    ),
    (
        "parquet with a date past the year 9999 in a column beside",
        data_file(
            "pairs.parquet",
            lambda: _parquet(
                pa.Table.from_pylist(rows(10)).append_column(
                    "when", pa.array([2**31 - 1] * 10, pa.int32()).cast(pa.date32())
                )
            ),
        ),
        "read, 8 pairs to train on",
    ),
]

CASES = [
    *(Case("Data", what, make, "DataError", says) for what, make, says in _DATA),
    *(Case("Data", what, make, None, says) for what, make, says in _DATA_ACCEPTED),
]
