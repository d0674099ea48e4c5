"""Learning rate and number of steps of a trial."""

from __future__ import annotations

import math

from orpo_ray.config import ExperimentConfig, OptimConfig


def num_steps(config: ExperimentConfig, num_pairs: int) -> int:
    """Optimizer steps of a trial: `max_steps`, or `epochs` over `num_pairs` pairs, rounded up."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    assert config.train.epochs is not None
    return math.ceil(config.train.epochs * num_pairs / config.train.global_batch_size)


def learning_rate(optim: OptimConfig, at: int, max_steps: int) -> float:
    """Learning rate of optimizer step `at` (from 1). Linear warm-up reaches `lr` at its last step.

    After the warm-up, cosine and linear fall to 0 one step past the end, and inverse_sqrt is lr · sqrt(warmup / step).
    """
    warmup = optim.warmup_steps if optim.warmup_steps is not None else round(optim.warmup_ratio * max_steps)
    if at <= warmup:
        return optim.lr * at / warmup
    share = (at - warmup) / (max_steps - warmup + 1)
    match optim.schedule:
        case "cosine":
            return optim.lr * 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            return optim.lr * (1 - share)
        case "inverse_sqrt":
            return optim.lr * math.sqrt(max(warmup, 1) / at)
        case "constant":
            return optim.lr
