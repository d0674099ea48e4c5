"""Feeds mutated files to the readers: `python -m tests.fuzz.readers --target config|rows|parquet|csv --seconds N`.

An exception that a reader does not document is a finding: atheris prints it and keeps the input in the current
directory as `crash-...`; so is an input that takes over 20 seconds (`timeout-...`) or 2 GiB (`oom-...`).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["orpo_ray", "yaml", "csv", "json"]):
    import csv  # noqa: F401
    import json.decoder

    import yaml  # noqa: F401

    from orpo_ray.config import ConfigError, DataConfig, as_given, load, parse
    from orpo_ray.data import parquet_size, rows, sources  # noqa: F401

import pyarrow as pa
import pyarrow.parquet as pq

_SLOW_S, _MEMORY_MIB = 20, 2048
_ROOT = Path(__file__).resolve().parents[2]
_PAIR = {"prompt": "Which?", "chosen": "This.", "rejected": "That.", "system": "Be kind.", "input": "2 3"}
_TALK = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
_HH = "\n\nHuman: Which?\n\nAssistant: "


def read_config(data: bytes, file: Path) -> None:
    """An experiment file; what follows a NUL is an override."""
    content, _, override = data.partition(b"\0\0")
    file.write_bytes(content)
    given = [override.decode("utf-8", "replace")] if override else []
    with suppress(ConfigError):
        found = load(file, given)
        again = parse(as_given(found.model_dump(mode="json")))
        assert again == found, "what is written is not what is read"


def read_rows(data: bytes, file: Path) -> None:
    """A file of pairs in the format that its name says; every row gives a pair or a BadRow."""
    file.write_bytes(data)
    try:
        split, _ = sources.choose_splits(DataConfig(path=str(file)))
        for pair_id, row in split.read():
            assert pair_id.startswith(file.name)
            with suppress(rows.BadRow):
                pair = rows.parse_row(row)
                texts = [pair.chosen, pair.rejected, *(turn["content"] for turn in pair.prompt)]
                assert pair.prompt
                assert all(isinstance(text, str) and "\0" not in text for text in texts)
                assert pair.chosen.strip() != pair.rejected.strip()
    except rows.DataError:
        return


def _parquet(table: pa.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def _config_seeds() -> list[bytes]:
    files = sorted((_ROOT / "experiments").glob("*.yaml"), key=lambda path: path.stat().st_size)
    found = [path.read_bytes() for path in files[:5]]
    small = b"name: a\nmodel: {path: tiny-llama-1m}\ndata: &d {path: 'builtin://style-pairs'}\ntrain: {max_steps: 5}\n"
    return [*found, small, small + b"\0\0optim.lr=1e-5", small + b"<<: *d\n", small + b"\0\0train={epochs: 1}"]


def _json_seeds() -> list[bytes]:
    shapes: list[object] = [
        _PAIR,
        {"chosen": _HH + "This.", "rejected": _HH + "That."},
        {"chosen": _TALK, "rejected": [*_TALK[:1], {"role": "assistant", "content": "That."}]},
        {"prompt": _TALK[:1], "chosen": _TALK[1:], "rejected": "That."},
    ]
    lines = "\n".join(map(json.dumps, shapes)).encode()
    return [lines, json.dumps(shapes).encode(), b'{"chosen": "\\ud800", "rejected": "\\u0000", "prompt": NaN}']


def _csv_seeds() -> list[bytes]:
    return [b"prompt,chosen,rejected\nq,a,b\n", b'\xef\xbb\xbfprompt,chosen,rejected\r\n"q\n""x",a,b\r\n', b'"a\0",\n']


def _parquet_seeds() -> list[bytes]:
    flat, talks = pa.Table.from_pylist([_PAIR] * 3), pa.Table.from_pylist([{"chosen": _TALK, "rejected": _TALK}])
    other = pa.table({"chosen": [1], "rejected": [b"x"], "when": pa.array([1], pa.timestamp("us", tz="UTC"))})
    plain = {"use_dictionary": False, "compression": "none"}
    return [
        *(_parquet(table, compression="none") for table in (flat, talks, other)),
        *(_parquet(table, **plain, data_page_version="2.0") for table in (flat, talks, other)),
        _parquet(flat, compression="zstd"),
        _parquet(flat, compression="none", store_schema=False, write_statistics=False),
    ]


_TARGETS: dict[str, tuple[str, Callable[[bytes, Path], None], Callable[[], list[bytes]]]] = {
    "config": ("x.yaml", read_config, _config_seeds),
    "rows": ("x.jsonl", read_rows, _json_seeds),
    "csv": ("x.csv", read_rows, _csv_seeds),
    "parquet": ("x.parquet", read_rows, _parquet_seeds),
}
"""Name of the file, its reader, and what the mutations begin with."""


def main() -> None:
    """Fuzz one reader; ends the process with 0 if nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.readers", description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=sorted(_TARGETS), required=True)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument(
        "--corpus", type=Path, help="keep inputs that reach new code here (default: a temporary folder)"
    )
    arguments = parser.parse_args()
    name, read, seeds = _TARGETS[arguments.target]
    # In memory where there is such a folder. It stays: atheris ends the process without a chance to remove it.
    scratch = Path("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()) / f"orpo-fuzz-{arguments.target}"
    shutil.rmtree(scratch, ignore_errors=True)
    corpus = arguments.corpus or scratch / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    scratch.mkdir(exist_ok=True)
    limits = [f"-max_total_time={arguments.seconds}", f"-timeout={_SLOW_S}", f"-rss_limit_mb={_MEMORY_MIB}"]
    # Long inputs are slow to parse, and hold nothing that short ones do not.
    options = [str(corpus), "-max_len=4096", "-verbosity=1", *limits]
    atheris.Setup([sys.argv[0], *options], lambda data: read(data, scratch / name))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
