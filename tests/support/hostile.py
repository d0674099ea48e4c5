"""Hostile inputs and what becomes of each: `python -m tests.support.hostile` lists them.

Every case is fed to what reads such a thing in earnest. Wherever one would run code, the code leaves a file `ran`.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.cluster.upload import files_to_send
from orpo_ray.config import CheckpointConfig, DataConfig, ModelConfig, load
from orpo_ray.data.rows import BadRow, DataError, parse_row
from orpo_ray.data.sources import choose_splits
from orpo_ray.storage.object_store import Storage

PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"
_ROOT = Path(__file__).resolve().parents[2]
_MOST_MIB = 256
"""Memory that reading may add, where a case is about memory."""

Feed = Callable[[], object]
Make = Callable[[Path], Feed]


@dataclass(frozen=True)
class Case:
    """One hostile input."""

    kind: str
    what: str
    """As it stands in the table."""
    make: Make
    """Puts the input into an empty folder; what it returns feeds it to the reader."""
    error: str | None
    """Name of the exception; None where the input is accepted, and what is done with it is returned as text."""
    says: str
    """What the message, or that text, must contain; ` … ` stands for anything."""

    @property
    def pattern(self) -> str:
        """`says` as a regular expression."""
        return ".*".join(re.escape(part) for part in self.says.split(" … "))


# ---- experiment files -----------------------------------------------------------------------------------------------

_GOOD = "name: a\nmodel: {path: tiny-llama-1m}\ndata: {path: 'builtin://style-pairs'}\ntrain: {max_steps: 5}\n"


def _experiment(more: str | bytes = "", *overrides: str, instead: bool = False) -> Make:
    """A good experiment file with something added to it, or put in its place."""

    def make(folder: Path) -> Feed:
        added = more.replace("FOLDER", str(folder)).encode() if isinstance(more, str) else more
        (folder / "x.yaml").write_bytes(added if instead else _GOOD.encode() + added)
        given = [override.replace("FOLDER", str(folder)) for override in overrides]
        return lambda: load(folder / "x.yaml", given)

    return make


def _laughs() -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    return "\n".join(lines)


def _grids(axes: Iterable[str]) -> str:
    values = ", ".join(f"0.{digit}" for digit in range(1, 10))
    return "sweep:\n  space:\n" + "".join(f"    {axis}: {{type: grid, values: [{values}]}}\n" for axis in axes)


def _device_as_experiment(folder: Path) -> Feed:
    (folder / "x.yaml").symlink_to("/dev/zero")
    return lambda: load(folder / "x.yaml")


def _tracking_password(folder: Path) -> Feed:
    (folder / "x.yaml").write_text(_GOOD + "tracking: {uri: 'http://me:hunter2@mlflow:5000'}\n")

    def feed() -> str:
        config = load(folder / "x.yaml")
        assert config.tracking.uri == "http://me:hunter2@mlflow:5000"
        written = config.model_dump_json()
        assert "hunter2" not in written
        return f"used, and written down without it: {json.loads(written)['tracking']['uri']}"

    return feed


def _shared_by_alias(folder: Path) -> Feed:
    (folder / "x.yaml").write_text("name: a\nmodel: &m {path: one}\ndata: *m\ntrain: {max_steps: 5}\n")

    def feed() -> str:
        config = load(folder / "x.yaml", ["model.path=two"])
        return f"changes the one that is named: model {config.model.path}, data {config.data.path}"

    return feed


_EXPERIMENTS = [
    (
        "billion laughs: ten levels of nine aliases each",
        _experiment(_laughs()),
        "more than 50000 values, with aliases expanded",
    ),
    (
        "a long text used 300 times by alias",
        _experiment(f"x: &a {'x' * 200_000}\ny: [{', '.join(['*a'] * 300)}]\n"),
        "more than 2097152 characters, with aliases expanded",
    ),
    ("10,000 brackets within each other", _experiment("x: " + "[" * 10_000), "brackets within brackets, more than 32"),
    (
        "40 mappings within each other",
        _experiment("x:\n" + "".join("  " * n + "a:\n" for n in range(1, 41))),
        "more than 32 levels deep, on line",
    ),
    ("an alias that contains itself", _experiment("x: &a [*a]\n"), "does an alias contain itself?"),
    (
        "a list of merge keys, which grows like aliases",
        _experiment("x: &a {b: 1}\ny: {<<: [*a, *a]}\n"),
        "takes one alias here",
    ),
    (
        "`!!python/object/apply:os.system`",
        _experiment("x: !!python/object/apply:os.system ['touch FOLDER/ran']\n"),
        "tags create objects; remove it",
    ),
    ("the same key twice", _experiment("name: b\n"), "key 'name' occurs twice in one mapping, on line 5"),
    ("a NUL byte", _experiment(b"x: a\0b\n"), "not valid YAML: … special characters are not allowed"),
    (
        "a terminal's control sequence, escaped",
        _experiment('x: "\\e]0;gone\\a"\n'),
        "unprintable character U+001B",
    ),
    ("half of a surrogate pair, escaped", _experiment('x: "\\ud800"\n'), "unprintable character U+D800"),
    ("bytes that are not UTF-8", _experiment(b"x: \xff\xfe\n"), "not UTF-8 text"),
    ("2 MiB of it", _experiment("#" * (2 << 20)), "larger than 1 MiB, too large for an experiment file"),
    ("a number of 5,000 digits", _experiment("x: " + "9" * 5000 + "\n"), "a number of 5000 characters, on line 5"),
    (
        "a number of base 60 with 200,000 places",
        _experiment("x: 1" + ":1" * 200_000 + "\n"),
        "a number of 400001 characters, on line 5",
    ),
    ("an integer of 70 bits", _experiment(f"x: {2**70}\n"), "an integer needs more than 64 bits"),
    (
        "a learning rate that is not a number",
        _experiment("optim: {lr: .nan}\n"),
        "optim.lr: Input should be a finite number",
    ),
    ("an infinite learning rate", _experiment("optim: {lr: 1.0e+999}\n"), "optim.lr: Input should be a finite number"),
    (
        "`name: ../../etc`",
        _experiment(_GOOD.replace("name: a", "name: ../../etc"), instead=True),
        "name: String should match pattern",
    ),
    ("`output_dir` that is a file", _experiment("output_dir: FOLDER/x.yaml\n"), "exists but is not a directory"),
    ("a path of 100,000 characters", _experiment("", "data.path=" + "a" * 100_000), "neither a path nor a hub name"),
    (
        "20,000 unknown keys",
        _experiment("".join(f"k{n}x: 1\n" for n in range(20_000))),
        "20000 problem(s) … and 19950 more",
    ),
    (
        "a grid of 43 million cells",
        _experiment(
            _grids(f"optim.{name}" for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "warmup_ratio"))
            + _grids(["loss.orpo_lambda", "loss.temperature"]).partition("space:\n")[2]
        ),
        "43046721 trials … more than 100000",
    ),
    (
        "an override with a tag",
        _experiment("", "optim.lr=!!python/object/apply:os.system ['touch FOLDER/ran']"),
        "override … is not valid YAML: tag … tags create objects",
    ),
    ("an override of what is no setting", _experiment("", "model.__class__=x"), "model.__class__: unknown key"),
    (
        "an override below a value",
        _experiment("", "model.path.x=1"),
        "path is a value ('tiny-llama-1m'), not a section",
    ),
    ("a device in place of the file", _device_as_experiment, "x.yaml: not a file"),
    (
        "`storage` with credentials in its address",
        _experiment("storage: 's3://key:secret@bucket/orpo'\n"),
        "storage must not contain credentials",
    ),
]
_EXPERIMENTS_ACCEPTED = [
    ("`tracking.uri` with a password", _tracking_password, "used, and written down without it: http://mlflow:5000"),
    (
        "an override of a section that an alias shares",
        _shared_by_alias,
        "changes the one that is named: model two, data one",
    ),
]


# ---- data -----------------------------------------------------------------------------------------------------------

_ROW = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}


def _rows(count: int) -> list[dict[str, str]]:
    return [{name: f"{text} {number}" for name, text in _ROW.items()} for number in range(count)]


@functools.cache
def _tokenizer() -> Any:
    from orpo_ray.models.loading import load_tokenizer

    return load_tokenizer(ModelConfig(path="tiny-llama-1m"))


def _load(path: Path | str, folder: Path, **settings: Any) -> str:
    """Read pairs as a trial does; what has become of the rows."""
    from orpo_ray.data.dataset import load_pairs

    settings = {"eval_pairs": 2, "cache_dir": str(folder / "cache")} | settings
    pairs, _ = load_pairs(DataConfig(path=str(path), **settings), _tokenizer())
    dropped = [f"{name} {count}" for name, count in pairs.counts.items() if count and name.startswith("dropped_")]
    start = f"dropped and counted ({', '.join(dropped)}), " if dropped else "read, "
    return f"{start}{len(pairs)} pairs to train on"


def _data(name: str, content: bytes | Callable[[], bytes], **settings: Any) -> Make:
    """A file of pairs."""

    def make(folder: Path) -> Feed:
        (folder / name).write_bytes(content() if callable(content) else content)
        return lambda: _load(folder / name, folder, **settings)

    return make


def _among_good(*lines: str | bytes, **settings: Any) -> Make:
    """Lines among ten good rows."""
    good = [json.dumps(row).encode() for row in _rows(10)]
    bad = [line.encode() if isinstance(line, str) else line for line in lines]
    return _data("pairs.jsonl", b"\n".join([*good[:5], *bad, *good[5:]]), **settings)


def _path(path: str, **settings: Any) -> Make:
    return lambda folder: lambda: _load(path, folder, **settings)


def _within_memory(name: str, write: Callable[[Path], object]) -> Make:
    """A file that is read in a process of its own, which must not need much memory for it."""

    def make(folder: Path) -> Feed:
        write(folder / name)

        def feed() -> str:
            command = [sys.executable, "-m", "tests.support.hostile", "--read", str(folder / name)]
            ran = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, timeout=100)
            assert ran.returncode == 0, ran.stderr[-2000:]
            told = json.loads(ran.stdout.splitlines()[-1])
            assert told["mib"] < _MOST_MIB, f"reading added {told['mib']} MiB"
            if told["error"] is not None:
                raise DataError(told["error"])
            return str(told["rows"])

        return feed

    return make


def _read(path: Path) -> None:
    """Tell what reading a file gives, and how many MiB more than before this process held at most."""
    before = _peak_mib()
    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    error, good, bad = None, 0, 0
    try:
        for _, row in choose_splits(DataConfig(path=str(path)))[0].read():
            try:
                parse_row(row)
                good += 1
            except BadRow:
                bad += 1
    except DataError as found:
        error = str(found)
    print(json.dumps({"error": error, "rows": f"{good} good, {bad} bad", "mib": _peak_mib() - before}))


def _peak_mib() -> int:
    """Of this program; `getrusage` counts what the process was before its exec as well."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) >> 10


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
    table = pa.table({name: [text] for name, text in (_ROW | {"chosen": "x" * (200 << 20)}).items()})
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
    content = _parquet(pa.Table.from_pylist(_rows(3)))
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
        ran = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, timeout=100)
        assert ran.returncode == 0, ran.stderr[-2000:]
        total, whole, refused = map(int, ran.stdout.split())
        assert total == len(content) - footer
        assert refused > whole
        return "each is refused with its name, or is still read whole"

    return feed


def _fifo(folder: Path) -> Feed:
    os.mkfifo(folder / "pairs.jsonl")
    return lambda: _load(folder / "pairs.jsonl", folder)


def _device(folder: Path) -> Feed:
    (folder / "pairs.jsonl").symlink_to("/dev/zero")
    return lambda: _load(folder / "pairs.jsonl", folder)


def _link_to_itself(folder: Path) -> Feed:
    (folder / "pairs.jsonl").symlink_to(folder / "pairs.jsonl")
    return lambda: _load(folder / "pairs.jsonl", folder)


def _folder_in_itself(folder: Path) -> Feed:
    data = folder / "data"
    (data / "inner").mkdir(parents=True)
    (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, _rows(10))))
    (data / "inner" / "back").symlink_to(data)
    (data / "endless.jsonl").symlink_to("/dev/zero")
    return lambda: f"links to folders and devices are left out; {_load(data, folder)}"


def _traversal(folder: Path) -> Feed:
    (folder / "secret").write_text("x")
    (folder / "data").mkdir()
    return lambda: _load(folder / "data" / ".." / "secret", folder)


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
        _within_memory("pairs.jsonl", _sparse(b'{"prompt": "')),
        "line 1: longer than 4 MiB, too long for a row",
    ),
    ("a JSON array of 1 GiB", _within_memory("pairs.json", _sparse(b"[1,")), "a JSON array of more than 512 MiB"),
    (
        "a CSV field of 1 GiB",
        _within_memory("pairs.csv", _sparse(b'prompt,chosen,rejected\n"')),
        "line 2: longer than 4 MiB",
    ),
    (
        "a CSV field that a quote leaves open over a million lines",
        _data("pairs.csv", lambda: b'prompt,chosen,rejected\n"' + b"x,\n" * 2_000_000),
        "field larger than field limit",
    ),
    (
        "a gzip bomb, 1 GiB in 1 MB",
        _within_memory("pairs.jsonl.gz", _gzip_bomb),
        "decompresses to more than 200 times its size",
    ),
    (
        "gzip cut short",
        _data("pairs.jsonl.gz", lambda: gzip.compress("\n".join(map(json.dumps, _rows(99))).encode())[:-20]),
        "cannot be read as .jsonl.gz: Compressed file ended before",
    ),
    ("text named .gz", _data("pairs.jsonl.gz", b"{}"), "cannot be read as .jsonl.gz: Not a gzipped file"),
    (
        "parquet that says 1 kB and is 200 MiB inside",
        _within_memory("pairs.parquet", _lying_parquet),
        "bytes, more than 200 times its size",
    ),
    (
        "parquet in which 64 messages are one text of 40 MiB",
        _within_memory("pairs.parquet", _one_value_for_all),
        "pairs.parquet:1: longer than 4 MiB, too long for a row",
    ),
    (
        "parquet cut short",
        _data("pairs.parquet", lambda: _parquet(pa.Table.from_pylist(_rows(9)))[:-300]),
        "it does not end as a parquet file does",
    ),
    (
        "parquet with text that is not UTF-8",
        _data(
            "pairs.parquet",
            lambda: _parquet(
                pa.table({"prompt": ["Q"], "chosen": pa.array([b"\xff\xfe"]).view(pa.string()), "rejected": ["b"]})
            ),
        ),
        "cannot be read as .parquet: 'utf-8' codec can't decode",
    ),
    (
        "parquet with one name for two fields of a message",
        _data(
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
        _data("pairs.csv", b"prompt,chosen,rejected\nQ,\xff\xfe,b\n"),
        "cannot be read as .csv: 'utf-8' codec can't decode",
    ),
    (
        "CSV with 300,000 columns",
        _data("pairs.csv", lambda: ",".join(map(str, range(300_000))).encode() + b"\n1\n"),
        "300000 columns; at most 1000 are read",
    ),
    (
        "CSV with the column `rejected` twice",
        _data("pairs.csv", b"prompt,chosen,rejected,rejected\nQ,a,b,c\n"),
        "rejected occurs twice among its",
    ),
    (
        "a row of 50,000 columns that are control sequences",
        _data("pairs.jsonl", _many_columns),
        "hold no pair … accepted shapes of a row",
    ),
    (
        "JSON 1,000,000 levels deep, as an array",
        _data("pairs.json", b"[" * 1_000_000),
        "starts like a JSON array but is not valid",
    ),
    (
        "a malformed row under `on_bad_rows: error`",
        _among_good('{"chosen": 1}', on_bad_rows="error"),
        "pairs.jsonl:6: chosen is neither text nor a list of messages: 1; fix the row",
    ),
    ("`data.path` that leads to another kind of file", _traversal, "unknown format"),
    ("`data.path: ../../no/such`", _path("../../no/such"), "not a valid name of a hub dataset"),
    (
        "`data.path: https://...`, `s3://...`",
        _path("https://example.org/x.jsonl"),
        "not a valid name of a hub dataset",
    ),
    (
        "`data.path: json`, which `datasets` takes for the current folder",
        _path("json"),
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
        _among_good(b'{"prompt": "Q", "chosen": "\xff", "rejected": "b"}'),
        "dropped and counted (dropped_malformed 1), 8 pairs to train on",
    ),
    (
        "a NUL character in an answer",
        _among_good(r'{"prompt": "Q", "chosen": "a\u0000b", "rejected": "b"}'),
        "dropped and counted (dropped_malformed 1), 8 pairs to train on",
    ),
    (
        "half of a surrogate pair",
        _among_good(r'{"prompt": "Q", "chosen": "\ud83d", "rejected": "b"}'),
        "dropped and counted (dropped_malformed 1), 8 pairs to train on",
    ),
    (
        "the same key twice in an object",
        _among_good('{"prompt": "Q", "chosen": "a", "rejected": "b", "chosen": "c"}'),
        "dropped and counted (dropped_malformed 1), 8 pairs to train on",
    ),
    (
        "a line of JSON 100,000 levels deep",
        _among_good('{"a":' * 100_000),
        "dropped and counted (dropped_malformed 1), 8 pairs to train on",
    ),
    (
        "numbers of 5,000 digits, NaN",
        _among_good('{"prompt": ' + "9" * 5000 + "}", '{"prompt": NaN, "chosen": "a", "rejected": "b"}'),
        "dropped and counted (dropped_malformed 2), 8 pairs to train on",
    ),
    (
        "values of every wrong type",
        _among_good(*_WRONG_TYPES),
        f"dropped and counted (dropped_malformed {len(_WRONG_TYPES)}), 8 pairs to train on",
    ),
    (
        "an answer of 300,000 end-of-turn tokens",
        _among_good(json.dumps(_ROW | {"chosen": "</s>" * 300_000 + "x"})),
        "read, 9 pairs to train on",
    ),
    (
        "parquet with a date past the year 9999 in a column beside",
        _data(
            "pairs.parquet",
            lambda: _parquet(
                pa.Table.from_pylist(_rows(10)).append_column(
                    "when", pa.array([2**31 - 1] * 10, pa.int32()).cast(pa.date32())
                )
            ),
        ),
        "read, 8 pairs to train on",
    ),
]


# ---- models and chat templates --------------------------------------------------------------------------------------


def _template(template: str) -> Make:
    good = "\n".join(map(json.dumps, _rows(10))).encode()
    return _data("pairs.jsonl", good, chat_template=template)


class _RunsCode:
    """Unpickling it runs a command."""

    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder}/ran"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def _model(spoil: Callable[[Path, Path], object], weights: bool = True, **settings: Any) -> Make:
    """A small model's folder with something done to it; `spoil` is given it and the case's folder."""

    def make(folder: Path) -> Feed:
        from transformers import LlamaConfig, LlamaForCausalLM

        from orpo_ray.models.loading import build_model, load_tokenizer

        model = folder / "model"
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=1024, **shape)).save_pretrained(model)
        _tokenizer().save_pretrained(model)
        if not weights:
            (model / "model.safetensors").unlink()
        spoil(model, folder)
        config = ModelConfig(path=str(model), **settings)

        def feed() -> object:
            load_tokenizer(config)
            return build_model(config, seed=0)

        return feed

    return make


def _edit(name: str, **values: Any) -> Callable[[Path, Path], object]:
    """Set keys of a JSON file of the model; its folder also gets a module that must not be imported."""

    def spoil(model: Path, folder: Path) -> None:
        (model / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
        content = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps(content | values), encoding="utf-8")

    return spoil


def _weights(content: Callable[[bytes], bytes]) -> Callable[[Path, Path], object]:
    def spoil(model: Path, folder: Path) -> None:
        file = model / "model.safetensors"
        file.write_bytes(content(file.read_bytes()))

    return spoil


def _pickled(model: Path, folder: Path) -> None:
    import torch

    torch.save({"lm_head.weight": _RunsCode(folder)}, model / "pytorch_model.bin")


def _bare_pickle(model: Path, folder: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_RunsCode(folder), protocol=2))


def _outside_index(model: Path, folder: Path) -> None:
    (model / "model.safetensors").rename(folder / "private.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../private.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _huge_gguf(model: Path, folder: Path) -> None:
    (model / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40) + bytes(64))


_EVIL = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
_TEMPLATES = [
    (
        "a chat template that goes for `__subclasses__`",
        _template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "uses what the sandbox forbids … unsafe",
    ),
    (
        "a chat template that loops for ever, within a tag of transformers' own",
        _template(
            "{% generation %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
            "{% endgeneration %}"
        ),
        "the chat template takes more than 5 s",
    ),
    (
        "a chat template that asks for 10 GB",
        _template("{{ 'a' * 10000000000 }}"),
        "the chat template takes more than 1 GiB",
    ),
    (
        "a chat template that writes 30 MB",
        _template("{% for a in range(30000) %}{{ 'a' * 1000 }}{% endfor %}"),
        "writes 30000000 characters for short conversations",
    ),
    (
        "a chat template that is none",
        _template("{% for"),
        "no pair is left for train ( … dropped_template_error 8 … the chat template refuses it",
    ),
]
_MODELS = [
    (
        "`pytorch_model.bin` that runs a command",
        _model(_pickled, weights=False),
        "could run code; nothing of it was run",
    ),
    ("a bare pickle in its place", _model(_bare_pickle, weights=False), "could run code; nothing of it was run"),
    ("code that comes with a model (`auto_map`)", _model(_edit("config.json", **_EVIL)), "contains custom code"),
    (
        "code that comes with a tokenizer",
        _model(_edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")),
        "contains custom code",
    ),
    (
        "an attention kernel from a hub, named by config.json",
        _model(_edit("config.json", _attn_implementation="evil/kernel")),
        "names the attention evil/kernel, code on a hub",
    ),
    (
        "weights outside of the model's folder",
        _model(_outside_index),
        "'../private.safetensors', which is not a file of this folder",
    ),
    (
        "`model.gguf_file: ../x.gguf`",
        _model(lambda m, f: None, gguf_file="../x.gguf"),
        "must be a file inside model.path",
    ),
    (
        "GGUF that says it has 2⁴⁰ tensors",
        _model(_huge_gguf, gguf_file="x.gguf"),
        "transformers cannot read its tokenizer",
    ),
    ("safetensors cut short", _model(_weights(lambda content: content[:-100])), "SafetensorError: … not fully covered"),
    (
        "safetensors with a header of 2⁶² bytes",
        _model(_weights(lambda content: struct.pack("<Q", 2**62) + content[8:])),
        "SafetensorError: … header too large",
    ),
    (
        "`config.json` that is a list",
        _model(lambda model, f: (model / "config.json").write_text("[1]")),
        "cannot read its tokenizer",
    ),
    (
        "a vocabulary of 10¹⁵ tokens",
        _model(_edit("config.json", vocab_size=10**15)),
        "transformers cannot read its causal language model",
    ),
    (
        "a tokenizer that makes its Rust code panic",
        _model(_edit("tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAA/w=="})),
        "transformers cannot read its tokenizer: PanicException",
    ),
]


# ---- cluster and storage --------------------------------------------------------------------------------------------


def _link_out(folder: Path) -> Feed:
    (folder / "job").mkdir()
    (folder / "private").mkdir()
    (folder / "private" / "key").write_text("x")
    (folder / "job" / "data").symlink_to(folder / "private")
    return lambda: files_to_send(folder / "job")


def _link_round(folder: Path) -> Feed:
    (folder / "job" / "a").mkdir(parents=True)
    (folder / "job" / "a" / "b").symlink_to(folder / "job")
    return lambda: files_to_send(folder / "job")


class _Listing(Storage):
    """A store that lists what an object store may, and a folder cannot."""

    def list(self, folder: str = "") -> dict[str, int]:
        return {"../../ran": 1}


class _AbsoluteListing(Storage):
    def list(self, folder: str = "") -> dict[str, int]:
        return {"/ran": 1}


def _brought(store: type[Storage]) -> Make:
    def make(folder: Path) -> Feed:
        from orpo_ray.storage import sync

        (folder / "runs" / "a").mkdir(parents=True)
        return lambda: sync.pull(folder / "runs" / "a", store(f"file://{folder}/store", patience_s=1.0))

    return make


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A process group of one."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _checkpoint(folder: Path, contents: dict[str, object], stage: int = 0) -> Path:
    """A whole checkpoint, by its manifest."""
    import torch

    from orpo_ray.storage.checkpoint_files import MANIFEST, file_facts

    path = folder / "trial" / "step-00000002"
    (path / "engine").mkdir(parents=True)
    for name, content in contents.items():
        torch.save(content, path / name)
    files = {name: file_facts(path / name) for name in contents}
    about = {"step": 2, "num_workers": 1, "zero_stage": stage, "progress": {}, "files": files}
    (path / MANIFEST).write_text(json.dumps(about))
    return path


def _weights_of_checkpoint(stage: int, *names: str) -> Make:
    def make(folder: Path) -> Feed:
        from orpo_ray.training.engine_state import full_state_dict

        path = _checkpoint(folder, {f"engine/{name}": {"module": _RunsCode(folder)} for name in names}, stage)
        return lambda: full_state_dict(path)

    return make


def _resumed(state: str) -> Make:
    """A trial that goes on from a checkpoint of which one file runs a command; of DeepSpeed, its loader."""

    def make(folder: Path) -> Feed:
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

        from orpo_ray.training.checkpoint import Checkpoints

        names = ("engine/mp_rank_00_model_states.pt", "random-rank-0.pt")
        path = _checkpoint(folder, {name: _RunsCode(folder) if name == state else {} for name in names})

        def load_checkpoint(folder: str, tag: str, **_: object) -> tuple[str, object]:
            return folder, TorchCheckpointEngine().load(f"{folder}/{tag}/mp_rank_00_model_states.pt")

        engine = SimpleNamespace(
            zero_optimization_stage=lambda: 0,
            module=SimpleNamespace(parameters=lambda: []),
            load_checkpoint=load_checkpoint,
        )

        def feed() -> object:
            with _alone(folder):
                checkpoints = Checkpoints(path.parent, CheckpointConfig())
                found = checkpoints.find()
                assert found is not None
                return checkpoints.load(engine, found)

        return feed

    return make


def _manifest_outside(folder: Path) -> Feed:
    """The manifest of a checkpoint in a store names a file above its folder, and the store has one there."""
    from orpo_ray.storage.checkpoint_files import MANIFEST
    from orpo_ray.training.checkpoint import Checkpoints

    store = Storage(f"file://{folder}/deep/store/trial", patience_s=1.0)
    (folder / "deep").mkdir()
    (folder / "deep" / "ran").write_text("x")
    manifest = {"step": 2, "num_workers": 1, "zero_stage": 0, "progress": {}}
    store.write(f"step-00000002/{MANIFEST}", json.dumps(manifest | {"files": {"../../../ran": {"size": 1}}}).encode())

    def feed() -> str:
        problems: list[str] = []
        with _alone(folder):
            there = folder / "trials" / "a"
            assert Checkpoints(there, CheckpointConfig(), remote=store, on_problem=problems.append).find() is None
        return f"passed over: {problems[0]}"

    return feed


_STORES = [
    (
        "a link out of the working directory of a job",
        _link_out,
        "SubmitError",
        "links lead out of the working directory",
    ),
    ("a link back into it", _link_round, "SubmitError", "back into themselves"),
    ("an object named `../../x` in the store", _brought(_Listing), "StorageError", "would be written outside of"),
    ("an object named `/x` in the store", _brought(_AbsoluteListing), "StorageError", "would be written outside of"),
    (
        "a checkpoint whose manifest names `../../../x`",
        _manifest_outside,
        None,
        "passed over … which is not a file inside of it",
    ),
    (
        "a checkpoint's random state that runs a command",
        _resumed("random-rank-0.pt"),
        "CheckpointError",
        "holds more than tensors and could run code; nothing of it was run",
    ),
    (
        "a checkpoint that runs a command when DeepSpeed loads it",
        _resumed("engine/mp_rank_00_model_states.pt"),
        "CheckpointError",
        "holds more than tensors and could run code; nothing of it was run",
    ),
    (
        "a checkpoint that runs a command when it is exported",
        _weights_of_checkpoint(0, "mp_rank_00_model_states.pt"),
        "CheckpointError",
        "holds more than tensors and could run code; nothing of it was run",
    ),
    (
        "one of ZeRO stage 3",
        _weights_of_checkpoint(
            3, "zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        ),
        "CheckpointError",
        "holds more than tensors and could run code; nothing of it was run",
    ),
]

CASES = [
    *(Case("Experiment file", what, make, "ConfigError", says) for what, make, says in _EXPERIMENTS),
    *(Case("Experiment file", what, make, None, says) for what, make, says in _EXPERIMENTS_ACCEPTED),
    *(Case("Data", what, make, "DataError", says) for what, make, says in _DATA),
    *(Case("Data", what, make, None, says) for what, make, says in _DATA_ACCEPTED),
    *(Case("Model, chat template", what, make, "DataError", says) for what, make, says in _TEMPLATES),
    *(Case("Model, chat template", what, make, "ModelError", says) for what, make, says in _MODELS),
    *(Case("Cluster, storage, checkpoints", what, make, error, says) for what, make, error, says in _STORES),
]
"""All of them, in the order of the table."""


def table() -> str:
    """The cases as Markdown, a table for each kind."""
    lines: list[str] = []
    for kind in dict.fromkeys(case.kind for case in CASES):
        lines += ["", f"**{kind}**", "", "| input | outcome |", "|---|---|"]
        for case in (case for case in CASES if case.kind == kind):
            outcome = f"`{case.error}`: {case.says}" if case.error else case.says
            lines.append(f"| {case.what} | {outcome} |".replace("`*", "`\\*"))
    return "\n".join(lines[1:])


def page(text: str) -> str:
    """The page with the table in its place."""
    part = re.compile(r"(<!-- hostile -->\n).*?(<!-- /hostile -->)", re.DOTALL)
    if not part.search(text):
        raise ValueError("the page has no part <!-- hostile -->")
    return part.sub(lambda found: f"{found[1]}{table()}\n{found[2]}", text)


def main() -> None:
    """Write the table, or read one file and tell about it."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.hostile", description=__doc__.splitlines()[0])
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read is not None:
        _read(arguments.read)
    else:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
