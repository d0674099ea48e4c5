"""Check an exported folder: load it with plain transformers and compare its held-out metrics with the logged ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from orpo_ray.config import ExperimentConfig, LossConfig
from orpo_ray.data.dataset import PairDataset, load_pairs
from orpo_ray.models.loading import load_tokenizer
from orpo_ray.models.packing import LossMask
from orpo_ray.models.pair_model import ForwardMode, PairModel
from orpo_ray.results.model_card import Pairs
from orpo_ray.storage.pair_scores import PairScores
from orpo_ray.training import loss
from orpo_ray.training.evaluate import evaluate

FP32_NATS = 1e-4
"""Allowed change of a log-probability in fp32: other kernels, another order of sums, merged adapters."""
BF16_NATS = 1e-2
"""The same where the run multiplied in bf16 or the weights are rounded to it: 8 significant bits, each off by 2^-9."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A held-out metric as logged and as computed again."""

    metric: str
    logged: float
    again: float
    """Computed from the exported folder."""
    allowed: float
    """Largest difference that rounding explains."""

    @property
    def agrees(self) -> bool:
        """Whether the difference is allowed; False where a value is not finite."""
        return abs(self.again - self.logged) <= self.allowed + 1e-9  # shares of pairs are not exact in binary


@dataclass(frozen=True, slots=True)
class Check:
    """Result of `check`."""

    comparisons: tuple[Comparison, ...]
    problem: str = ""
    """Why the numbers cannot agree, if known."""

    @property
    def passed(self) -> bool:
        """Whether every number agrees."""
        return not self.problem and bool(self.comparisons) and all(row.agrees for row in self.comparisons)

    def table(self) -> Table:
        """The comparisons as a table for the terminal."""
        table = Table(box=None, pad_edge=False, title_justify="left", title="held-out metrics, logged and again")
        table.add_column("metric")
        for heading in ("by the run", "from the folder", "difference", "allowed"):
            table.add_column(heading, justify="right")
        for row in self.comparisons:
            cells = (f"{row.logged:.6f}", f"{row.again:.6f}", f"{row.again - row.logged:+.1e}", f"{row.allowed:.1e}")
            table.add_row(row.metric, *cells, style="" if row.agrees else "red")
        return table


class _Alone(PairModel):
    """A `PairModel` with the attributes that `evaluate` needs from a DeepSpeed engine."""

    @property
    def module(self) -> PairModel:
        """The model itself: no engine wraps it."""
        return self

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device


def check(
    folder: Path, config: ExperimentConfig, logged: Mapping[str, float | None], step: int, rounded: bool
) -> tuple[Check, tuple[Pairs, Pairs]]:
    """Load a folder with plain transformers and evaluate it on the run's held-out pairs: fp32, padded rows, all logits.

    Args:
        folder: an exported model.
        config: the trial's config.
        logged: the metrics that the run logged after `step`.
        step: optimizer steps done.
        rounded: whether the run multiplied in bf16, or the folder's weights are rounded to it.

    Returns:
        The compared metrics, and the training and held-out pairs.
    """
    remote = config.model.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
    # Use the exported chat template, not the config's: both must give the same tokens.
    train, held_out = load_pairs(config.data.model_copy(update={"chat_template": None}), tokenizer)
    trained_on = load_pairs(config.data, load_tokenizer(config.model))
    pairs = Pairs(len(train), train.digest), Pairs(len(held_out), held_out.digest)
    if (train.digest, held_out.digest) != tuple(known.digest for known in trained_on):
        problem = "the exported tokenizer and chat template give the run's pairs other tokens than in training"
        return Check((), problem), pairs
    # fp32 for rounded weights too: the check is of the weights, not of the arithmetic used later.
    kind = AutoModelForSequenceClassification if config.loss.is_reward else AutoModelForCausalLM
    lm = kind.from_pretrained(folder, trust_remote_code=remote, dtype=torch.float32)
    model = _Alone(lm, ForwardMode(shares_prompt=False, chunks_head=False)).to(
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    scores, metrics = _evaluated(model, held_out, config, tokenizer, step)
    nats = BF16_NATS if rounded else FP32_NATS
    rows = [
        Comparison(name, float("nan") if value is None else value, metrics[name], allowed(name, scores, nats))
        for name, value in logged.items()
        if name in metrics and name != "eval/loss"  # the loss is a combination of the others
    ]
    return Check(tuple(rows)), pairs


def _evaluated(
    model: _Alone, pairs: PairDataset, config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase, step: int
) -> tuple[PairScores, dict[str, float]]:
    # The metrics are the same for every loss that counts the same tokens, and this loss needs no reference model.
    counted = config.loss.model_dump(include={"nll_scope", "nll_reduction", "nll_eos", "answer_padding"})
    objective = LossConfig(name="reward" if config.loss.is_reward else "orpo", **counted)
    counting = LossMask.of(objective, int(tokenizer.eos_token_id))
    alike = config.model_copy(update={"loss": objective})
    with _process_group_of_one():
        found = evaluate(model, pairs, alike, loss.from_config(objective), counting, int(tokenizer.pad_token_id))
    return found.pair_scores(step, pairs, objective), found.metrics


def allowed(metric: str, scores: PairScores, nats: float) -> float:
    """Allowed change of a held-out metric when every mean log-probability changes by `nats` of its size.

    A mean log-probability l changes by nats · max(1, |l|); log odds by that times 1 / (1 - exp l), summed over both
    answers; the accuracy by the share of pairs whose two answers are closer together than the sum of both changes.
    """
    sides = [np.asarray(side_N, dtype=np.float64) for side_N in (scores.chosen_logp_N, scores.rejected_logp_N)]
    moved = [nats * np.maximum(1.0, np.abs(side_N)) for side_N in sides]
    match metric:
        case "eval/preference_accuracy":
            return float(np.mean(np.abs(sides[0] - sides[1]) <= moved[0] + moved[1]))
        case "eval/reward_margin":
            return float(np.mean(moved[0] + moved[1]))
        case "eval/log_odds" | "eval/odds_ratio_loss":
            return float(np.mean(sum(m / -np.expm1(np.minimum(s, -1e-6)) for m, s in zip(moved, sides, strict=True))))
        case "eval/rejected_logp" | "eval/rejected_reward":
            return float(np.mean(moved[1]))
        case "eval/nll":
            return float(nats * max(1.0, abs(scores.value("eval/nll"))))
        case _:
            return float(np.mean(moved[0]))


@contextlib.contextmanager
def _process_group_of_one() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]  # its stub is missing
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
