"""The reference model's log-probabilities of the pairs: computed once per model and data set, cached on disk.

The reference model of dpo and ipo is the model that training starts from, without adapters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock
from rich.console import Console
from rich.progress import track
from transformers.utils.hub import cached_file, extract_commit_hash

from orpo_ray.config import ExperimentConfig, ModelConfig
from orpo_ray.data.dataset import Pair, PairDataset
from orpo_ray.models.loading import build_model
from orpo_ray.models.logps import PairLogps
from orpo_ray.models.packing import LossMask, micro_batches
from orpo_ray.models.pair_model import PairModel, pair_logps
from orpo_ray.models.precision import matmul_dtype, precision_name
from orpo_ray.models.presets import PRESETS
from orpo_ray.models.probe import frozen_model

_FORMAT_VERSION = 2  # increment it whenever the same model and pairs would get other numbers


class ReferenceLogpsError(ArithmeticError):
    """The reference model's log-probabilities cannot be used; the message names the pairs or the file."""


def identity_of(config: ExperimentConfig, precision: str) -> dict[str, Any]:
    """All settings that the reference's log-probabilities depend on, besides the pairs; JSON values.

    Weights are identified by the commit of a hub model; by names, sizes and times of a folder's files; and by seed and
    library versions for a preset, which is initialised at random. Adapters, attention kernel and batch sizes do not
    matter.

    Args:
        config: the trial's.
        precision: of the matrix products, `fp32` or `bf16` (what `auto` means depends on the device).

    Raises:
        OSError: a hub model cannot be found.
    """
    model = config.model.model_dump(mode="json", include={"path", "gguf_file", "revision"})
    return {
        "model": model | {"weights": _weights(config.model, config.train.seed)},
        "answer_padding": config.loss.answer_padding,
        "products": precision,
    }


def logps_of(config: ExperimentConfig, pairs: PairDataset, loss_mask: LossMask, pad_token_id: int) -> np.ndarray:
    """The reference model's mean log-probabilities of an experiment's pairs, from the cache or computed now.

    Returns:
        float32 [N, 2], see `load_or_compute`.

    Raises:
        ReferenceLogpsError: see `load_or_compute`.
        ModelError: the reference model cannot be loaded.
    """
    dtype = matmul_dtype(config.train.precision)

    @lru_cache(maxsize=1)
    def model() -> PairModel:
        lm = build_model(config.model.model_copy(update={"lora": None}), config.train.seed)
        return frozen_model(lm, config.model.attention, dtype)

    def compute(members: Sequence[Pair]) -> PairLogps:
        batch = model().collate(members, loss_mask, pad_token_id)
        return pair_logps(model(), batch.to(model().device))

    return load_or_compute(
        pairs,
        compute,
        identity_of(config, precision_name(dtype)),
        cache_dir=config.data.cache_dir,
        max_tokens=config.train.max_tokens_per_micro_batch,
        max_pairs=config.train.micro_batch_size,
    )


def load_or_compute(
    pairs: PairDataset,
    compute: Callable[[Sequence[Pair]], PairLogps],
    identity: dict[str, Any],
    *,
    cache_dir: str,
    max_tokens: int,
    max_pairs: int | None = None,
) -> np.ndarray:
    """The reference model's mean log-probabilities, computed by the first call and read from the cache by later ones.

    Many processes may call this at once: one computes, the others wait at a file lock. It is not a collective, so
    `compute` must not be one either (a model partitioned by ZeRO-3 would wait for ever). A call leaves the random state
    unchanged, whether or not it computes.

    Args:
        pairs: N pairs.
        compute: from the pairs of a micro-batch to log-probabilities under the reference model, in evaluation mode. It
            is called under `no_grad`, longest pairs first, and only if the cache has no numbers: load the model in it.
        identity: what the numbers depend on besides the pairs.
        cache_dir: `data.cache_dir`.
        max_tokens: most tokens per call of `compute`, two padded sequences for each pair; a longer pair gets a call of
            its own.
        max_pairs: most pairs per call of `compute`; None for no limit.

    Returns:
        float32 [N, 2], in the order of `pairs`: mean token log-probability of the chosen and of the rejected answer.

    Raises:
        ReferenceLogpsError: log-probabilities are not finite, or the cached file does not fit these pairs.
    """
    parts = {"version": _FORMAT_VERSION, "pairs": pairs.digest, "identity": identity}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    file = Path(cache_dir).expanduser() / "reference" / f"{key}.npy"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                _write(file, _compute(pairs, compute, max_tokens, max_pairs))
    means_N2 = np.load(file)
    if means_N2.shape != (len(pairs), 2) or means_N2.dtype != np.float32:
        raise ReferenceLogpsError(
            f"{file} holds {means_N2.dtype} {means_N2.shape}, but float32 {(len(pairs), 2)} is needed; remove it, and "
            "it will be computed again"
        )
    return means_N2


def _compute(
    pairs: PairDataset,
    compute: Callable[[Sequence[Pair]], PairLogps],
    max_tokens: int,
    max_pairs: int | None,
) -> np.ndarray:
    means_N2 = np.empty((len(pairs), 2), dtype=np.float32)
    console = Console(stderr=True)
    # Loading a model reseeds. If the state were not restored, a run with a filled cache would train differently.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        cut = micro_batches(pairs.lengths_N3, 1, max_pairs=max_pairs, max_tokens=max_tokens, share_prompt=False)
        for (indices,) in track(
            cut,
            "reference log-probabilities",
            console=console,
            disable=not console.is_terminal,
        ):
            logps = compute([pairs[int(i)] for i in indices])
            means_P2 = torch.stack([logps.chosen_logps_P, logps.rejected_logps_P], dim=1)
            means_N2[indices] = means_P2.float().cpu().numpy()
    broken = [pairs[int(i)].pair_id for i in np.flatnonzero(~np.isfinite(means_N2).all(1))]
    if broken:
        raise ReferenceLogpsError(
            f"the reference model's log-probabilities are not finite for {len(broken)} of {len(pairs)} pair(s): "
            f"{', '.join(broken[:8])}{', ...' if len(broken) > 8 else ''}; check its weights, or train.precision: fp32"
        )
    return means_N2


def _write(file: Path, means_N2: np.ndarray) -> None:
    """Write a file atomically: a killed process leaves no partial file. The caller holds the lock."""
    scratch = file.with_suffix(".writing")
    with scratch.open("wb") as stream:
        np.save(stream, means_N2)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(scratch, file)


def _weights(model: ModelConfig, seed: int) -> dict[str, Any]:
    if model.path in PRESETS:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"architecture": PRESETS[model.path], "seed": seed, **versions}
    folder = Path(model.path)
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.is_file())
        if model.gguf_file is not None:
            files.append(folder / model.gguf_file)
        return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    found = cached_file(model.path, model.gguf_file or "config.json", revision=model.revision)
    return {"commit": extract_commit_hash(found, None)}
