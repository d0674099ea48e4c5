"""Estimate the duration of an optimizer step before training, to a factor of about 2: operations over a rate."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from orpo_ray.config import DataConfig, ExperimentConfig
from orpo_ray.planning.architecture import Architecture

_SAMPLE = 256
"""Pairs that are read to estimate lengths."""
_BYTES_PER_TOKEN = 3.0
"""Bytes of prompt and answer texts per token, chat template included: 2.9 to 3.4 for HH-RLHF and the built-in pairs
with SmolLM2's and the presets' tokenizers."""
_SHARE_OF_LIMIT = 0.25
"""Assumed length of a sequence as a share of `data.max_tokens` where the data are not on this machine."""
_EFFICIENCY = 0.6
"""Operations per second of a whole step relative to its matrix products alone (66 % in `benchmarks.limit`)."""
CPU_BF16_GAIN = 1.5
"""Rate of a bf16 step relative to fp32 on a CPU with bf16 units: 1.3 to 1.6 with AVX-512 BF16 (docs/log.md,
2026-11-27); not measured with AMX."""
_RECOMPUTATION = 4 / 3
"""Gradient checkpointing repeats the forward pass: four products instead of three."""
_ADAPTERS_ONLY = 2 / 3
"""Frozen weights need no gradient: two products instead of three."""


@dataclass(frozen=True, slots=True)
class PairTokens:
    """Mean tokens of a pair."""

    prompt: float
    answers: float
    """Chosen and rejected together."""
    basis: str
    """Origin of the numbers, which the plan shows."""

    def of_a_pass(self, shares_prompt: bool) -> float:
        """Tokens of the pair that the model processes."""
        return self.prompt * (1 if shares_prompt else 2) + self.answers


def pair_tokens(data: DataConfig) -> PairTokens:
    """Mean lengths from the texts of the first pairs. Hub data sets are not fetched: their lengths are assumed."""
    from orpo_ray.data.rows import BadRow, parse_row
    from orpo_ray.data.sources import BUILTIN, choose_splits

    if data.path != BUILTIN and not Path(data.path).expanduser().exists():
        sequence = _SHARE_OF_LIMIT * data.max_tokens
        return PairTokens(sequence / 2, sequence, f"pairs assumed to fill {_SHARE_OF_LIMIT:.0%} of data.max_tokens")
    prompts, answers = [], []
    for _, row in islice(choose_splits(data)[0].read(), _SAMPLE):
        try:
            texts = parse_row(row)
        except BadRow:
            continue
        prompt = sum(len(str(message["content"]).encode()) for message in texts.prompt) / _BYTES_PER_TOKEN
        room = data.max_tokens - min(prompt, data.max_prompt_tokens)
        prompts.append(min(prompt, data.max_prompt_tokens))
        answers.append(sum(min(len(text.encode()) / _BYTES_PER_TOKEN, room) for text in (texts.chosen, texts.rejected)))
    count = max(1, len(prompts))
    return PairTokens(
        sum(prompts) / count, sum(answers) / count, f"lengths from the texts of the first {len(prompts)} pairs"
    )


def pair_flops(config: ExperimentConfig, architecture: Architecture, tokens: PairTokens) -> float:
    """FLOPs of the forward and backward pass of a mean pair, without the optimizer.

    A product [m × k] · [k × n] counts 2mkn, and each of its two gradients the same: 6 per weight and token (Kaplan et
    al. 2020, arXiv 2001.08361).
    """
    seen = tokens.of_a_pass(config.model.attention == "shared_prompt")
    linear = 6.0 * architecture.linear_parameters * seen
    head = 6.0 * architecture.hidden * architecture.vocabulary * (tokens.prompt + tokens.answers)
    sequence = tokens.prompt + tokens.answers / 2
    attention = 12.0 * architecture.layers * architecture.attention * sequence**2  # two sequences, half of each masked
    body = (linear + attention) * (_RECOMPUTATION if config.model.gradient_checkpointing else 1.0)
    return (body + head) * (_ADAPTERS_ONLY if config.model.lora else 1.0)


def cpu_rate(architecture: Architecture, seconds: float = 0.1) -> float:
    """Measure fp32 FLOP/s of one of this machine's CPUs, in products of the model's own width.

    Args:
        architecture: determines the size of the products.
        seconds: duration of the measurement.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    x_TD = rng.random((1024, architecture.hidden), dtype=np.float32)
    w_DI = rng.random((architecture.hidden, architecture.intermediate), dtype=np.float32)
    x_TD @ w_DI  # warm-up: starts the threads
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        at = time.perf_counter()
        x_TD @ w_DI
        best = min(best, time.perf_counter() - at)
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return 2.0 * x_TD.size * architecture.intermediate / best / threads


def step_seconds(config: ExperimentConfig, flops_of_a_pair: float, rate: float) -> float:
    """Seconds of one optimizer step.

    Args:
        config: the trial's config.
        flops_of_a_pair: from `pair_flops`.
        rate: FLOP/s of one worker's matrix products.
    """
    pairs = -(-config.train.global_batch_size // config.scaling.num_workers)
    return pairs * flops_of_a_pair / (rate * _EFFICIENCY)


def trial_seconds(config: ExperimentConfig, steps: int, seconds_per_step: float) -> float:
    """Seconds of a trial, including evaluations, where a pair takes a third of the work of a training pair."""
    evaluations = max(1, steps // (config.train.eval_every or steps))
    evaluated = evaluations * config.data.eval_pairs / 3 / config.train.global_batch_size
    return (steps + evaluated) * seconds_per_step
