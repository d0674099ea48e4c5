"""Training and held-out metrics: sums over pairs, reduced over ranks once per report; speed and memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import psutil
import torch
import torch.distributed as dist

from orpo_ray.config import LossConfig
from orpo_ray.models.logps import PairLogps
from orpo_ray.training.loss import LossTerms

Kind = Literal["answers", "rewards", "samples"]
"""Which metrics pairs have: log-probabilities of given answers, a reward model's rewards of them, or statistics of a
model's own sampled answers."""

_PER_PAIR: dict[Kind, tuple[str, ...]] = {
    "answers": ("odds_ratio_loss", "log_odds", "chosen_logp", "rejected_logp", "preference_accuracy"),
    "rewards": ("chosen_reward", "rejected_reward", "reward_margin", "preference_accuracy"),
    "samples": ("reward", "kl", "answer_tokens"),
}
"""Metrics that are averaged over pairs."""


def kind_of(loss: LossConfig) -> Kind:
    """The kind of an experiment's training metrics."""
    return "rewards" if loss.is_reward else "samples" if loss.name == "rloo" else "answers"


def held_out_kind_of(loss: LossConfig) -> Kind:
    """The kind of an experiment's held-out metrics; never `samples`."""
    return "rewards" if loss.is_reward else "answers"


@dataclass(slots=True)
class PairSums:
    """Running sums of per-pair metrics and loss shares; they stay on the device until reported.

    `sums` holds, in order: loss shares, NLL shares, the per-pair quantities.
    """

    sums: torch.Tensor
    kind: Kind = "answers"
    pairs: int = 0
    """Counted on the host: sending a number to the device for each micro-batch would make both wait."""

    @classmethod
    def zeros(cls, device: torch.device, kind: Kind = "answers") -> PairSums:
        """Empty sums, in fp64 so that long evaluations do not lose precision."""
        return cls(torch.zeros(len(_PER_PAIR[kind]) + 2, dtype=torch.float64, device=device), kind)

    def add(self, logps: PairLogps, terms: LossTerms) -> None:
        """Count the pairs of a micro-batch."""
        chosen_P, rejected_P = logps.chosen_logps_P.detach(), logps.rejected_logps_P.detach()
        # A tie counts half: a model that gives both answers the same probability prefers neither.
        accuracy_P = (chosen_P > rejected_P).double() + 0.5 * (chosen_P == rejected_P).double()
        per_pair: tuple[torch.Tensor, ...]
        match self.kind:
            case "answers":
                per_pair = (terms.odds_ratio_loss_P, terms.log_odds_P, chosen_P, rejected_P, accuracy_P)
            case "rewards":
                per_pair = (chosen_P, rejected_P, terms.log_odds_P, accuracy_P)
            case "samples":
                assert logps.rewards_P2 is not None
                tokens_P = 0.5 * (logps.chosen_tokens_P + logps.rejected_tokens_P)
                per_pair = (logps.rewards_P2.mean(1), logps.log_ratios_P2().detach().mean(1), tokens_P)
        self.sums += torch.stack(
            [
                terms.loss.detach().double(),
                terms.nll.double(),
                *(quantity_P.double().sum() for quantity_P in per_pair),
            ]
        )
        self.pairs += len(chosen_P)

    @classmethod
    def restored(cls, device: torch.device, totals: list[float], kind: Kind = "answers") -> PairSums:
        """Sums that continue from earlier `totals`. Rank 0 holds them, the other ranks start at zero."""
        counted = cls.zeros(device, kind)
        if totals and dist.get_rank() == 0:
            counted.sums += counted.sums.new_tensor(totals[:-1])
            counted.pairs = int(totals[-1])
        return counted

    def totals(self) -> list[float]:
        """The current sums over all ranks, and the number of pairs. A collective."""
        everything = torch.cat([self.sums, self.sums.new_tensor([self.pairs])])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(everything)
        return [float(number) for number in everything.tolist()]

    def averages(self, prefix: str, steps: int = 1) -> dict[str, float]:
        """Averages over all ranks since the last reset. A collective. Resets the sums.

        Args:
            prefix: `train` or `eval`.
            steps: number of optimizer steps in the sums; each step's shares add up to one loss.
        """
        loss, nll, *per_pair, pairs = self.totals()
        self.sums.zero_()
        self.pairs = 0
        named = dict(zip(_PER_PAIR[self.kind], per_pair, strict=True))
        return {
            f"{prefix}/loss": loss / steps,
            **({f"{prefix}/nll": nll / steps} if self.kind == "answers" else {}),
            **{f"{prefix}/{name}": value / pairs for name, value in named.items()},
        }


@dataclass(slots=True)
class Throughput:
    """Pairs and tokens of the global batch per second of training, without evaluation and saving."""

    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0
    _started: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def stop(self, pairs: int, tokens: int) -> None:
        """Stop the clock and count one optimizer step."""
        self.seconds += time.perf_counter() - self._started
        self.pairs += pairs
        self.tokens += tokens

    def averages(self, device: torch.device) -> dict[str, float]:
        """Rates since the last call, and this rank's memory in GiB. Resets the counts."""
        seconds = max(self.seconds, 1e-9)
        rates = {
            "perf/pairs_per_second": self.pairs / seconds,
            "perf/tokens_per_second": self.tokens / seconds,
            "perf/peak_memory_gib": memory_gib(device),
        }
        self.pairs, self.tokens, self.seconds = 0, 0, 0.0
        return rates


def memory_gib(device: torch.device) -> float:
    """Peak device memory allocated since the trial began, in GiB; on a CPU the process's current resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30
