"""A model's shape, read from its config file without loading weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from orpo_ray.config import ConfigError, LoraConfig, ModelConfig
from orpo_ray.models.presets import PRESET_VOCABULARY, PRESETS

_PLAIN_MLPS = frozenset({"gpt2", "gpt_neox", "gpt_neo", "opt", "bloom", "phi", "falcon"})
"""Model types whose MLP is not gated."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Shape of a decoder-only model, as far as it determines memory. Mixtures of experts count as if dense."""

    parameters: int
    """Tied weights counted once."""
    layers: int
    hidden: int
    attention: int
    """Query heads times head width."""
    key_value: int
    """Key heads times head width."""
    intermediate: int
    """Width of the MLP."""
    gated: bool
    """Whether the MLP multiplies two projections (SwiGLU), or has one."""
    vocabulary: int
    tied: bool
    """Whether the head is the embedding."""
    read_from_files: bool
    """A worker keeps weights read from files for its next trials; presets are initialised anew."""

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers without the head; every token is multiplied by all of them."""
        attention = 2 * self.hidden * self.attention + 2 * self.hidden * self.key_value
        return self.layers * (attention + (3 if self.gated else 2) * self.hidden * self.intermediate)

    def trainable(self, lora: LoraConfig | None) -> int:
        """Parameters with gradients. If `target_modules` names modules, all linear layers are assumed instead."""
        if lora is None:
            return self.parameters
        d, a, k, i = self.hidden, self.attention, self.key_value, self.intermediate
        ends = 2 * (d + a) + 2 * (d + k) + (3 if self.gated else 2) * (d + i)
        return self.layers * lora.rank * ends


@lru_cache(maxsize=64)
def architecture_of(config: ModelConfig) -> Architecture:
    """Read a model's shape from its configuration, without reading weights.

    Raises:
        ConfigError: the configuration cannot be read, or lacks a size.
    """
    if config.path in PRESETS:
        shape = PRESETS[config.path] | {"vocab_size": PRESET_VOCABULARY, "tie_word_embeddings": True}
        return _architecture(shape | {"model_type": "llama"}, config)
    return _architecture(_configuration(config), config)


def _configuration(config: ModelConfig) -> dict[str, Any]:
    """config.json of a folder or a hub model, or the configuration that transformers reads from a GGUF file."""
    try:
        if config.gguf_file is not None:
            from transformers import AutoConfig

            found = AutoConfig.from_pretrained(config.path, revision=config.revision, gguf_file=config.gguf_file)
            return dict(found.to_dict())
        folder = Path(config.path)
        if folder.is_dir():
            file = folder / "config.json"
        else:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(config.path, "config.json", revision=config.revision))
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path {config.path}: no configuration could be read from a folder or a hub of that name, so its "
            f"memory is not known: {error}"
        ) from error


def _architecture(found: dict[str, Any], config: ModelConfig) -> Architecture:
    """Shape from a configuration, by the key names that transformers' model types use."""
    found = found | (found.get("text_config") or {})

    def read(*names: str, default: int | None = None) -> int:
        value = next((found[name] for name in names if found.get(name) is not None), default)
        if value is None:
            raise ConfigError(f"model.path {config.path}: its configuration has no {' or '.join(names)}")
        return int(value)

    hidden, layers = read("hidden_size", "n_embd", "d_model"), read("num_hidden_layers", "n_layer", "num_layers")
    heads = read("num_attention_heads", "n_head", "num_heads")
    head_width = read("head_dim", default=hidden // heads)
    kind = str(found.get("model_type"))
    shape = Architecture(
        parameters=0,
        layers=layers,
        hidden=hidden,
        attention=heads * head_width,
        key_value=read("num_key_value_heads", default=heads) * head_width,
        intermediate=read("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
        gated=kind not in _PLAIN_MLPS,
        vocabulary=read("vocab_size"),
        tied=bool(found.get("tie_word_embeddings", kind in _PLAIN_MLPS)),
        read_from_files=config.path not in PRESETS,
    )
    if kind in ("llama", "mistral") and not (found.get("attention_bias") or found.get("mlp_bias")):
        embeddings = (1 if shape.tied else 2) * shape.vocabulary * hidden
        parameters = embeddings + shape.linear_parameters + (2 * layers + 1) * hidden
    else:
        from orpo_ray.models.loading import (
            count_parameters_of,  # builds it without weights, which takes torch and seconds
        )

        parameters = count_parameters_of(config)
    return replace(shape, parameters=parameters)
