"""What one measured process does: which side, on which pairs, how cut, how precise, how long."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Side = Literal["ours", "trl", "liger", "llamafactory"]
Precision = Literal["bf16", "fp32"]
Device = Literal["cpu", "cuda"]
SIDES: tuple[Side, ...] = get_args(Side)
LR = 8.0e-6
"""Constant learning rate of every side."""
ORPO_LAMBDA = 0.1


@dataclass(frozen=True, slots=True)
class Case:
    """One measured process. Two cases that differ only in `side`, its micro-batch and `checkpointing` do the same work:
    same weights, same global batches in the same order, same precision."""

    side: Side = "ours"
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub name, folder, tiny preset, or `random:VOCABULARY:WIDTH:LAYERS` (Llama with random weights)."""
    data: str = "hh"
    """`hh`, `long` (prompt 30, answers 400), `tokens:PROMPT:CHOSEN:REJECTED` (random ids), `builtin://style-pairs`, or
    a path or hub name that orpo_ray reads."""
    precision: Precision = "bf16"
    checkpointing: bool = False
    """Activations are recomputed in the backward pass."""
    batch: int = 8
    """Pairs per optimizer step."""
    micro_batch: int | None = None
    """Pairs per forward pass of a peer; by default all of the batch."""
    max_tokens_per_micro_batch: int | None = None
    """Ours only: tokens per forward pass; by default what orpo_ray chooses."""
    steps: int = 3
    """Timed optimizer steps, after one for warm-up."""
    seed: int = 0
    """Order of the pairs, random ids and random weights."""
    threads: int = 2
    device: Device = "cpu"

    def __post_init__(self) -> None:
        if min(self.batch, self.steps, self.threads, self.forward_pairs) < 1:
            raise ValueError(
                f"batch ({self.batch}), micro_batch ({self.forward_pairs}), steps ({self.steps}) and threads "
                f"({self.threads}) must be at least 1"
            )
        if self.batch % self.forward_pairs:
            raise ValueError(f"micro_batch ({self.forward_pairs}) must divide batch ({self.batch})")
        if self.side == "ours" and self.micro_batch is not None:
            raise ValueError("micro_batch is a peer's; ours is cut by max_tokens_per_micro_batch")
        if self.side != "ours" and self.max_tokens_per_micro_batch is not None:
            raise ValueError(f"max_tokens_per_micro_batch is ours; {self.side} is cut by micro_batch")

    @property
    def forward_pairs(self) -> int:
        """Pairs per forward pass of a peer."""
        return self.batch if self.micro_batch is None else self.micro_batch

    @property
    def label(self) -> str:
        """Short name of the side as it is run."""
        cut = "" if self.side == "ours" else f" {self.batch // self.forward_pairs}×{self.forward_pairs}"
        return f"{self.side}{cut}{' recompute' if self.checkpointing else ''}"

    def arguments(self) -> list[str]:
        """The command line that `parse` turns back into this case; settings at their default are left out."""
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            option = f"--{field.name.replace('_', '-')}"
            words += [option] if value is True else [option, str(value)]
        return words

    def as_json(self) -> dict[str, Any]:
        """For results files."""
        return json.loads(json.dumps(asdict(self)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a case, with its defaults."""
    default = Case()
    parser.add_argument("--side", choices=SIDES, default=default.side)
    parser.add_argument("--model", default=default.model)
    parser.add_argument("--data", default=default.data)
    parser.add_argument("--precision", choices=get_args(Precision), default=default.precision)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", choices=get_args(Device), default=default.device)
    for name in ("batch", "micro_batch", "max_tokens_per_micro_batch", "steps", "seed", "threads"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))


def from_arguments(arguments: argparse.Namespace) -> Case:
    """The case that parsed options describe."""
    return Case(**{field.name: getattr(arguments, field.name) for field in fields(Case)})
