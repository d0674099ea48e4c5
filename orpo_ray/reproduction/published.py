"""Numbers of the ORPO paper (Hong, Lee and Thorne 2024, arXiv 2403.07691v2) for comparison with ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublishedWinRate:
    """ORPO's win rate by the OPT-1.3B reward model, in %, over three rounds at temperature 1."""

    mean: float
    std: float
    """Over the rounds."""


def _row(*numbers: float) -> dict[str, PublishedWinRate]:
    pairs = zip(("sft", "dpo", "rlhf"), numbers[::2], numbers[1::2], strict=True)
    return {name: PublishedWinRate(mean, std) for name, mean, std in pairs}


WIN_RATES: dict[tuple[str, str], dict[str, PublishedWinRate]] = {
    ("OPT-125M", "HH-RLHF"): _row(84.0, 0.62, 41.7, 0.77, 66.1, 0.26),
    ("OPT-350M", "HH-RLHF"): _row(82.7, 0.56, 49.4, 0.54, 79.4, 0.29),
    ("OPT-1.3B", "HH-RLHF"): _row(78.0, 0.16, 70.9, 0.52, 65.9, 0.33),
    ("OPT-125M", "UltraFeedback"): _row(73.2, 0.12, 48.8, 0.29, 71.4, 0.28),
    ("OPT-350M", "UltraFeedback"): _row(80.5, 0.54, 50.5, 0.17, 85.8, 0.62),
    ("OPT-1.3B", "UltraFeedback"): _row(69.4, 0.57, 57.8, 0.73, 65.7, 1.07),
}
"""(model, data) -> the other model -> win rate (Tables 2 and 3). The paper's RLHF is PPO."""

DIVERSITY: dict[str, dict[str, tuple[float, float]]] = {
    "Phi-2": {"dpo": (0.8012, 0.6019), "orpo": (0.8909, 0.5173)},
    "Llama-2": {"dpo": (0.8889, 0.5658), "orpo": (0.9008, 0.5091)},
}
"""Model -> loss -> mean cosine similarity of Gemini-Pro's embeddings, per input and across inputs (Table 4)."""

FORWARD_PASSES = {"orpo": 2, "dpo": 4}
"""Forward passes per pair and step (section 7.3)."""
