"""Preference losses as pure functions of log-probabilities, normalised by the counts of the *global* batch.

Shape suffixes: P pairs of one micro-batch. All tensors are fp32, whatever the model's precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from orpo_ray.config import LossConfig
from orpo_ray.models.logps import PairLogps, at_least_fp32

LOGP_CEILING = -1.0e-6
"""log(1 - P) and its gradient are finite in fp32 below this; mean log-probabilities nearer to 0 are clamped to it."""


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """Size of the global batch, over all micro-batches and workers."""

    pairs: int
    nll_tokens: int


@dataclass(frozen=True, slots=True)
class LossTerms:
    """One micro-batch's share of the global batch's loss: the shares of all micro-batches add up to the loss (law 2).

    Every loss reports NLL and odds ratio, even if its objective has neither, so that held-out values can be compared
    between losses.
    """

    loss: torch.Tensor
    """Scalar, with gradient."""
    nll: torch.Tensor
    """Scalar share of the NLL, detached."""
    odds_ratio_loss_P: torch.Tensor
    """L_OR of each pair (paper eq. 7: odds, no temperature), detached."""
    log_odds_P: torch.Tensor
    """log OR of each pair, detached."""
    preference_loss_P: torch.Tensor
    """The loss's own preference term of each pair, unweighted, detached."""


LossFn = Callable[[PairLogps, BatchCounts], LossTerms]
"""The extension point: the loop can train with any function of this type."""


def log_odds_ratio(chosen_logps_P: torch.Tensor, rejected_logps_P: torch.Tensor) -> torch.Tensor:
    """log [odds(y_w|x) / odds(y_l|x)] with odds = P / (1 - P) (paper eq. 4-5).

    log(1 - e^x) is computed as log(-expm1(x)), which keeps fp32 accuracy where e^x rounds to 1. Value and gradient are
    finite for all log-probabilities in [-100, 0].

    Args:
        chosen_logps_P: mean token log-probability of each chosen answer, ≤ 0.
        rejected_logps_P: the same for the rejected answers.
    """
    chosen, rejected = (
        at_least_fp32(logps_P).clamp(max=LOGP_CEILING) for logps_P in (chosen_logps_P, rejected_logps_P)
    )
    return (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))


def orpo(
    logps: PairLogps,
    counts: BatchCounts,
    *,
    orpo_lambda: float,
    nll_reduction: str,
    ratio: str = "odds",
    temperature: float = 1.0,
) -> LossTerms:
    """L = NLL + λ · mean over pairs of -log σ(b · log ratio) (paper eq. 6-7); λ = 0 is supervised fine-tuning exactly.

    Args:
        logps: this micro-batch.
        counts: the global batch it belongs to.
        orpo_lambda: λ.
        nll_reduction: `token` divides the summed NLL by the global batch's tokens; `pair` averages each pair's
            token mean over the global batch's pairs.
        ratio: `odds` is the paper's objective; `probability` uses P(y_w|x) / P(y_l|x) instead (section 7.1).
        temperature: b, 1 in the paper (Gorbatovski et al. 2025, arXiv 2502.01237).
    """
    log_odds_P = log_odds_ratio(logps.chosen_logps_P, logps.rejected_logps_P)
    log_ratio_P = (
        log_odds_P if ratio == "odds" else at_least_fp32(logps.chosen_logps_P) - at_least_fp32(logps.rejected_logps_P)
    )
    preference_loss_P = F.softplus(-temperature * log_ratio_P)
    nll = _nll(logps, counts, nll_reduction)
    # At λ = 0 the odds ratio is left out rather than multiplied by 0: the gradient is then bitwise that of SFT.
    loss = nll if orpo_lambda == 0 else nll + orpo_lambda * preference_loss_P.sum() / counts.pairs
    return _terms(loss, nll, log_odds_P, preference_loss_P)


def dpo(logps: PairLogps, counts: BatchCounts, *, beta: float, nll_reduction: str) -> LossTerms:
    """-log σ(β · [log p(y_w)/p_ref(y_w) - log p(y_l)/p_ref(y_l)]) of whole answers (Rafailov et al. 2023, eq. 7).

    Args:
        logps: this micro-batch, with its reference.
        counts: the global batch it belongs to.
        beta: β, strength of the pull towards the reference.
        nll_reduction: for the reported NLL only; the objective has none.

    Raises:
        ValueError: no reference is given.
    """
    chosen_P, rejected_P = _mean_log_ratios("dpo", logps)
    margin_P = chosen_P * logps.chosen_tokens_P - rejected_P * logps.rejected_tokens_P
    return _preference_only(logps, counts, nll_reduction, F.softplus(-beta * margin_P))


def ipo(logps: PairLogps, counts: BatchCounts, *, beta: float, nll_reduction: str) -> LossTerms:
    """(h - 1 / (2β))², h being the difference of the answers' log-ratios to the reference (Azar et al. 2023, eq. 17).

    As in TRL, h uses means over the answers' tokens: with sums, the target 1 / (2β) would ask less of longer answers.

    Args:
        logps: this micro-batch, with its reference.
        counts: the global batch it belongs to.
        beta: the paper's τ; a larger value keeps the model closer to the reference.
        nll_reduction: for the reported NLL only; the objective has none.

    Raises:
        ValueError: no reference is given.
    """
    chosen_P, rejected_P = _mean_log_ratios("ipo", logps)
    return _preference_only(logps, counts, nll_reduction, (chosen_P - rejected_P - 1 / (2 * beta)).square())


def simpo(logps: PairLogps, counts: BatchCounts, *, beta: float, simpo_gamma: float, nll_reduction: str) -> LossTerms:
    """-log σ(β · [log P(y_w) - log P(y_l)] - γ) of mean token log-probabilities (Meng et al. 2024, eq. 6).

    Args:
        logps: this micro-batch.
        counts: the global batch it belongs to.
        beta: β, scale of the reward.
        simpo_gamma: γ, the target margin between the rewards. TRL has the same name; SimPO's own code takes γ / β
            instead.
        nll_reduction: for the reported NLL only; the objective has none.
    """
    margin_P = at_least_fp32(logps.chosen_logps_P) - at_least_fp32(logps.rejected_logps_P)
    return _preference_only(logps, counts, nll_reduction, F.softplus(simpo_gamma - beta * margin_P))


def cpo(logps: PairLogps, counts: BatchCounts, *, beta: float, nll_weight: float, nll_reduction: str) -> LossTerms:
    """-log σ(β · [log p(y_w) - log p(y_l)]) of whole answers (Xu et al. 2024, eq. 3), plus weight · NLL.

    Args:
        logps: this micro-batch.
        counts: the global batch it belongs to.
        beta: β.
        nll_weight: TRL's `cpo_alpha`. In TRL the NLL is a token mean of the response only.
        nll_reduction: as for `orpo`.
    """
    chosen_P = at_least_fp32(logps.chosen_logps_P) * logps.chosen_tokens_P
    rejected_P = at_least_fp32(logps.rejected_logps_P) * logps.rejected_tokens_P
    preference_loss_P = F.softplus(-beta * (chosen_P - rejected_P))
    nll = _nll(logps, counts, nll_reduction)
    loss = nll_weight * nll + preference_loss_P.sum() / counts.pairs
    return _terms(loss, nll, log_odds_ratio(logps.chosen_logps_P, logps.rejected_logps_P), preference_loss_P)


def bradley_terry(rewards: PairLogps, counts: BatchCounts, *, nll_reduction: str) -> LossTerms:
    """-log σ(r(x, y_w) - r(x, y_l)): the reward model of the paper's section 5.1 (eq. 11).

    The margin is the log odds, under Bradley and Terry's model (1952), of the chosen answer being preferred.

    Args:
        rewards: this micro-batch; a `PairModel` around a reward model returns rewards in place of mean
            log-probabilities.
        counts: the global batch it belongs to.
        nll_reduction: ignored, as there is no NLL.
    """
    margin_P = at_least_fp32(rewards.chosen_logps_P) - at_least_fp32(rewards.rejected_logps_P)
    preference_loss_P = F.softplus(-margin_P)
    loss = preference_loss_P.sum() / counts.pairs
    return _terms(loss, torch.zeros_like(loss), margin_P, preference_loss_P)


def rloo(
    logps: PairLogps,
    counts: BatchCounts,
    *,
    beta: float,
    nll_reduction: str,
    reward_model: str,
    max_new_tokens: int,
) -> LossTerms:
    """REINFORCE with the other answer's return as baseline: RLOO (Ahmadian et al. 2024, arXiv 2402.14740) with k = 2.

    Each pair is two answers that the model itself has just sampled to one prompt. With returns
    R_i = r(x, y_i) - β · [log p(y_i) - log p_ref(y_i)], treated as constants, the gradient of the expected return is
    estimated as ½ · (R_1 - R_2) · ∇[log p(y_1) - log p(y_2)]. The loss is minus a term with that gradient.

    Args:
        logps: this micro-batch, with its reference and rewards.
        counts: the global batch it belongs to.
        beta: cost of one nat of divergence from the reference, in units of reward.
        nll_reduction: ignored: the NLL of the model's own answers has no meaning.
        reward_model, max_new_tokens: ignored here; `rollouts` uses them.

    Raises:
        ValueError: no reference or no rewards are given.
    """
    if logps.reference is None or logps.rewards_P2 is None:
        raise ValueError("loss.name rloo needs the reference and the rewards of sampled answers; see training.rollouts")
    returns_P2 = at_least_fp32(logps.rewards_P2) - beta * logps.log_ratios_P2().detach()
    advantage_P = 0.5 * (returns_P2[:, 0] - returns_P2[:, 1])
    chosen_P = at_least_fp32(logps.chosen_logps_P) * logps.chosen_tokens_P
    rejected_P = at_least_fp32(logps.rejected_logps_P) * logps.rejected_tokens_P
    preference_loss_P = -advantage_P * (chosen_P - rejected_P)
    loss = preference_loss_P.sum() / counts.pairs
    log_odds_P = log_odds_ratio(logps.chosen_logps_P, logps.rejected_logps_P)
    return _terms(loss, torch.zeros_like(loss), log_odds_P, preference_loss_P)


def from_config(config: LossConfig) -> LossFn:
    """The loss that an experiment asks for."""
    settings: dict[str, Any] = config.own_settings | {"nll_reduction": config.nll_reduction}
    match config.name:
        case "orpo" | "sft":
            return partial(orpo, **settings)
        case "dpo":
            return partial(dpo, **settings)
        case "ipo":
            return partial(ipo, **settings)
        case "simpo":
            return partial(simpo, **settings)
        case "cpo":
            return partial(cpo, **settings)
        case "reward":
            return partial(bradley_terry, **settings)
        case "rloo":
            return partial(rloo, **settings)


def held_out_from_config(config: LossConfig) -> LossFn:
    """The loss for held-out pairs: the training loss, except for rloo, whose loss needs sampled answers."""
    if config.name == "rloo":
        return partial(orpo, orpo_lambda=0.0, nll_reduction=config.nll_reduction)
    return from_config(config)


def _nll(logps: PairLogps, counts: BatchCounts, reduction: str) -> torch.Tensor:
    """This micro-batch's share of the NLL; 0 if no token is counted."""
    if reduction == "token":
        return logps.nll_sums_P.sum() / max(counts.nll_tokens, 1)
    return (logps.nll_sums_P / logps.nll_tokens_P.clamp(min=1)).sum() / counts.pairs


def _mean_log_ratios(name: str, logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean token log-ratios to the reference, chosen and rejected."""
    if logps.reference is None:
        raise ValueError(
            f"loss.name {name} compares with a reference model, but these pairs carry no reference log-probabilities; "
            "compute them with orpo_ray.training.reference where LossConfig.needs_reference is true"
        )
    return (
        at_least_fp32(logps.chosen_logps_P) - at_least_fp32(logps.reference.chosen_logps_P),
        at_least_fp32(logps.rejected_logps_P) - at_least_fp32(logps.reference.rejected_logps_P),
    )


def _preference_only(
    logps: PairLogps, counts: BatchCounts, nll_reduction: str, preference_loss_P: torch.Tensor
) -> LossTerms:
    """The terms of an objective without NLL, which is still reported, without gradient."""
    loss = preference_loss_P.sum() / counts.pairs
    log_odds_P = log_odds_ratio(logps.chosen_logps_P, logps.rejected_logps_P)
    return _terms(loss, _nll(logps, counts, nll_reduction), log_odds_P, preference_loss_P)


def _terms(
    loss: torch.Tensor, nll: torch.Tensor, log_odds_P: torch.Tensor, preference_loss_P: torch.Tensor
) -> LossTerms:
    log_odds_P = log_odds_P.detach()
    return LossTerms(loss, nll.detach(), F.softplus(-log_odds_P), log_odds_P, preference_loss_P.detach())
