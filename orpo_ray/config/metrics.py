"""Held-out metrics that rank trials: which direction is better, and which settings change their meaning."""

from __future__ import annotations

from typing import Literal

from orpo_ray.config.loss import LossConfig

METRIC_MODES: dict[str, Literal["max", "min"]] = {
    "eval/preference_accuracy": "max",
    "eval/log_odds": "max",
    "eval/nll": "min",
    "eval/nll_per_byte": "min",
    "eval/odds_ratio_loss": "min",
    "eval/loss": "min",
}
"""Held-out metrics that a sweep may rank trials by, and which direction is better."""
NOT_MEASURED: dict[str, frozenset[str]] = {
    "reward": frozenset(METRIC_MODES) - {"eval/preference_accuracy", "eval/loss"},
    "rloo": frozenset({"eval/loss"}),
}
"""Loss -> held-out metrics that its trials do not report: a reward model predicts no tokens, and rloo's loss is
computed on sampled answers."""
_WHAT_AN_ANSWER_IS = frozenset({"loss.answer_padding", "loss.preset"})
MEANING_MOVED_BY: dict[str, frozenset[str]] = {
    "eval/loss": frozenset(f"loss.{setting}" for setting in LossConfig.model_fields),
    "eval/nll": frozenset({"loss.nll_scope", "loss.nll_reduction", "loss.nll_eos", "loss.preset"}),
    "eval/preference_accuracy": _WHAT_AN_ANSWER_IS,
    "eval/log_odds": _WHAT_AN_ANSWER_IS,
    "eval/odds_ratio_loss": _WHAT_AN_ANSWER_IS,
    "eval/nll_per_byte": _WHAT_AN_ANSWER_IS,
}
"""Metric -> settings that change what the metric measures; sweeping such a setting by that metric would rank the
setting, not the model (law 4)."""
