"""The pairs and the weights of a case: the same for every side."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.case import Case
from orpo_ray.config import DataConfig, ModelConfig
from orpo_ray.data.dataset import Pair, PairDataset, batch_indices, load_pairs
from orpo_ray.data.tokenizer import SCHEMA
from orpo_ray.models.loading import PRESETS, build_model, load_tokenizer

CACHE = Path("~/.cache/orpo-ray").expanduser()
HH = "hh-rlhf-harmless-base-test.jsonl.gz"
HEAD_WIDTH = 64
"""Of the heads of random models."""


class WorkloadError(ValueError):
    """A case names pairs or weights that cannot be had; the message says what to do."""


def hh_path() -> Path:
    """The HH-RLHF harmless pairs in $ORPO_RAY_SHARED/data, or in `shared/data` beside the repository.

    Raises:
        WorkloadError: not there.
    """
    folder = Path(os.environ.get("ORPO_RAY_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    path = folder / "data" / HH
    if not path.is_file():
        raise WorkloadError(
            f"{path}: no such file; name the folder above data/{HH} in ORPO_RAY_SHARED, or give --data "
            "Anthropic/hh-rlhf, tokens:PROMPT:CHOSEN:REJECTED or builtin://style-pairs"
        )
    return path


def model_config(case: Case) -> ModelConfig:
    """The case's model; a random one is written to the cache at its first use.

    Raises:
        WorkloadError: a malformed `random:`.
    """
    path = _random_model(case) if case.model.startswith("random:") else case.model
    if path == Case().model and (CACHE / "smollm2-135m-instruct").is_dir():
        path = str(CACHE / "smollm2-135m-instruct")
    return ModelConfig(path=path, gradient_checkpointing=case.checkpointing and case.side == "ours")


def data_config(case: Case) -> DataConfig:
    """Where orpo_ray reads the case's pairs; for random ids, a stand-in of a few pairs."""
    if lengths(case) is not None:
        return DataConfig(path="builtin://style-pairs", train_pairs=32, eval_pairs=8)
    path = str(hh_path()) if case.data == "hh" else case.data
    if path == "builtin://style-pairs":
        return DataConfig(path=path, train_pairs=512, eval_pairs=8, max_tokens=256, max_prompt_tokens=160)
    return DataConfig(path=path, eval_pairs=8)


def lengths(case: Case) -> tuple[int, int, int] | None:
    """Tokens of prompt, chosen and rejected answer where the case asks for random ids.

    Raises:
        WorkloadError: malformed.
    """
    data = "tokens:30:400:400" if case.data == "long" else case.data
    if not data.startswith("tokens:"):
        return None
    try:
        prompt, chosen, rejected = (int(part) for part in data.split(":")[1:])
    except ValueError:
        raise WorkloadError(f"--data {data}: write tokens:PROMPT:CHOSEN:REJECTED, e.g. tokens:30:400:400") from None
    if min(prompt, chosen, rejected) < 1:
        raise WorkloadError(f"--data {data}: prompt and answers need at least one token each")
    return prompt, chosen, rejected


def load(case: Case) -> PairDataset:
    """The case's training pairs, from orpo_ray's own reader, or random ids in the same form."""
    wanted = lengths(case)
    if wanted is None:
        return load_pairs(data_config(case), load_tokenizer(model_config(case)))[0]
    ids = np.random.default_rng(case.seed)
    vocabulary = len(load_tokenizer(model_config(case)))
    rows = [
        dict(zip(SCHEMA.names, (f"random:{i}", "", *(ids.integers(0, vocabulary, n) for n in wanted), 0), strict=True))
        for i in range(case.batch * (case.steps + 1))
    ]
    folder = CACHE / "benchmarks" / f"pairs-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    arrow, summary = folder / "train.arrow", folder / "train.json"
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    summary.write_text(json.dumps({"digest": "", "counts": {}}), encoding="utf-8")
    pairs = PairDataset(folder, "train")
    for path in (arrow, summary):
        path.unlink()  # the memory map keeps the pages
    folder.rmdir()
    return pairs


def global_batches(case: Case, pairs: PairDataset) -> list[np.ndarray]:
    """Indices of each step's pairs, the warm-up step first."""
    return [batch_indices(at, len(pairs), case.batch, case.seed) for at in range(1, case.steps + 2)]


def peer_model(case: Case) -> torch.nn.Module:
    """The weights that ours starts from, in fp32, for a peer: with SDPA, as transformers loads a model for anyone."""
    config = model_config(case).model_copy(update={"attention": "sdpa"})
    if config.path in PRESETS:
        return build_model(config, case.seed)
    # Not `build_model`: it keeps a second copy for the next trial, which would count as the peer's memory.
    return AutoModelForCausalLM.from_pretrained(config.path, dtype=torch.float32, attn_implementation="sdpa")


def members(pairs: PairDataset, indices: np.ndarray) -> list[Pair]:
    """The pairs of a batch."""
    return [pairs[int(i)] for i in indices]


def _random_model(case: Case) -> str:
    """Folder of a Llama with random weights, an embedding of any size and the presets' tokenizer."""
    try:
        vocabulary, width, layers = (int(part) for part in case.model.split(":")[1:])
    except ValueError:
        raise WorkloadError(
            f"--model {case.model}: write random:VOCABULARY:WIDTH:LAYERS, e.g. random:49152:256:4"
        ) from None
    tokenizer = load_tokenizer(ModelConfig(path="tiny-llama-1m"))
    if vocabulary < len(tokenizer) or width % HEAD_WIDTH or layers < 1:
        raise WorkloadError(
            f"--model {case.model}: the vocabulary needs at least {len(tokenizer)} tokens, the width a multiple of "
            f"{HEAD_WIDTH}, the layers at least 1"
        )
    folder = CACHE / "benchmarks" / f"random-{vocabulary}-{width}-{layers}-{case.seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "config.json").is_file():
            torch.manual_seed(case.seed)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=vocabulary,
                    hidden_size=width,
                    intermediate_size=8 * width // 3 // HEAD_WIDTH * HEAD_WIDTH,
                    num_hidden_layers=layers,
                    num_attention_heads=width // HEAD_WIDTH,
                    max_position_embeddings=32768,
                    tie_word_embeddings=True,
                    bos_token_id=0,
                    eos_token_id=1,
                    pad_token_id=2,
                )
            )
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
    return str(folder)
