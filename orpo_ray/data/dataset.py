"""Tokenised preference pairs as memory-mapped data sets, and which pairs each step trains on.

sources.choose_splits -> rows.parse_row (messages) -> tokenizer.PairTokenizer (ids) -> cache (one Arrow file per split).
Shape suffixes: N pairs, B pairs of a global batch.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from orpo_ray.config import DataConfig
from orpo_ray.data.readers import BATCH_CHARACTERS, BATCH_ROWS
from orpo_ray.data.rows import ACCEPTED_SHAPES, BadRow, DataError, TextPair, drop, parse_row
from orpo_ray.data.sources import Split, choose_splits
from orpo_ray.data.tokenizer import SCHEMA, PairTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    "dropped_empty_prompt",
    "dropped_long_prompt",
    "dropped_identical_after_cut",
    "held_out",
    "left_out",
    "prompts_truncated",
    "chosen_truncated",
    "rejected_truncated",
    "answers_without_template",
)
"""Counts made while reading. `rows` = `pairs` + every `dropped_*` + `held_out` (moved to the evaluation pairs) +
`left_out` (beyond `train_pairs` or `eval_pairs`). `answers_without_template`: the template changes the text before an
answer, so the answer was tokenised without the template, followed by EOS."""

_FORMAT_VERSION = 2  # increase it whenever the same rows would be tokenised differently


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A prompt and its two answers as token ids. [prompt | chosen] and [prompt | rejected] are the two sequences."""

    pair_id: str
    """`file:row`, with rows counted from 1; for text files the line number."""
    prompt_ids: np.ndarray
    """int32 [prompt tokens], read-only; ends with the chat template's text before an answer."""
    chosen_ids: np.ndarray
    """int32 [answer tokens], at least one; ends with the end-of-turn token unless cut."""
    rejected_ids: np.ndarray
    """int32 [answer tokens], at least one; ends with the end-of-turn token unless cut."""
    chosen_bytes: int
    """UTF-8 bytes of the chosen answer's text without the end-of-turn token; if it was cut, of the kept part."""


class PairDataset:
    """N tokenised pairs, memory-mapped from the cache, so that the processes of a machine share the pages."""

    digest: str
    """SHA-256 of the ids and tokens of all pairs in order."""
    counts: dict[str, int]
    """Counts made while reading, by the keys in `COUNTS`."""
    prompt_lengths_N: np.ndarray
    """int64 [N], in tokens."""
    chosen_lengths_N: np.ndarray
    """int64 [N], in tokens, including the end-of-turn token."""
    rejected_lengths_N: np.ndarray
    """int64 [N], in tokens, including the end-of-turn token."""

    def __init__(self, folder: Path, name: str) -> None:
        """Open the split `name` (train or eval) in a folder of the cache."""
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

    @functools.cached_property
    def lengths_N3(self) -> np.ndarray:
        """int64 [N, 3]: lengths of prompt, chosen and rejected, in tokens."""
        return np.stack([self.prompt_lengths_N, self.chosen_lengths_N, self.rejected_lengths_N], axis=1)

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
        """The prompt as the chat template renders it, up to the start of the answer; not cut, even if its ids are."""
        return str(self._columns["prompt_text"][index].as_py())


def load_pairs(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PairDataset, PairDataset]:
    """The training and the held-out pairs, tokenised at the first call and read from the cache afterwards.

    Many processes may call this at once: one tokenises, the others wait. No prompt is in both sets.

    Args:
        config: source of the pairs, and how they are split and cut.
        tokenizer: a fast tokenizer with an EOS token.

    Returns:
        Training pairs and held-out pairs, both in the order of their source.

    Raises:
        DataError: the source, split or columns do not exist; a row is bad under `on_bad_rows: error`; no pair is left;
            or the tokenizer is slow or has no EOS token.
    """
    tokens = PairTokenizer(config, tokenizer)
    train, held_out = choose_splits(config)
    key = _cache_key(config, tokens, [split.fingerprint() for split in (train, held_out) if split])
    folder = Path(config.cache_dir).expanduser() / "pairs" / key
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                tokens.require_bounded_template()
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
                    finished = Path(scratch) / key
                    finished.mkdir()
                    _write_both(finished, config, train, held_out, tokens)
                    os.replace(finished, folder)
    return PairDataset(folder, "train"), PairDataset(folder, "eval")


def held_out_texts(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, TextPair]]:
    """(pair id, texts) of the held-out pairs of `load_pairs`, in the same order.

    Raises:
        DataError: as for `load_pairs`.
    """
    _, pairs = load_pairs(config, tokenizer)
    wanted = dict.fromkeys(pairs[index].pair_id for index in range(len(pairs)))
    train, held_out = choose_splits(config)
    found = {pair_id: parse_row(row) for pair_id, row in (held_out or train).read() if pair_id in wanted}
    return [(pair_id, found[pair_id]) for pair_id in wanted]


def batch_indices(step: int, num_pairs: int, batch_size: int, seed: int) -> np.ndarray:
    """Indices of the pairs in an optimizer step's global batch. A pure function, so resuming needs only the step.

    Epochs are seeded permutations, one after another; a batch may span two epochs, and no pair is dropped at the end of
    one.

    Args:
        step: number of the step, from 1.
        num_pairs: size of the training set.
        batch_size: pairs per optimizer step, over all workers.
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


# ---- split, write, cache ------------------------------------------------------------------------------------------


def _write_both(folder: Path, config: DataConfig, train: Split, held_out: Split | None, tokens: PairTokenizer) -> None:
    positions, prompts, counts = _scan(train, config.on_bad_rows)
    shuffled = np.random.default_rng(config.split_seed).permutation(len(positions))
    if held_out is None:
        if config.eval_pairs >= len(positions):
            raise DataError(
                f"{config.path}: data.eval_pairs ({config.eval_pairs}) must be below the number of pairs "
                f"({len(positions)}): without a held-out split they are set aside from the training pairs"
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


def _scan(split: Split, on_bad_rows: str) -> tuple[np.ndarray, list[bytes], Counter[str]]:
    """Positions of the usable rows, digests of their prompts, and counts of all other rows."""
    positions, prompts, counts = [], [], Counter[str]()
    first_problem = ""
    for position, (pair_id, row) in enumerate(split.read()):
        counts["rows"] += 1
        if position == 0 and isinstance(row, Mapping) and not {"chosen", "rejected"} <= row.keys():
            raise DataError(f"{pair_id}: columns {_named(row)} hold no pair\n{ACCEPTED_SHAPES}")
        try:
            texts = parse_row(row)
        except BadRow as bad:
            first_problem = first_problem or f"; the first, {pair_id}: {bad.detail}\n{ACCEPTED_SHAPES}"
            drop(bad, pair_id, on_bad_rows, counts)
            continue
        positions.append(position)
        prompts.append(hashlib.sha256(json.dumps(texts.prompt).encode()).digest())
    if not positions:
        raise DataError(f"{split.source}, split {split.name}: it has no usable pair ({_shown(counts)}){first_problem}")
    return np.array(positions), prompts, counts


def _named(row: Mapping[object, object]) -> str:
    """The columns of a row, shortened for a message."""
    names = [str(name) if str(name).isprintable() else repr(name) for name in itertools.islice(row, 20)]
    return ", ".join([f"{name:.40}" for name in names]) + (f" and {len(row) - 20} more" if len(row) > 20 else "")


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {counts[name]}" for name in COUNTS if counts[name])


def _write(
    folder: Path, name: str, split: Split, positions: np.ndarray, tokens: PairTokenizer, counts: Counter[str]
) -> None:
    wanted, digest = set(positions.tolist()), hashlib.sha256()
    rows = (item for position, item in enumerate(split.read()) if position in wanted)
    with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for chunk in _chunks((pair_id, parse_row(row)) for pair_id, row in rows):
            batch = tokens.batch(chunk, counts)
            counts["pairs"] += len(batch)
            digest.update("\n".join(batch["pair_id"].to_pylist()).encode())
            for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
                digest.update(pc.list_value_length(batch[column]).to_numpy().tobytes())
                digest.update(batch[column].flatten().to_numpy().tobytes())
            writer.write_batch(batch)
    if not counts["pairs"]:
        guess = "are data.max_prompt_tokens and data.max_tokens too small, or every prompt in both sets?"
        raise DataError(
            f"{split.source}, split {split.name}: no pair is left for {name} ({_shown(counts)}); "
            + (tokens.first_refusal if counts["dropped_template_error"] else guess)
        )
    summary = {"digest": digest.hexdigest(), "counts": {name: counts[name] for name in COUNTS}}
    (folder / f"{name}.json").write_text(json.dumps(summary), encoding="utf-8")


def _chunks(pairs: Iterable[tuple[str, TextPair]]) -> Iterator[list[tuple[str, TextPair]]]:
    """Pairs in chunks that are tokenised at a time: fewer if they are long."""
    chunk: list[tuple[str, TextPair]] = []
    characters = 0
    for pair_id, texts in pairs:
        chunk.append((pair_id, texts))
        characters += len(texts.chosen) + len(texts.rejected) + sum(len(turn["content"]) for turn in texts.prompt)
        if len(chunk) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _cache_key(config: DataConfig, tokens: PairTokenizer, fingerprints: Sequence[str]) -> str:
    parts = {
        "version": _FORMAT_VERSION,
        # Files count by content, not by path.
        "config": config.model_dump(mode="json", exclude={"path", "eval_path", "cache_dir", "chat_template"}),
        "sources": list(fingerprints),
        **tokens.identity(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
