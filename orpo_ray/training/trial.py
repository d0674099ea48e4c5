"""Input and output of a trial: context, progress, decisions and result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from orpo_ray.storage.events import Status
from orpo_ray.storage.object_store import Storage


class Decision(StrEnum):
    """The answer of the trial's owner after an evaluation."""

    CONTINUE = "continue"
    PAUSE = "pause"
    """Release the process and continue later from a checkpoint of this step."""
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class RankContext:
    """What the loop needs from its caller. The callables are called on rank 0 only unless said otherwise."""

    trial_dir: Path
    """Folder of the trial's checkpoints; if it holds one, the trial continues from it."""
    remote: Storage | None = None
    """The trial's folder in an object store: `trial_dir` is then on this node's own disk."""
    on_start: Callable[[int, int, dict[str, Any]], None] = lambda step, max_steps, facts: None
    """(steps already done, total steps, facts such as the model's number of parameters), when training begins."""
    on_log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    """(step, training metrics)."""
    on_eval: Callable[[int, dict[str, float], str | None, float], Decision] = lambda step, metrics, path, seconds: (
        Decision.CONTINUE
    )
    """(step, held-out metrics, last checkpoint, seconds of training so far) -> how to continue."""
    on_commit: Callable[[], None] = lambda: None
    """Returns once all earlier reports are on disk. Called in another thread before a checkpoint is committed."""
    on_problem: Callable[[str], None] = lambda message: None
    """Something went wrong that does not end the trial. Also called in another thread."""
    is_preempted: Callable[[], bool] = lambda: False
    """Whether this rank's process is about to be taken away. Called on every rank after every step."""
    control: Any = None
    """Process group for small host-side messages; the default group if None."""


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The same on every rank."""

    status: Status
    steps: int
    metrics: dict[str, float]
    """The last evaluation."""
    checkpoint: str | None
    train_seconds: float
    error: str | None = None


@dataclass(slots=True)
class Progress:
    """State of the loop in a checkpoint. The sampler needs none, as it is a function of the step."""

    metrics: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    logged: int = 0
    """Step of the last report of training metrics."""
    sums: list[float] = field(default_factory=list)
    """Sums since then (`PairSums.totals`), so that the next report equals that of an uninterrupted run."""


class Diverged(ArithmeticError):
    """The gradient of a step is not finite. Raised on every rank alike.

    Attributes:
        step: the optimizer step.
        pair_ids: pairs of the global batch whose log-probabilities were not finite on this rank.
        batch_ids: all pairs of the global batch.
    """

    def __init__(self, step: int, pair_ids: list[str], batch_ids: list[str]) -> None:
        super().__init__(step, pair_ids, batch_ids)
        self.step, self.pair_ids, self.batch_ids = step, pair_ids, batch_ids

    def __str__(self) -> str:
        if self.pair_ids:
            return f"log-probabilities not finite at step {self.step} for {_listed(self.pair_ids)}"
        return f"gradient not finite at step {self.step}, a batch of {_listed(self.batch_ids)}"


def _listed(pair_ids: list[str]) -> str:
    shown = ", ".join(pair_ids[:8]) + (", ..." if len(pair_ids) > 8 else "")
    return f"{len(pair_ids)} pair(s): {shown}"
