"""Files of pairs, and reading them as a trial does."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orpo_ray.config import DataConfig, ModelConfig
from tests.support.hostile.case import Feed, Make

ROW = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}


def rows(count: int) -> list[dict[str, str]]:
    return [{name: f"{text} {number}" for name, text in ROW.items()} for number in range(count)]


@functools.cache
def tokenizer() -> Any:
    from orpo_ray.models.loading import load_tokenizer

    return load_tokenizer(ModelConfig(path="tiny-llama-1m"))


def load_as_a_trial_does(path: Path | str, folder: Path, **settings: Any) -> str:
    """Read pairs as a trial does; what has become of the rows."""
    from orpo_ray.data.dataset import load_pairs

    settings = {"eval_pairs": 2, "cache_dir": str(folder / "cache")} | settings
    pairs, _ = load_pairs(DataConfig(path=str(path), **settings), tokenizer())
    dropped = [f"{name} {count}" for name, count in pairs.counts.items() if count and name.startswith("dropped_")]
    start = f"dropped and counted ({', '.join(dropped)}), " if dropped else "read, "
    return f"{start}{len(pairs)} pairs to train on"


def data_file(name: str, content: bytes | Callable[[], bytes], **settings: Any) -> Make:
    """A file of pairs."""

    def make(folder: Path) -> Feed:
        (folder / name).write_bytes(content() if callable(content) else content)
        return lambda: load_as_a_trial_does(folder / name, folder, **settings)

    return make


def among_good(*lines: str | bytes, **settings: Any) -> Make:
    """Lines among ten good rows."""
    good = [json.dumps(row).encode() for row in rows(10)]
    bad = [line.encode() if isinstance(line, str) else line for line in lines]
    return data_file("pairs.jsonl", b"\n".join([*good[:5], *bad, *good[5:]]), **settings)


def data_path(path: str, **settings: Any) -> Make:
    return lambda folder: lambda: load_as_a_trial_does(path, folder, **settings)
