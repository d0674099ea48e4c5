"""Scores of one evaluation on every held-out pair, in a file beside the trial's checkpoints.

Shape suffix: N held-out pairs, in the data's order.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from orpo_ray.errors import DamagedFileError
from orpo_ray.files import replacing

PAIRS_FILE = "pairs.npz"
"""File in a trial's directory with the pairs of its latest evaluation."""

Ratio = tuple[float, np.ndarray, np.ndarray]
"""(weight, numerators_N, denominators_N)."""


@dataclass(frozen=True, slots=True, eq=False)
class PairScores:
    """Scores of one trial on N pairs. Log-probabilities are in nats; `training.loss` defines loss and NLL."""

    step: int
    """Optimizer steps done when it was evaluated."""
    pair_ids_N: np.ndarray
    """Ids as UTF-8 bytes; see the data room's `Pair`."""
    chosen_logp_N: np.ndarray
    """Mean token log-probability of the chosen answer; for a reward model, its reward."""
    rejected_logp_N: np.ndarray
    """The same for the rejected answer."""
    log_odds_N: np.ndarray
    """log OR (paper eq. 4-5); for a reward model, the difference of the rewards."""
    odds_ratio_loss_N: np.ndarray
    """-log σ(log OR) (paper eq. 7)."""
    preference_loss_N: np.ndarray
    """The objective's own preference term, unweighted."""
    nll_sum_N: np.ndarray
    """Sum of -log p over the tokens that the objective's NLL counts."""
    nll_tokens_N: np.ndarray
    """Number of those tokens."""
    answer_nats_N: np.ndarray
    """-log p of the whole chosen answer, in nats."""
    answer_bytes_N: np.ndarray
    """UTF-8 bytes of the chosen answer."""
    nll_reduction: str
    """`token`: sum over sum; `pair`: mean of the pairs' token means."""
    loss_weights: tuple[float, float]
    """Weights of the NLL and of the mean preference term in the objective."""

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        with replacing(path, durable=True) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> PairScores:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            DamagedFileError: it is not one of these files, or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {field.name: file[field.name] for field in fields(cls)}
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DamagedFileError(f"{path}: not a complete file of per-pair scores ({error}); remove it") from None
        nll_weight, preference_weight = found["loss_weights"].tolist()
        return cls(
            **found
            | {
                "step": int(found["step"]),
                "nll_reduction": str(found["nll_reduction"]),
                "loss_weights": (nll_weight, preference_weight),
            }
        )

    def ratios(self, metric: str) -> list[Ratio]:
        """The metric as a weighted sum of ratios of sums over pairs, in fp64, for a bootstrap over pairs.

        Raises:
            KeyError: no such metric (`config.METRIC_MODES`).
        """
        one_N = np.ones(len(self.pair_ids_N))
        nll: Ratio = (1.0, _wide(self.nll_sum_N), _wide(self.nll_tokens_N))
        if self.nll_reduction == "pair":
            nll = (1.0, nll[1] / np.maximum(nll[2], 1), one_N)
        match metric:
            case "eval/preference_accuracy":
                # A tie counts half, as in `training.metrics.PairSums`.
                chosen_N, rejected_N = self.chosen_logp_N, self.rejected_logp_N
                return [(1.0, (chosen_N > rejected_N) + 0.5 * (chosen_N == rejected_N), one_N)]
            case "eval/log_odds":
                return [(1.0, _wide(self.log_odds_N), one_N)]
            case "eval/odds_ratio_loss":
                return [(1.0, _wide(self.odds_ratio_loss_N), one_N)]
            case "eval/nll":
                return [nll]
            case "eval/nll_per_byte":
                return [(1.0, _wide(self.answer_nats_N), _wide(self.answer_bytes_N))]
            case "eval/loss":
                weighted = [(self.loss_weights[0], *nll[1:]), (self.loss_weights[1], self.preference_loss_N, one_N)]
                # Terms of weight 0 are left out, because 0 · inf is NaN.
                return [(weight, _wide(top_N), bottom_N) for weight, top_N, bottom_N in weighted if weight]
        raise KeyError(metric)

    def value(self, metric: str) -> float:
        """The metric over all pairs."""
        return float(sum(w * top_N.sum() / max(bottom_N.sum(), 1) for w, top_N, bottom_N in self.ratios(metric)))

    def of(self, pair_ids: np.ndarray) -> PairScores:
        """The scores of these pairs, in their order; each pair must exist."""
        order = np.argsort(self.pair_ids_N, kind="stable")
        at_N = order[np.searchsorted(self.pair_ids_N, pair_ids, sorter=order)]
        arrays = {f.name: getattr(self, f.name)[at_N] for f in fields(self) if f.name.endswith("_N")}
        return replace(self, **arrays)


def on_shared_pairs(everyone: Sequence[PairScores]) -> list[PairScores]:
    """Each trial's scores on the pairs that all trials have, in the order of the first trial.

    Bundles with different tokenizers or lengths may drop different pairs; a paired comparison needs the same ones.
    Arrays are empty if no pair is shared.
    """
    first = everyone[0]
    if all(np.array_equal(scores.pair_ids_N, first.pair_ids_N) for scores in everyone[1:]):
        return list(everyone)
    shared_N = np.logical_and.reduce([np.isin(first.pair_ids_N, scores.pair_ids_N) for scores in everyone])
    return [scores.of(first.pair_ids_N[shared_N]) for scores in everyone]


def _wide(array_N: np.ndarray) -> np.ndarray:
    return np.asarray(array_N, dtype=np.float64)
