"""Tokenizer and causal language model from a hub name, a folder, a GGUF file or a tiny preset; LoRA."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import warnings
from collections.abc import Iterator, Set
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from orpo_ray.config import LoraConfig, ModelConfig
from orpo_ray.data import style_pairs
from orpo_ray.errors import UserError
from orpo_ray.models.presets import PRESET_VOCABULARY, PRESETS


class ModelError(UserError, ValueError):
    """The model or its tokenizer cannot be used; the message says why and what to do."""


@lru_cache(maxsize=4)
def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; one without a padding token gets EOS for it (padding is masked everywhere).

    Raises:
        ModelError: the tokenizer was not found, or has no EOS token.
    """
    if config.path in PRESETS:
        return _preset_tokenizer()
    with _problems_of(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            config.path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            **_gguf(config),
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.path {config.path}: its tokenizer has no EOS token, so the end of an answer cannot be "
            "learned; set eos_token in the folder's tokenizer_config.json, or use a model whose tokenizer has one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """Build a new fp32 model on the CPU, ready for DeepSpeed.

    The second time that a process asks for the same model, its weights are cached; from then on they are copied from
    memory. A process that trains once never holds them twice.

    Args:
        config: which model.
        seed: initialises the weights that no file gives: all weights of a preset, and LoRA's.

    Raises:
        ModelError: the model was not found, or is not a causal language model.
    """
    torch.manual_seed(seed)
    if config.path in PRESETS:
        model = AutoModelForCausalLM.from_config(_preset_config(config), attn_implementation=_kernel(config))
    else:
        model = _cached_copy(config.model_copy(update={"lora": None, "gradient_checkpointing": False}))
    tokenizer, rows = load_tokenizer(config), model.get_input_embeddings().num_embeddings
    if (highest := max(tokenizer.eos_token_id, tokenizer.pad_token_id)) >= rows:
        raise ModelError(
            f"model.path {config.path}: its tokenizer's EOS or padding has id {highest}, but its embedding has {rows} "
            "rows; use the tokenizer that the model was trained with"
        )
    return _for_training(model, config, "CAUSAL_LM")


def build_reward_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """Build a new fp32 reward model: a language model's layers with a score in place of the head (paper sec. 5.1).

    It is transformers' sequence classification with one label, so transformers can load what `orpo-ray export` writes.

    Args:
        config: the language model to start from, or a trained reward model.
        seed: initialises a new score layer, and LoRA's weights.

    Raises:
        ModelError: the model was not found, or transformers has no sequence classification for its architecture.
    """
    torch.manual_seed(seed)
    if config.path in PRESETS:
        architecture = _preset_config(config)
        architecture.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(architecture, attn_implementation=_kernel(config))
    else:
        model = _pretrained(config, AutoModelForSequenceClassification, {"score.weight"}, num_labels=1)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ModelError(
            f"model.path {config.path}: transformers' {type(model).__name__} has no linear layer `score`, so its "
            "rewards cannot be read; use another architecture: Llama, OPT, Mistral, Qwen, Gemma, Phi, GPT-2 have one"
        )
    return _for_training(model, config, "SEQ_CLS")


def causal_lm(lm: Any) -> Any:
    """The transformers model inside peft's wrapper, or the model itself if it has none."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters, tied weights counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def count_parameters_of(config: ModelConfig) -> int:
    """Number of a model's parameters, from its configuration alone; no weights are read or allocated.

    Raises:
        ModelError: the configuration was not found.
    """
    architecture = _architecture(config)
    with _problems_of(config, "model configuration"), torch.device("meta"):
        return count_parameters(
            AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.trust_remote_code)
        )[0]


_loaded_before: set[ModelConfig] = set()


def _cached_copy(config: ModelConfig) -> PreTrainedModel:
    """A model whose weights the caller may change."""
    if config in _loaded_before:
        return copy.deepcopy(_cached(config))
    _loaded_before.add(config)
    return _pretrained(config)


@lru_cache(maxsize=1)
def _cached(config: ModelConfig) -> PreTrainedModel:
    return _pretrained(config)


def _pretrained(
    config: ModelConfig, kind: Any = AutoModelForCausalLM, may_be_new: Set[str] = frozenset(), **more: Any
) -> PreTrainedModel:
    _refuse_outside_files(config)
    with _problems_of(config, "causal language model"):
        model, found = kind.from_pretrained(
            config.path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=_kernel(config),
            dtype=torch.float32,
            weights_only=True,  # for pickles (pytorch_model.bin), in folders without safetensors
            output_loading_info=True,
            **_gguf(config),
            **more,
        )
    if missing := sorted(set(found["missing_keys"]) - may_be_new):
        # transformers would continue with random numbers in their place.
        raise ModelError(
            f"model.path {config.path}: its files lack {len(missing)} of the model's weights, e.g. {missing[0]}; are "
            "they complete, and of the architecture that config.json names?"
        )
    if config.gguf_file is not None:
        # Dequantised weights are dense, but the remaining marker would make transformers refuse to train or save them.
        model.is_quantized = False
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


def _preset_config(config: ModelConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=PRESET_VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **PRESETS[config.path],
    )


@lru_cache(maxsize=1)
def _preset_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE trained on the built-in pairs: deterministic, encodes any text, needs no file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rows = style_pairs.generate(2000, seed=0)
    tokenizer.train_from_iterator(
        (row[field] for row in rows for field in ("prompt", "chosen", "rejected")),
        trainers.BpeTrainer(
            vocab_size=PRESET_VOCABULARY,
            special_tokens=["<s>", "</s>", "<pad>", "<|user|>", "<|system|>", "<|assistant|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _for_training(model: PreTrainedModel, config: ModelConfig, task: str) -> Any:
    """Enable gradient checkpointing and add LoRA, where the config asks for them."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model if config.lora is None else with_lora(model, config.lora, task)


def with_lora(model: PreTrainedModel, lora: LoraConfig, task: str = "CAUSAL_LM") -> Any:
    """Wrap a model in peft's LoRA adapters.

    Raises:
        ModelError: the model has none of the target modules.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = PeftLoraConfig(
        task_type=task, r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 still uses the name that transformers 5.23 deprecates.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules {lora.target_modules}: {error}") from error


def _kernel(config: ModelConfig) -> str | None:
    """Attention function for padded rows, by transformers' name; None lets transformers choose (see `probe`)."""
    return None if config.attention == "shared_prompt" else config.attention


def _gguf(config: ModelConfig) -> dict[str, str]:
    if config.gguf_file is None:
        return {}
    if ".." in Path(config.gguf_file).parts or Path(config.gguf_file).is_absolute():
        raise ModelError(f"model.gguf_file {config.gguf_file}: must be a file inside model.path {config.path}")
    return {"gguf_file": config.gguf_file}


def _refuse_outside_files(config: ModelConfig) -> None:
    """Refuse a model whose files refer to code or weights outside the model.

    Raises:
        ModelError: config.json names an attention kernel on a hub, which is code and would be run; or a folder's index
            names a weight file outside the folder.
    """
    if config.gguf_file is None and not config.trust_remote_code:
        kernel = str(getattr(_architecture(config, "causal language model"), "_attn_implementation", None))
        if "/" in kernel:
            raise ModelError(
                f"model.path {config.path}: its config.json names the attention {kernel:.100}, code on a hub; remove "
                "it, or set model.trust_remote_code if you trust its author"
            )
    for index in Path(config.path).expanduser().glob("*.index.json"):
        with _problems_of(config, index.name):
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = [name for name in names if ".." in Path(name).parts or Path(name).is_absolute()]
        if outside:
            raise ModelError(
                f"model.path {config.path}: {index.name} names {outside[0]!r:.100}, which is not a file of this folder"
            )


@contextlib.contextmanager
def _problems_of(config: ModelConfig, what: str) -> Iterator[None]:
    """Turn any error that a damaged or hostile file makes transformers raise into a ModelError that names the model."""
    try:
        yield
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(_not_found(config, what, error)) from error
    except BaseException as error:
        # A panic in tokenizers' Rust code is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, pickle.UnpicklingError):
            raise ModelError(
                f"model.path {config.path}: its weights are a pickle that holds more than tensors and could run code; "
                "nothing of it was run. Convert it to safetensors if you trust it"
            ) from error
        kernel = f" with model.attention {config.attention}" if what == "causal language model" else ""
        raise ModelError(
            f"model.path {config.path}: transformers cannot read its {what}{kernel}: {type(error).__name__}: "
            f"{error!s:.500}"
        ) from error


def _not_found(config: ModelConfig, what: str, error: Exception) -> str:
    if config.path.startswith("tiny-"):
        return f"model.path {config.path}: no such preset; the presets are {', '.join(PRESETS)}"
    place = "this folder" if Path(config.path).is_dir() else "a hub (is it reachable? is the name right?) or a folder"
    return f"model.path {config.path}: no {what} could be read from {place}: {error}"


def _architecture(config: ModelConfig, what: str = "model configuration") -> Any:
    if config.path in PRESETS:
        return _preset_config(config)
    with _problems_of(config, what):
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code, **_gguf(config)
        )
