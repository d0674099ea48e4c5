"""Where preference pairs come from: files, hub datasets, the generator; and every row shape as prompt and answers."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orpo_ray.config.experiment import DataConfig
from orpo_ray.data import parquet_size, style_pairs

ACCEPTED_SHAPES = """\
accepted shapes of a row:
  chosen, rejected: text "\\n\\nHuman: ...\\n\\nAssistant: ..." that ends with the answer (HH-RLHF)
  chosen, rejected: lists of {role, content} that end with the answer (UltraFeedback)
  prompt, chosen, rejected: text, or lists of {role, content}
  instruction or question in place of prompt; optional input (joined to it) and system"""

BUILTIN = "builtin://style-pairs"
BUILTIN_TRAIN_PAIRS = 4096
TRAIN_SPLITS = ("train_prefs", "train")
EVAL_SPLITS = ("test_prefs", "test", "validation")
PROMPT_COLUMNS = ("prompt", "instruction", "question")
_COLUMNS = ("chosen", "rejected", *PROMPT_COLUMNS, "input", "system")
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
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_CUT = reprlib.Repr()
_CUT.maxstring = _CUT.maxother = 60

Message = dict[str, str]
"""{"role": ..., "content": ...}"""


class DataError(ValueError):
    """The preference data cannot be used; the message says where and why."""


# ---- splits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Rows of one split of a source, not read yet."""

    source: str
    """`data.path` or `data.eval_path`, for messages."""
    name: str
    fingerprint: Callable[[], str]
    """Changes when the rows change."""
    read: Callable[[], Iterator[tuple[str, object]]]
    """(pair_id, row) in order; can be called again. A row that is no mapping of columns is malformed."""


def choose_splits(config: DataConfig) -> tuple[Split, Split | None]:
    """The training split, and the held-out one where the data have it.

    Raises:
        DataError: no such file, folder, hub dataset or split; or several, and none has a usual name.
    """
    named = config.train_split is not None or (config.eval_split is not None and config.eval_path is None)
    splits = _splits(config.path, config, named)
    train = _pick(splits, "train_split", config.train_split, TRAIN_SPLITS) or _only(splits, "train_split", TRAIN_SPLITS)
    if config.eval_path is not None:
        others = _splits(config.eval_path, config, named=config.eval_split is not None)
        picked = _pick(others, "eval_split", config.eval_split, EVAL_SPLITS)
        return train, picked or _only(others, "eval_split", EVAL_SPLITS)
    if config.eval_split == train.name:
        raise DataError(
            f"{config.path}: data.eval_split and the training split are both {train.name!r}; "
            f"leave eval_split out to set {config.eval_pairs} pairs (data.eval_pairs) of it aside"
        )
    return train, _pick(splits, "eval_split", config.eval_split, [name for name in EVAL_SPLITS if name != train.name])


def _pick(splits: Mapping[str, Split], setting: str, name: str | None, usual: Sequence[str]) -> Split | None:
    if name is not None and name not in splits:
        source = next(iter(splits.values())).source
        raise DataError(f"{source}: data.{setting} is {name!r}, but the splits there are {', '.join(splits)}")
    return next((splits[known] for known in ([name] if name else usual) if known in splits), None)


def _only(splits: Mapping[str, Split], setting: str, usual: Sequence[str]) -> Split:
    first, *others = splits.values()
    if others:
        raise DataError(
            f"{first.source}: no split is called {' or '.join(usual)}; set data.{setting} to one of {', '.join(splits)}"
        )
    return first


def _splits(path: str, config: DataConfig, named: bool) -> dict[str, Split]:
    """Every split of a source. Files whose names tell no split are one, unless the config names one of them."""
    local = Path(path).expanduser()
    if path != BUILTIN and not local.exists():
        if not _HUB_NAME.fullmatch(path) or ".." in path:
            raise DataError(f"{path}: no such file or folder here, and not a name that a hub dataset can have")
        return _hub_splits(path, config.subset)
    if config.subset is not None and path == config.path:
        raise DataError(f"{path}: data.subset ({config.subset!r}) names a configuration of a hub dataset; leave it out")
    if path == BUILTIN:
        return _builtin_splits(config)
    if not local.is_file() and not local.is_dir():
        raise DataError(f"{path}: neither a file nor a folder; devices and pipes have no end, and are read twice")
    if local.is_file():
        if _format(local) is None:
            raise DataError(f"{path}: not a format that can be read; use {', '.join(_FORMATS)}")
        return {"train": _file_split(path, "train", local.parent, [local])}
    files = sorted(file for file in local.rglob("*") if file.is_file() and _format(file))
    if not files:
        raise DataError(f"{path}: no {', '.join(_FORMATS)} file in this folder")
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_split_of_file(file), []).append(file)
    if not named and not groups.keys() & {*TRAIN_SPLITS, *EVAL_SPLITS}:
        groups = {"train": files}
    return {name: _file_split(path, name, local, members) for name, members in groups.items()}


def _split_of_file(path: Path) -> str:
    """`train-00000-of-00002.parquet` -> train, as the hub names files."""
    return re.sub(r"-\d+-of-\d+.*", "", path.name.split(".")[0])


def _file_split(source: str, name: str, root: Path, files: Sequence[Path]) -> Split:
    def fingerprint() -> str:
        digest = hashlib.sha256()
        for file in files:
            with _readable(file), file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.relative_to(root)} {content}\n".encode())
        return digest.hexdigest()

    def read() -> Iterator[tuple[str, object]]:
        for file in files:
            with _readable(file):
                for number, row in _FORMATS[_format(file) or ""](file):
                    yield f"{file.relative_to(root)}:{number}", row

    return Split(source, name, fingerprint, read)


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """What goes wrong in reading a file, as a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, ValueError, OverflowError, LookupError, zlib.error, csv.Error, pa.ArrowException) as bad:
        raise DataError(
            f"{file}: cannot be read as {_format(file)}: {bad!s:.300}; was it cut short, is it another format, or text "
            "that is not UTF-8?"
        ) from bad


def _hub_splits(path: str, subset: str | None) -> dict[str, Split]:
    import datasets  # slow to import, and only hub names need it
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if path in _PACKAGED_DATASETS_MODULES:
        # To `load_dataset` these are formats, and without files named it takes all in the current directory.
        raise DataError(f"{path}: the name of a format, not of a dataset; give the file or the folder itself")
    try:
        # Version 4 and later run no code that comes with a dataset.
        found = datasets.load_dataset(path, name=subset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: no such file or folder here, and not to be had as a hub dataset: {error}") from error

    def split(name: str, rows: datasets.Dataset) -> Split:
        def read() -> Iterator[tuple[str, object]]:
            for number, row in enumerate(rows, start=1):
                yield f"{path}/{name}:{number}", row

        return Split(path, name, lambda: f"{path} {name} {rows._fingerprint}", read)

    return {name: split(name, rows) for name, rows in found.items()}


def _builtin_splits(config: DataConfig) -> dict[str, Split]:
    sizes = {"test": config.eval_pairs, "train": config.train_pairs or BUILTIN_TRAIN_PAIRS}

    def split(name: str) -> Split:
        def read() -> Iterator[tuple[str, object]]:
            # The held-out pairs come first: they stay the same when train_pairs changes.
            rows = style_pairs.generate(sum(sizes.values()), config.split_seed)
            for number, row in enumerate(rows, start=1):
                if (number <= sizes["test"]) == (name == "test"):
                    yield f"style-pairs:{number}", row

        source = Path(style_pairs.__file__).read_bytes()
        return Split(BUILTIN, name, lambda: f"{name} {sizes} {hashlib.sha256(source).hexdigest()}", read)

    return {name: split(name) for name in sizes}


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
    columns = [name for name in names if name in _COLUMNS] if {"chosen", "rejected"} <= set(names) else names
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
    twice = [name for name, count in Counter(columns).items() if count > 1 and name in _COLUMNS]
    if twice:
        raise DataError(f"{path}: {len(columns)} columns, {twice[0]} is among them twice; which of the two is meant?")


_FORMATS: dict[str, Callable[[Path], Iterator[tuple[int, object]]]] = {
    ".jsonl": _read_json,
    ".jsonl.gz": _read_json,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".parquet": _read_parquet,
}


def _format(path: Path) -> str | None:
    return next((suffix for suffix in _FORMATS if path.name.endswith(suffix)), None)


# ---- rows: columns -> prompt messages and two answers ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextPair:
    """A row that holds a pair: the messages of its prompt, the texts of its answers."""

    prompt: list[Message]
    chosen: str
    rejected: str


class BadRow(Exception):
    """A row that holds no usable pair; `reason` as in `data.COUNTS`, without its `dropped_`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def parse_row(row: object) -> TextPair:
    """The pair that a row holds, in any of `ACCEPTED_SHAPES`.

    Raises:
        BadRow: it is malformed, or an answer is empty, or the two are the same or answer different prompts.
    """
    if not isinstance(row, Mapping):
        raise BadRow("malformed", f"not a mapping of columns: {_CUT.repr(row)}")
    given = _prompt_columns(row)
    chosen_prompt, chosen = _conversation(row.get("chosen"), "chosen", given)
    rejected_prompt, rejected = _conversation(row.get("rejected"), "rejected", given)
    if chosen_prompt != rejected_prompt:
        raise BadRow("prompt_mismatch", "what stands before the last answer differs between chosen and rejected")
    prompt = chosen_prompt
    system = row.get("system")
    if system and prompt[0]["role"] != "system":
        if not isinstance(system, str):
            raise BadRow("malformed", f"system is not text: {_CUT.repr(system)}")
        prompt = [{"role": "system", "content": system}, *prompt]
    for text in (*(part for message in prompt for part in message.values()), chosen, rejected):
        _require_text(text)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise BadRow(f"empty_{side}", f"the {side} answer is empty")
    if chosen.strip() == rejected.strip():
        raise BadRow("identical", "chosen and rejected are the same")
    return TextPair(prompt, chosen, rejected)


def _require_text(text: str) -> None:
    """JSON can spell what is no text: tokenizers fail on half a character, databases on NUL."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("malformed", f"holds half a surrogate pair, {text[error.start]!r}, at {error.start}") from None
    if "\0" in text:
        raise BadRow("malformed", f"holds a NUL character at {text.index(chr(0))}")


def drop(bad: BadRow, pair_id: str, on_bad_rows: str, counts: Counter[str]) -> None:
    """Count a row that holds no usable pair.

    Raises:
        DataError: such rows are to be refused (`on_bad_rows` is "error").
    """
    if on_bad_rows == "error":
        raise DataError(f"{pair_id}: {bad.detail}; mend the row, or set data.on_bad_rows: drop") from None
    counts[f"dropped_{bad.reason}"] += 1


def _prompt_columns(row: Mapping[str, object]) -> list[Message] | None:
    """The prompt that stands in columns of its own, if one does."""
    column = next((name for name in PROMPT_COLUMNS if row.get(name)), None)
    if column is None:
        return None
    prompt, extra = row[column], row.get("input")
    if isinstance(prompt, list):
        return _messages(prompt, column)
    if not isinstance(prompt, str) or not (extra is None or isinstance(extra, str)):
        raise BadRow("malformed", f"{column} is neither text nor a list of messages: {_CUT.repr(prompt)}")
    if prompt.startswith("\n\nHuman:"):
        turns = _turns(prompt, column)
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    return [{"role": "user", "content": f"{prompt}\n{extra}" if extra else prompt}]


def _conversation(value: object, column: str, given: list[Message] | None) -> tuple[list[Message], str]:
    """Prompt and answer of one side; `given` is the prompt where the side holds only the answer."""
    if isinstance(value, str):
        if given is not None and not value.startswith("\n\nHuman:"):
            return given, value
        messages = _turns(value, column)
    elif isinstance(value, list):
        messages = _messages(value, column)
    else:
        raise BadRow("malformed", f"{column} is neither text nor a list of messages: {_CUT.repr(value)}")
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("malformed", f"{column} does not end with an assistant's answer")
    prompt = messages[:-1] or given
    if not prompt:
        raise BadRow("malformed", f"{column} holds an answer alone, and there is no prompt")
    return prompt, messages[-1]["content"]


def _turns(text: str, column: str) -> list[Message]:
    r"""HH-RLHF text `\n\nHuman: ...\n\nAssistant: ...` as messages."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not parts:
        raise BadRow(
            "malformed", rf"{column} is neither an answer to a prompt nor text of \n\nHuman: turns: {_CUT.repr(text)}"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _messages(value: list[object], column: str) -> list[Message]:
    messages = []
    for item in value:
        role, content = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow(
                "malformed", f"{column} holds a message that is not {{role: text, content: text}}: {_CUT.repr(item)}"
            )
        messages.append({"role": role, "content": content})
    return messages
