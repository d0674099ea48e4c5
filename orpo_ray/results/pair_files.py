"""Per-pair scores of a trial, read only if they are those of its last evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from orpo_ray.storage.pair_scores import PAIRS_FILE, PairScores


def load_pair_scores(folder: Path, name: str, logged: Mapping[str, float], is_reused: bool) -> PairScores | str:
    """Read a trial's per-pair file.

    Args:
        folder: the trial's directory.
        name: what a message calls the trial.
        logged: the trial's last value of each metric to be checked.
        is_reused: whether the trial's result was taken over from an earlier run, which has the file instead.

    Returns:
        The scores, or the reason why there are none.
    """
    try:
        scores = PairScores.load(folder / PAIRS_FILE)
    except FileNotFoundError:
        return f"per-pair file of {name} missing{_REUSED if is_reused else ''}"
    except (OSError, ValueError) as error:
        return f"per-pair file of {name} unreadable ({error})"
    for metric, value in logged.items():
        if not math.isclose(scores.value(metric), value, rel_tol=1e-4, abs_tol=1e-6):
            return (
                f"per-pair file of {name} is of another evaluation: its {metric} is {scores.value(metric):.6g}, the "
                f"trial's last one {value:.6g}"
            )
    return scores


_REUSED = " (its result was taken over from an earlier run)"
