"""Shapes of the built-in tiny models, in a module that a plan can import without torch."""

from __future__ import annotations

PRESET_VOCABULARY = 1024
PRESETS: dict[str, dict[str, int]] = {
    "tiny-llama-1m": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4},
    "tiny-llama-2m": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6},
    "tiny-llama-4m": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5, "num_attention_heads": 8},
    "tiny-llama-8m": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 6, "num_attention_heads": 5},
}
"""Llama-style models small enough to train from scratch on a laptop; named by their parameters, in millions."""
