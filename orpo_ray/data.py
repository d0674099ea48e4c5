"""Preference pairs of every common shape, read, checked, tokenised once and kept on disk.

Rows -> `_parse` (messages) -> split -> `_Tokens` (chat template, tokenizer, cuts) -> an Arrow file per split.
"""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from filelock import FileLock
from jinja2.exceptions import TemplateError

from orpo_ray import style_pairs
from orpo_ray.config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ACCEPTED_SHAPES = """\
accepted shapes of a row:
  chosen, rejected: text "\\n\\nHuman: ...\\n\\nAssistant: ..." that ends with the answer (HH-RLHF)
  chosen, rejected: lists of {role, content} that end with the answer (UltraFeedback)
  prompt, chosen, rejected: text, or lists of {role, content}
  instruction or question in place of prompt; optional input (joined to it) and system"""

ORPO_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""The format of the ORPO authors' code (xfactlab/orpo), for tokenizers without a chat template of their own."""

BUILTIN = "builtin://style-pairs"
BUILTIN_TRAIN_PAIRS = 4096
TRAIN_SPLITS = ("train_prefs", "train")
EVAL_SPLITS = ("test_prefs", "test", "validation")
PROMPT_COLUMNS = ("prompt", "instruction", "question")

COUNTS = (
    "rows",
    "pairs",
    "dropped_malformed",
    "dropped_prompt_mismatch",
    "dropped_empty_chosen",
    "dropped_empty_rejected",
    "dropped_identical",
    "dropped_template_error",
    "dropped_prompt_in_eval",
    "dropped_long_prompt",
    "dropped_identical_after_cut",
    "held_out",
    "left_out",
    "prompts_truncated",
    "chosen_truncated",
    "rejected_truncated",
    "answers_without_template",
)
"""What is counted while reading. `rows` = `pairs` + every `dropped_*` + `held_out` (went to the evaluation pairs) +
`left_out` (over `train_pairs` or `eval_pairs`). `answers_without_template`: the template changes what stands before an
answer, so the answer was tokenised as it is, with EOS behind it."""

_FORMAT_VERSION = 1  # raise it whenever the same rows would become other tokens
_SCHEMA = pa.schema(
    {
        "pair_id": pa.string(),
        "prompt_text": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "chosen_ids": pa.list_(pa.int32()),
        "rejected_ids": pa.list_(pa.int32()),
        "chosen_bytes": pa.int32(),
    }
)
_BATCH_ROWS = 1000

Message = dict[str, str]


class DataError(ValueError):
    """The preference data cannot be used; the message says where and why."""


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A prompt and its two answers as token ids. [prompt | chosen] and [prompt | rejected] are the two sequences."""

    pair_id: str
    """`file:row`, the row counted from 1 (for text files: its line)."""
    prompt_ids: np.ndarray
    """int32 [prompt tokens], read-only; ends with what the chat template puts before an answer."""
    chosen_ids: np.ndarray
    """int32 [answer tokens], at least one; ends with the end-of-turn token unless cut."""
    rejected_ids: np.ndarray
    """int32 [answer tokens], at least one; ends with the end-of-turn token unless cut."""
    chosen_bytes: int
    """UTF-8 bytes of the chosen answer's text, without the end-of-turn token; of the kept part where it was cut."""


class PairDataset:
    """N tokenised pairs, memory-mapped from the cache: many processes of a machine share the same pages."""

    digest: str
    """SHA-256 of the ids and tokens of all pairs in order."""
    counts: dict[str, int]
    """What happened while reading: see `COUNTS`."""
    prompt_lengths_N: np.ndarray
    """int64 [N], tokens."""
    chosen_lengths_N: np.ndarray
    """int64 [N], tokens, the end-of-turn token included."""
    rejected_lengths_N: np.ndarray
    """int64 [N], tokens, the end-of-turn token included."""

    def __init__(self, folder: Path, name: str) -> None:
        summary = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        self.digest = summary["digest"]
        self.counts = summary["counts"]
        table = pa.ipc.open_file(pa.memory_map(str(folder / f"{name}.arrow"))).read_all()
        self._columns = {column: table[column] for column in table.column_names}
        self.prompt_lengths_N, self.chosen_lengths_N, self.rejected_lengths_N = (
            pc.list_value_length(table[column]).to_numpy().astype(np.int64)
            for column in ("prompt_ids", "chosen_ids", "rejected_ids")
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths_N)

    def __getitem__(self, index: int) -> Pair:
        columns = self._columns
        return Pair(
            pair_id=columns["pair_id"][index].as_py(),
            prompt_ids=columns["prompt_ids"][index].values.to_numpy(),
            chosen_ids=columns["chosen_ids"][index].values.to_numpy(),
            rejected_ids=columns["rejected_ids"][index].values.to_numpy(),
            chosen_bytes=columns["chosen_bytes"][index].as_py(),
        )

    def prompt_text(self, index: int) -> str:
        """The prompt as the chat template writes it, up to where the answer begins; not cut where its ids are."""
        return str(self._columns["prompt_text"][index].as_py())


def load_pairs(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PairDataset, PairDataset]:
    """The training and the held-out pairs, tokenised at the first call and read from the cache after that.

    Safe to call from many processes at once: one tokenises, the others wait. No prompt stands in both sets.

    Args:
        config: where the pairs are and how they are split and cut.
        tokenizer: a fast one, with an EOS token.

    Returns:
        Training pairs, held-out pairs; both in the order of their source.

    Raises:
        DataError: no such source, split or columns; a bad row under `on_bad_rows: error`; or no pair is left.
    """
    template = chat_template(config, tokenizer)
    train, held_out = _chosen_splits(config)
    key = _cache_key(config, tokenizer, template, [split.fingerprint() for split in (train, held_out) if split])
    folder = Path(config.cache_dir).expanduser() / "pairs" / key
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
                    finished = Path(scratch) / key
                    finished.mkdir()
                    _write_both(finished, config, train, held_out, _Tokens(config, tokenizer, template))
                    os.replace(finished, folder)
    return PairDataset(folder, "train"), PairDataset(folder, "eval")


def chat_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja template of prompts and answers: the config's, else the tokenizer's own, else the ORPO authors'."""
    if config.chat_template is not None:
        return config.chat_template
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else ORPO_CHAT_TEMPLATE


def batch_indices(step: int, num_pairs: int, batch_size: int, seed: int) -> np.ndarray:
    """Which pairs the global batch of an optimizer step holds. A pure function, so resuming needs only the step.

    Epochs are seeded permutations laid end to end; a batch may span two, and nothing is dropped at an epoch's end.

    Args:
        step: from 1.
        num_pairs: size of the training set.
        batch_size: pairs per optimizer step over all workers.
        seed: `train.seed`.

    Returns:
        int64 [batch_size], values in [0, num_pairs).
    """
    if step < 1 or num_pairs < 1 or batch_size < 1:
        raise ValueError(f"step ({step}), num_pairs ({num_pairs}) and batch_size ({batch_size}) must be at least 1")
    positions_B = np.arange((step - 1) * batch_size, step * batch_size)
    epochs_B, offsets_B = np.divmod(positions_B, num_pairs)
    return np.concatenate(
        [_epoch(seed, int(epoch), num_pairs)[offsets_B[epochs_B == epoch]] for epoch in np.unique(epochs_B)]
    )


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_pairs: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_pairs)


# ---- sources: where rows come from --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    source: str
    """`data.path` or `data.eval_path`, for messages."""
    name: str
    fingerprint: Callable[[], str]
    """Changes when the rows change."""
    read: Callable[[], Iterator[tuple[str, object]]]
    """(pair_id, row) in order; can be called again. A row that is no mapping of columns is malformed."""


def _chosen_splits(config: DataConfig) -> tuple[_Split, _Split | None]:
    """The training split, and the held-out one where the data have it."""
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


def _pick(splits: Mapping[str, _Split], setting: str, name: str | None, usual: Sequence[str]) -> _Split | None:
    if name is not None and name not in splits:
        source = next(iter(splits.values())).source
        raise DataError(f"{source}: data.{setting} is {name!r}, but the splits there are {', '.join(splits)}")
    return next((splits[known] for known in ([name] if name else usual) if known in splits), None)


def _only(splits: Mapping[str, _Split], setting: str, usual: Sequence[str]) -> _Split:
    first, *others = splits.values()
    if others:
        raise DataError(
            f"{first.source}: no split is called {' or '.join(usual)}; set data.{setting} to one of {', '.join(splits)}"
        )
    return first


def _splits(path: str, config: DataConfig, named: bool) -> dict[str, _Split]:
    """Every split of a source. Files whose names tell no split are one, unless the config names one of them."""
    local = Path(path).expanduser()
    if path != BUILTIN and not local.exists():
        return _hub_splits(path, config.subset)
    if config.subset is not None and path == config.path:
        raise DataError(f"{path}: data.subset ({config.subset!r}) names a configuration of a hub dataset; leave it out")
    if path == BUILTIN:
        return _builtin_splits(config)
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


def _file_split(source: str, name: str, root: Path, files: Sequence[Path]) -> _Split:
    def fingerprint() -> str:
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.relative_to(root)} {content}\n".encode())
        return digest.hexdigest()

    def read() -> Iterator[tuple[str, object]]:
        for file in files:
            for number, row in _FORMATS[_format(file) or ""](file):
                yield f"{file.relative_to(root)}:{number}", row

    return _Split(source, name, fingerprint, read)


def _hub_splits(path: str, subset: str | None) -> dict[str, _Split]:
    import datasets  # slow to import, and only hub names need it

    try:
        found = datasets.load_dataset(path, name=subset)
    except (FileNotFoundError, ConnectionError) as error:
        raise DataError(f"{path}: no such file or folder here, and not to be had as a hub dataset: {error}") from error

    def split(name: str, rows: datasets.Dataset) -> _Split:
        def read() -> Iterator[tuple[str, object]]:
            for number, row in enumerate(rows, start=1):
                yield f"{path}/{name}:{number}", row

        return _Split(path, name, lambda: f"{path} {name} {rows._fingerprint}", read)

    return {name: split(name, rows) for name, rows in found.items()}


def _builtin_splits(config: DataConfig) -> dict[str, _Split]:
    sizes = {"test": config.eval_pairs, "train": config.train_pairs or BUILTIN_TRAIN_PAIRS}

    def split(name: str) -> _Split:
        def read() -> Iterator[tuple[str, object]]:
            # The held-out pairs come first: they stay the same when train_pairs changes.
            rows = style_pairs.generate(sum(sizes.values()), config.split_seed)
            for number, row in enumerate(rows, start=1):
                if (number <= sizes["test"]) == (name == "test"):
                    yield f"style-pairs:{number}", row

        source = Path(style_pairs.__file__).read_bytes()
        return _Split(BUILTIN, name, lambda: f"{name} {sizes} {hashlib.sha256(source).hexdigest()}", read)

    return {name: split(name) for name in sizes}


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_json(path: Path) -> Iterator[tuple[int, object]]:
    with _open(path) as stream:
        start = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        stream.seek(0)
        if start.startswith(b"["):
            yield from enumerate(json.load(stream), start=1)
            return
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError:  # not JSON, or not UTF-8
                yield number, line


def _read_csv(path: Path) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(1 << 30)  # the default, 128 KiB, is shorter than some conversations
    with _open(path) as stream:
        reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
        if reader.fieldnames is None:
            return
        line = reader.line_num + 1
        for row in reader:
            yield line, row
            line = reader.line_num + 1


def _read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    with pq.ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=_BATCH_ROWS)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


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


# ---- rows: columns -> prompt messages and two answers -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Texts:
    prompt: list[Message]
    chosen: str
    rejected: str


class _BadRow(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def _parse(row: object) -> _Texts:
    if not isinstance(row, Mapping):
        raise _BadRow("malformed", f"not a mapping of columns: {row!r:.60}")
    given = _prompt_columns(row)
    chosen_prompt, chosen = _conversation(row.get("chosen"), "chosen", given)
    rejected_prompt, rejected = _conversation(row.get("rejected"), "rejected", given)
    if chosen_prompt != rejected_prompt:
        raise _BadRow("prompt_mismatch", "what stands before the last answer differs between chosen and rejected")
    prompt = chosen_prompt
    system = row.get("system")
    if system and prompt[0]["role"] != "system":
        if not isinstance(system, str):
            raise _BadRow("malformed", f"system is not text: {system!r:.60}")
        prompt = [{"role": "system", "content": system}, *prompt]
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise _BadRow(f"empty_{side}", f"the {side} answer is empty")
    if chosen.strip() == rejected.strip():
        raise _BadRow("identical", "chosen and rejected are the same")
    return _Texts(prompt, chosen, rejected)


def _prompt_columns(row: Mapping[str, object]) -> list[Message] | None:
    """The prompt that stands in columns of its own, if one does."""
    column = next((name for name in PROMPT_COLUMNS if row.get(name)), None)
    if column is None:
        return None
    prompt, extra = row[column], row.get("input")
    if isinstance(prompt, list):
        return _messages(prompt, column)
    if not isinstance(prompt, str) or not (extra is None or isinstance(extra, str)):
        raise _BadRow("malformed", f"{column} is neither text nor a list of messages: {prompt!r:.60}")
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
        raise _BadRow("malformed", f"{column} is neither text nor a list of messages: {value!r:.60}")
    if not messages or messages[-1]["role"] != "assistant":
        raise _BadRow("malformed", f"{column} does not end with an assistant's answer")
    prompt = messages[:-1] or given
    if not prompt:
        raise _BadRow("malformed", f"{column} holds an answer alone, and there is no prompt")
    return prompt, messages[-1]["content"]


def _turns(text: str, column: str) -> list[Message]:
    r"""HH-RLHF text `\n\nHuman: ...\n\nAssistant: ...` as messages."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not parts:
        raise _BadRow(
            "malformed", rf"{column} is neither an answer to a prompt nor text of \n\nHuman: turns: {text!r:.60}"
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
            raise _BadRow(
                "malformed", f"{column} holds a message that is not {{role: text, content: text}}: {item!r:.60}"
            )
        messages.append({"role": role, "content": content})
    return messages


# ---- messages -> tokens -------------------------------------------------------------------------------------------


class _Tokens:
    """Renders and tokenises pairs by the batch, cuts them to length, and counts what it did."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.config, self.tokenizer, self.template = config, tokenizer, template
        self.bos_id = _added_bos(tokenizer)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # Longest first, or one token that begins another would hide it.
        ends = "|".join(map(re.escape, sorted({*special, tokenizer.eos_token}, key=lambda token: (-len(token), token))))
        self.end_of_answer = re.compile(rf"(?P<end>{ends})(?:\s*(?:{ends}))*\s*\Z")
        self.newline_ids = self._ids(["\n"])[0]

    def batch(self, pairs: Sequence[tuple[str, _Texts]], counts: Counter[str]) -> pa.RecordBatch:
        """Arrow rows of the pairs that remain."""
        rendered: list[tuple[str, str]] = []
        chosen: list[tuple[str, int]] = []
        rejected: list[tuple[str, int]] = []
        for pair_id, texts in pairs:
            try:
                prompt = self._apply(texts.prompt, add_generation_prompt=True)
                answers = [self._answer(prompt, texts.prompt, side, counts) for side in (texts.chosen, texts.rejected)]
            except TemplateError as error:
                bad = _BadRow("template_error", f"the chat template refuses it: {error}")
                _drop(bad, pair_id, self.config.on_bad_rows, counts)
                continue
            rendered.append((pair_id, prompt))
            chosen.append(answers[0])
            rejected.append(answers[1])
        ids_of = zip(
            self._ids([prompt for _, prompt in rendered]),
            self._answer_ids(chosen),
            self._answer_ids(rejected),
            strict=True,
        )
        rows = []
        for (pair_id, prompt), (text, _), ids in zip(rendered, chosen, ids_of, strict=True):
            cut = self._cut(*ids, counts)
            if cut is None:
                continue
            # Of a cut answer, what the kept tokens spell; a character cut in two counts as the three bytes of U+FFFD.
            kept = text if len(cut[1]) == len(ids[1]) else self._text(cut[1])
            rows.append(dict(zip(_SCHEMA.names, (pair_id, prompt, *cut, len(kept.encode())), strict=True)))
        return pa.RecordBatch.from_pylist(rows, schema=_SCHEMA)

    def _answer(self, prompt: str, messages: list[Message], content: str, counts: Counter[str]) -> tuple[str, int]:
        whole = self._apply([*messages, {"role": "assistant", "content": content}], add_generation_prompt=False)
        if not whole.startswith(prompt):
            counts["answers_without_template"] += 1
            return content, self.tokenizer.eos_token_id
        answer = whole[len(prompt) :]
        # Of what the template puts behind the answer (`<|im_end|>\n`, `</s>\n`) the first special token ends the turn:
        # it is the last one a generating model has to say.
        end = self.end_of_answer.search(answer)
        if end is None:
            return answer.rstrip(), self.tokenizer.eos_token_id
        return answer[: end.start()], self.tokenizer.convert_tokens_to_ids(end["end"])

    def _apply(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # The template writes BOS itself where the model wants one.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False) if texts else None
        return encoded["input_ids"] if encoded else []

    def _answer_ids(self, answers: Sequence[tuple[str, int]]) -> list[list[int]]:
        """An answer's ids as they follow a prompt.

        SentencePiece-like tokenizers put a space before a text that stands alone. So each answer is tokenised behind a
        newline, which is taken off again; where the two merge into one token, it is tokenised alone after all.
        """
        size = len(self.newline_ids)
        behind = self._ids(["\n" + text for text, _ in answers])
        merged = [index for index, ids in enumerate(behind) if ids[:size] != self.newline_ids]
        ids_of = dict(zip(merged, self._ids([answers[index][0] for index in merged]), strict=True))
        return [[*ids_of.get(index, behind[index][size:]), end] for index, (_, end) in enumerate(answers)]

    def _cut(
        self, prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int], counts: Counter[str]
    ) -> tuple[list[int], list[int], list[int]] | None:
        longest = self.config.max_prompt_tokens
        if self.bos_id is not None and prompt_ids[:1] != [self.bos_id]:
            prompt_ids = [self.bos_id, *prompt_ids]
        truncated = len(prompt_ids) > longest
        if truncated and self.config.long_prompts == "drop":
            counts["dropped_long_prompt"] += 1
            return None
        if truncated:
            # BOS stays: models that were trained with it are lost without.
            first = prompt_ids[:1] if self.bos_id is not None else []
            prompt_ids = [*first, *prompt_ids[len(prompt_ids) - longest + len(first) :]]
        room = self.config.max_tokens - len(prompt_ids)
        if chosen_ids[:room] == rejected_ids[:room]:
            counts["dropped_identical_after_cut"] += 1
            return None
        counts["prompts_truncated"] += truncated
        counts["chosen_truncated"] += len(chosen_ids) > room
        counts["rejected_truncated"] += len(rejected_ids) > room
        return prompt_ids, chosen_ids[:room], rejected_ids[:room]

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS that the tokenizer puts before every text, if it does."""
    bos_id = tokenizer.bos_token_id
    return bos_id if bos_id is not None and tokenizer("x")["input_ids"][:1] == [bos_id] else None


# ---- split, write, cache ------------------------------------------------------------------------------------------


def _write_both(folder: Path, config: DataConfig, train: _Split, held_out: _Split | None, tokens: _Tokens) -> None:
    positions, prompts, counts = _scan(train, config.on_bad_rows)
    shuffled = np.random.default_rng(config.split_seed).permutation(len(positions))
    if held_out is None:
        if config.eval_pairs >= len(positions):
            raise DataError(
                f"{config.path}: data.eval_pairs ({config.eval_pairs}) must be below the pairs there are "
                f"({len(positions)}), for there is no held-out split and they are set aside from the training pairs"
            )
        aside, shuffled = shuffled[: config.eval_pairs], shuffled[config.eval_pairs :]
        counts["held_out"] = len(aside)
        held_out, eval_positions = train, positions[aside]
        eval_prompts, eval_counts = {prompts[i] for i in aside}, Counter({"rows": len(aside)})
    else:
        all_positions, all_prompts, eval_counts = _scan(held_out, config.on_bad_rows)
        drawn = np.random.default_rng(config.split_seed).permutation(len(all_positions))[: config.eval_pairs]
        eval_counts["left_out"] = len(all_positions) - len(drawn)
        eval_positions, eval_prompts = all_positions[drawn], {all_prompts[i] for i in drawn}
    apart = np.array([i for i in shuffled if prompts[i] not in eval_prompts], dtype=np.int64)
    counts["dropped_prompt_in_eval"] = len(shuffled) - len(apart)
    drawn = apart[: config.train_pairs]
    counts["left_out"] = len(apart) - len(drawn)
    _write(folder, "train", train, positions[drawn], tokens, counts)
    _write(folder, "eval", held_out, eval_positions, tokens, eval_counts)


def _scan(split: _Split, on_bad_rows: str) -> tuple[np.ndarray, list[bytes], Counter[str]]:
    """Positions of the good rows, a digest of each one's prompt, and counts of all the others."""
    positions, prompts, counts = [], [], Counter[str]()
    first_problem = ""
    for position, (pair_id, row) in enumerate(split.read()):
        counts["rows"] += 1
        if position == 0 and isinstance(row, Mapping) and not {"chosen", "rejected"} <= row.keys():
            raise DataError(f"{pair_id}: columns {', '.join(map(str, row))} hold no pair\n{ACCEPTED_SHAPES}")
        try:
            texts = _parse(row)
        except _BadRow as bad:
            first_problem = first_problem or f"; the first, {pair_id}: {bad.detail}\n{ACCEPTED_SHAPES}"
            _drop(bad, pair_id, on_bad_rows, counts)
            continue
        positions.append(position)
        prompts.append(hashlib.sha256(json.dumps(texts.prompt).encode()).digest())
    if not positions:
        raise DataError(
            f"{split.source}, split {split.name}: no pair in it is usable ({_shown(counts)}){first_problem}"
        )
    return np.array(positions), prompts, counts


def _drop(bad: _BadRow, pair_id: str, on_bad_rows: str, counts: Counter[str]) -> None:
    if on_bad_rows == "error":
        raise DataError(f"{pair_id}: {bad.detail}; mend the row, or set data.on_bad_rows: drop") from None
    counts[f"dropped_{bad.reason}"] += 1


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {counts[name]}" for name in COUNTS if counts[name])


def _write(
    folder: Path, name: str, split: _Split, positions: np.ndarray, tokens: _Tokens, counts: Counter[str]
) -> None:
    wanted, digest = set(positions.tolist()), hashlib.sha256()
    rows = (item for position, item in enumerate(split.read()) if position in wanted)
    with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        while chunk := [(pair_id, _parse(row)) for pair_id, row in itertools.islice(rows, _BATCH_ROWS)]:
            batch = tokens.batch(chunk, counts)
            counts["pairs"] += len(batch)
            digest.update("\n".join(batch["pair_id"].to_pylist()).encode())
            for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
                digest.update(pc.list_value_length(batch[column]).to_numpy().tobytes())
                digest.update(batch[column].flatten().to_numpy().tobytes())
            writer.write_batch(batch)
    if not counts["pairs"]:
        raise DataError(
            f"{split.source}, split {split.name}: no pair is left for {name} ({_shown(counts)}); "
            "are data.max_prompt_tokens and data.max_tokens too small, or every prompt in both sets?"
        )
    summary = {"digest": digest.hexdigest(), "counts": {name: counts[name] for name in COUNTS}}
    (folder / f"{name}.json").write_text(json.dumps(summary), encoding="utf-8")


def _cache_key(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, template: str, fingerprints: Sequence[str]
) -> str:
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise DataError(f"{type(tokenizer).__name__}: a fast tokenizer with an EOS token is needed")
    # The backend's state also holds the padding and truncation of whoever used it last; a plain call resets both.
    bos_id = _added_bos(tokenizer)
    parts = {
        "version": _FORMAT_VERSION,
        # Files count by content: where they lie does not matter.
        "config": config.model_dump(mode="json", exclude={"path", "eval_path", "cache_dir", "chat_template"}),
        "sources": list(fingerprints),
        "template": template,
        "special": [bos_id, tokenizer.special_tokens_map],
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
