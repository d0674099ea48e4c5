"""Floating-point operations that an ORPO step needs: what no implementation can do without.

Counted for exact gradients: each distinct token once (a prompt for both of its answers), no padding, logits only where
a log-probability is needed, nothing recomputed. A product [m × k] · [k × n] counts 2mkn, each of its two gradients
as much.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import workload
from benchmarks.case import Case
from orpo_ray.models.loading import PRESETS, build_model


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides on the operations of a Llama-like model."""

    linears: tuple[tuple[int, int, int], ...]
    """(in, out, how many) of the linear layers without the head."""
    width: int
    vocabulary: int
    layers: int
    attention_width: int
    """Heads times head width."""

    @property
    def linear_parameters(self) -> int:
        """Weights that every token is multiplied with, the head's left out."""
        return sum(fan_in * fan_out * number for fan_in, fan_out, number in self.linears)


def shape_of(case: Case) -> Shape:
    """The shapes of a case's model; no weights are read."""
    config = workload.model_config(case)
    if config.path in PRESETS:
        model = build_model(config.model_copy(update={"attention": "sdpa"}), 0)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.path))
    head = model.get_output_embeddings()
    linears = Counter(
        (module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    settings = model.config
    head_width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    return Shape(
        linears=tuple((*shape, number) for shape, number in sorted(linears.items())),
        width=settings.hidden_size,
        vocabulary=head.out_features,
        layers=settings.num_hidden_layers,
        attention_width=settings.num_attention_heads * head_width,
    )


def predicted_tokens(prompt: int, chosen: int, rejected: int) -> int:
    """Positions whose log-probability the loss of preset `trl` needs: all but the prompt's first."""
    return prompt - 1 + chosen + rejected


def seen_keys(prompt: int, chosen: int, rejected: int) -> int:
    """(query, key) pairs of causal attention, the prompt's counted once."""
    first = prompt + chosen
    return first * (first + 1) // 2 + rejected * prompt + rejected * (rejected + 1) // 2


def pair_flops(shape: Shape, prompt: int, chosen: int, rejected: int) -> float:
    """Operations of forward and backward pass of one pair: linear layers, head and attention."""
    return sum(parts(shape, prompt, chosen, rejected).values())


def parts(shape: Shape, prompt: int, chosen: int, rejected: int) -> dict[str, float]:
    """The same by part."""
    tokens = prompt + chosen + rejected
    return {
        "linear layers": 6.0 * shape.linear_parameters * tokens,
        "head": 6.0 * shape.width * shape.vocabulary * predicted_tokens(prompt, chosen, rejected),
        # Scores and their use: two products of `attention_width` per seen key, and two gradients of each.
        "attention": 12.0 * shape.layers * shape.attention_width * seen_keys(prompt, chosen, rejected),
    }
