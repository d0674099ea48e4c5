"""Log-probabilities of a batch of pairs, the input of every loss.

Shape suffix: P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ReferenceLogps:
    """The reference model's log-probabilities of the same answers: means over the same tokens as in `PairLogps`."""

    chosen_logps_P: torch.Tensor
    rejected_logps_P: torch.Tensor


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Result of the forward pass of P pairs. `logps` are means over an answer's tokens: log P(y|x), paper eq. 1."""

    chosen_logps_P: torch.Tensor
    rejected_logps_P: torch.Tensor
    nll_sums_P: torch.Tensor
    """Sum of -log p over the tokens of [prompt | chosen] that the NLL counts."""
    nll_tokens_P: torch.Tensor
    """Number of those tokens; may be 0 where `loss.nll_eos` is off."""
    chosen_tokens_P: torch.Tensor
    """Number of tokens that `chosen_logps_P` averages: mean × tokens is log p of the whole answer."""
    rejected_tokens_P: torch.Tensor
    """The same for the rejected answers."""
    reference: ReferenceLogps | None = None
    """For the losses that compare with a reference model."""
    rewards_P2: torch.Tensor | None = None
    """rloo: the reward model's rewards of each pair's first and second sampled answer."""

    def log_ratios_P2(self) -> torch.Tensor:
        """log p(y) - log p_ref(y) of whole answers, for the losses that compare with a reference model."""
        assert self.reference is not None
        return torch.stack(
            [
                (at_least_fp32(self.chosen_logps_P) - at_least_fp32(self.reference.chosen_logps_P))
                * self.chosen_tokens_P,
                (at_least_fp32(self.rejected_logps_P) - at_least_fp32(self.reference.rejected_logps_P))
                * self.rejected_tokens_P,
            ],
            dim=1,
        )


def at_least_fp32(logps_P: torch.Tensor) -> torch.Tensor:
    """Convert to fp32: in bf16 all log-probabilities above -0.002 mean P = 1. fp64 stays fp64, for gradient checks."""
    return logps_P.to(torch.promote_types(logps_P.dtype, torch.float32))
