"""Preference losses as pure functions of log-probabilities, normalised by the counts of the *global* batch.

Shape suffixes: P pairs of one micro-batch. All tensors are fp32, whatever the model's precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from orpo_ray.config import LossConfig

LOGP_CEILING = -1.0e-6
"""log(1 - P) and its gradient are finite in fp32 below this; a mean log-probability nearer to 0 is held here."""


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What the forward pass knows of P pairs. `logps` are means over an answer's tokens: log P(y|x), paper eq. 1."""

    chosen_logps_P: torch.Tensor
    rejected_logps_P: torch.Tensor
    nll_sums_P: torch.Tensor
    """Sum of -log p over the tokens of [prompt | chosen] that the NLL scope counts."""
    nll_tokens_P: torch.Tensor
    """How many those are."""


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """Size of the whole global batch, over all micro-batches and workers."""

    pairs: int
    nll_tokens: int


@dataclass(frozen=True, slots=True)
class LossTerms:
    """One micro-batch's share of the global batch's loss: shares of all micro-batches add up to the loss (law 2)."""

    loss: torch.Tensor
    """Scalar, carries the gradient."""
    nll: torch.Tensor
    """Scalar share of the NLL, detached."""
    odds_ratio_loss_P: torch.Tensor
    """L_OR of each pair, detached."""
    log_odds_P: torch.Tensor
    """log OR of each pair, detached."""


LossFn = Callable[[PairLogps, BatchCounts], LossTerms]
"""The seam: any function of this type can be trained with."""


def log_odds_ratio(chosen_logps_P: torch.Tensor, rejected_logps_P: torch.Tensor) -> torch.Tensor:
    """log [odds(y_w|x) / odds(y_l|x)] with odds = P / (1 - P) (paper eq. 4-5).

    log(1 - e^x) is taken as log(-expm1(x)), which keeps fp32 accuracy where e^x rounds to 1. Value and gradient are
    finite for all log-probabilities in [-100, 0].

    Args:
        chosen_logps_P: mean token log-probability of each chosen answer, ≤ 0.
        rejected_logps_P: the same for the rejected answers.
    """
    # At least fp32: in bf16 all log-probabilities above -0.002 are P = 1. fp64 stays, for gradient checks.
    dtype = torch.promote_types(chosen_logps_P.dtype, torch.float32)
    chosen = chosen_logps_P.to(dtype).clamp(max=LOGP_CEILING)
    rejected = rejected_logps_P.to(dtype).clamp(max=LOGP_CEILING)
    return (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))


def orpo(logps: PairLogps, counts: BatchCounts, *, orpo_lambda: float, nll_reduction: str) -> LossTerms:
    """L = NLL + λ · mean over pairs of -log σ(log OR) (paper eq. 6-7); λ = 0 is supervised fine-tuning exactly.

    Args:
        logps: this micro-batch.
        counts: the global batch it belongs to.
        orpo_lambda: λ.
        nll_reduction: `token` divides the summed NLL by the global batch's tokens; `pair` averages each pair's
            token mean over the global batch's pairs.
    """
    log_odds_P = log_odds_ratio(logps.chosen_logps_P, logps.rejected_logps_P)
    odds_ratio_loss_P = F.softplus(-log_odds_P)
    if nll_reduction == "token":
        nll = logps.nll_sums_P.sum() / counts.nll_tokens
    else:
        nll = (logps.nll_sums_P / logps.nll_tokens_P).sum() / counts.pairs
    # At λ = 0 the odds ratio is left out rather than multiplied by 0: the gradient is then SFT's to the last bit.
    loss = nll if orpo_lambda == 0 else nll + orpo_lambda * odds_ratio_loss_P.sum() / counts.pairs
    return LossTerms(loss, nll.detach(), odds_ratio_loss_P.detach(), log_odds_P.detach())


def from_config(config: LossConfig) -> LossFn:
    """The loss that an experiment asks for."""
    return partial(orpo, orpo_lambda=config.orpo_lambda, nll_reduction=config.nll_reduction)
