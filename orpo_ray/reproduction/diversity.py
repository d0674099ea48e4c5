"""Diversity of sampled answers (paper eq. 12-13, Table 4), as mean cosine similarities.

High values mean little diversity. Per-input: K answers to the same prompt, averaged over prompts. Across-input: the
first answers to different prompts.

Eq. 13 has a factor 1/2, and N where the K answers of eq. 12 are meant. This module computes the plain mean over
distinct unordered pairs, so that identical answers give 1. Half a mean could not reach Table 4's 0.90 either.

Values depend on the embedder. The paper uses Gemini-Pro; only values of the same embedder can be compared.

Shape suffixes: N prompts, K answers to each, T texts, D dimensions, B resamples.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orpo_ray.errors import MissingExtraError
from orpo_ray.results.bootstrap import LEVEL, RESAMPLES, draws

EXTRA = "wordllama==0.4.0.post1"
"""Requirement of `local_embedder`."""

Embed = Callable[[Sequence[str]], np.ndarray]
"""T texts -> vectors [T, D] of any norm: only their directions are used."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """A mean cosine similarity, -1 to 1, with a 95 % interval over prompts; lower is more diverse."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Diversity:
    """Similarity of answers to N prompts, K each."""

    per_input: Similarity
    """Between answers to the same prompt."""
    across_input: Similarity
    """Between the first answers to different prompts."""
    prompts: int
    """N."""
    answers: int
    """K."""
    without_direction: int
    """How many of the N · K answers are empty, white space only, or embedded as 0."""


def diversity(
    answers_NK: Sequence[Sequence[str]], embed: Embed, resamples: int = RESAMPLES, seed: int = 0
) -> Diversity:
    """Per-input and across-input similarity (paper eq. 12-13, Table 4), each with a bootstrap interval over prompts.

    An empty answer has no direction. It counts as a text orthogonal to all others: cosine 1 with another empty answer,
    0 with any other. Without them, a model that often answers nothing would look diverse. The same holds for answers
    that are embedded as 0.

    Intervals are percentiles, too narrow below 10 prompts or so. A prompt that a resample draws twice is not compared
    with itself, because that cosine of 1 would inflate the across-input values. Where answers to different prompts have
    nothing in common, the across-input interval is up to 1.7 times too wide.

    Args:
        answers_NK: K sampled answers to each of N prompts.
        embed: see `local_embedder`. Never called with texts of white space only.
        resamples: number of bootstrap resamples of the prompts, B.
        seed: seed of the bootstrap.

    Raises:
        ValueError: N < 2, K < 2, prompts have different numbers of answers, or `embed` does not return one finite
            vector for each text.
    """
    prompts, counts = len(answers_NK), {len(answers) for answers in answers_NK}
    if prompts < 2 or len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            f"diversity needs at least 2 prompts with the same number of answers each, at least 2; there are {prompts} "
            f"prompts with {', '.join(map(str, sorted(counts))) or 'no'} answers"
        )
    answers = counts.pop()
    unit_TD, without_T = _directions([text for of_prompt in answers_NK for text in of_prompt], embed)
    unit_NKD = unit_TD.reshape(prompts, answers, -1)
    # Over ordered pairs of different answers: |Σ u|² - Σ |u|², without a K × K matrix.
    squares_N = np.square(unit_NKD).sum((1, 2))
    within_N = (np.square(unit_NKD.sum(1)).sum(1) - squares_N) / (answers * (answers - 1))
    first_ND = unit_NKD[:, 0]
    drawn_within, drawn_across = [], []
    for counts_BN in draws(prompts, resamples, seed):
        drawn_within.append(counts_BN @ within_N / prompts)
        drawn_across.append(_across(counts_BN, first_ND))
    return Diversity(
        per_input=_similarity(float(within_N.mean()), np.concatenate(drawn_within)),
        across_input=_similarity(float(_across(np.ones((1, prompts)), first_ND)[0]), np.concatenate(drawn_across)),
        prompts=prompts,
        answers=answers,
        without_direction=int(without_T.sum()),
    )


def local_embedder() -> Embed:
    """WordLlama's 256-dimensional embeddings (l2_supercat). The package contains them, so nothing is downloaded.

    A text's embedding is the mean of its tokens' vectors. It reflects which words occur, but not their order or
    context.

    Raises:
        MissingExtraError: wordllama is not installed.
    """
    wordllama = _wordllama()
    # Its own folder as cache: 0.4.0 ships the tokenizer in `tokenizers`, but otherwise looks in a folder `tokenizer`.
    model = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)

    def embed(texts: Sequence[str]) -> np.ndarray:
        # Batches are padded to their longest text; small batches limit memory of T × tokens × D.
        return np.asarray(model.embed(list(texts), batch_size=16))

    return embed


def _wordllama() -> Any:
    """Import the package, and undo what its first import does to the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    is_first = "wordllama" not in sys.modules
    try:
        return importlib.import_module("wordllama")
    except ImportError as error:
        raise MissingExtraError(
            f"local embeddings need wordllama, and {error.name or error} is not installed: pip install "
            f"'orpo-ray[judges]', or '{EXTRA}'"
        ) from error
    finally:
        if is_first:
            root.handlers[:] = handlers
            root.setLevel(level)


def _directions(texts: Sequence[str], embed: Embed) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [T, D + 1], and which texts have no direction [T]: those point along the last dimension."""
    asked = [index for index, text in enumerate(texts) if text.strip()]
    found = np.zeros((0, 0))
    if asked:
        found = np.asarray(embed([texts[index] for index in asked]), dtype=np.float64)
    if found.ndim != 2 or len(found) != len(asked) or not np.isfinite(found).all():
        values = "finite values" if np.isfinite(found).all() else "values that are not finite"
        raise ValueError(
            f"embed must give {len(asked)} texts one finite vector each; it gave {found.shape} of {values}"
        )
    unit_TD = np.zeros((len(texts), found.shape[1] + 1))
    unit_TD[asked, :-1] = found
    # Scaled by the largest entry first: the square of a small entry could underflow to 0.
    largest_T = np.abs(unit_TD).max(1)
    without_T = largest_T == 0
    unit_TD[without_T, -1] = largest_T[without_T] = 1.0
    unit_TD /= largest_T[:, None]
    return unit_TD / np.linalg.norm(unit_TD, axis=1, keepdims=True), without_T


def _across(counts_BN: np.ndarray, first_ND: np.ndarray) -> np.ndarray:
    """Mean cosine between answers to different prompts, each weighted by how often it was drawn, [B].

    |Σ w u|² counts all ordered pairs; the w² pairs of a prompt with itself are subtracted from numerator and
    denominator. NaN where only one prompt was drawn.
    """
    weights_BN = np.square(counts_BN)
    top_B = np.square(counts_BN @ first_ND).sum(1) - weights_BN @ np.square(first_ND).sum(1)
    bottom_B = np.square(counts_BN.sum(1)) - weights_BN.sum(1)
    return np.divide(top_B, bottom_B, out=np.full(len(top_B), np.nan), where=bottom_B > 0)


def _similarity(value: float, drawn_B: np.ndarray) -> Similarity:
    low, high = np.nanquantile(drawn_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Similarity(value, low, high)
