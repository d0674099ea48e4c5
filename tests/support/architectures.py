"""Small models of every kind of architecture that the forward pass is tested with."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from orpo_ray.data.dataset import Pair
from orpo_ray.models.pair_model import ForwardMode
from orpo_ray.training.loss import BatchCounts, orpo
from tests.support.forwards import logps

VOCABULARY = 61
# (prompt, chosen, rejected) tokens: one-token prompts and answers, chosen longer and shorter than rejected.
LENGTHS = [(7, 5, 9), (1, 6, 2), (12, 1, 1), (1, 1, 1), (3, 17, 4), (9, 2, 11)]
WINDOW = {"sliding_window": 6}  # shorter than most sequences
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RANGE = {"initializer_range": 0.3}  # large, so that every position and every neighbour matters
GATED = {**SMALL, **RANGE, "intermediate_size": 64, "num_key_value_heads": 2}
OPT = {**SMALL, "ffn_dim": 64, "init_std": 0.3, "dropout": 0.0}
SHARING: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "qwen2": Qwen2Config(**GATED),
    "qwen3": Qwen3Config(**GATED, head_dim=8),
    "mistral": MistralConfig(**GATED, **WINDOW),
    "opt": OPTConfig(**OPT, word_embed_proj_dim=32),
    "opt-350m": OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "phi": PhiConfig(**SMALL, **RANGE, intermediate_size=64),
    "gemma2": Gemma2Config(**GATED, **WINDOW, head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**GATED, **WINDOW, head_dim=8),
    "gpt2": GPT2Config(**SMALL, **RANGE, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "granite": GraniteConfig(**GATED, logits_scaling=2.0),
    "cohere": CohereConfig(**GATED, logit_scale=0.25),
}
PADDING: dict[str, tuple[PreTrainedConfig, str]] = {
    "mamba": (MambaConfig(**SMALL, **RANGE, state_size=4), "layers of kind linear_attention"),
    "falcon": (FalconConfig(**SMALL, **RANGE), "FalconForCausalLM implements its attention itself"),
    "bloom": (BloomConfig(**SMALL, **RANGE), "BloomForCausalLM implements its attention itself"),
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    # A copy, for the attention function is a setting of the config.
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def objective(model: torch.nn.Module, pairs: list[Pair], form: ForwardMode, **options: object) -> torch.Tensor:
    """ORPO's loss of all pairs as one batch; its gradient is left in the model."""
    found = logps(model, pairs, form=form, **options)
    counts = BatchCounts(len(pairs), int(found.nll_tokens_P.sum()))
    loss = orpo(found, counts, orpo_lambda=0.5, nll_reduction="token").loss
    loss.backward()
    return loss.detach()
