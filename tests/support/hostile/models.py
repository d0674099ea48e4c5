"""Hostile models, tokenizers and chat templates."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orpo_ray.config import ModelConfig
from tests.support.hostile.case import Case, Feed, Make
from tests.support.hostile.pairs import data_file, rows, tokenizer
from tests.support.hostile.pickles import RunsCode


def _template(template: str) -> Make:
    good = "\n".join(map(json.dumps, rows(10))).encode()
    return data_file("pairs.jsonl", good, chat_template=template)


def _model(spoil: Callable[[Path, Path], object], weights: bool = True, **settings: Any) -> Make:
    """A small model's folder with something done to it; `spoil` is given it and the case's folder."""

    def make(folder: Path) -> Feed:
        from transformers import LlamaConfig, LlamaForCausalLM

        from orpo_ray.models.loading import build_model, load_tokenizer

        model = folder / "model"
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=1024, **shape)).save_pretrained(model)
        tokenizer().save_pretrained(model)
        if not weights:
            (model / "model.safetensors").unlink()
        spoil(model, folder)
        config = ModelConfig(path=str(model), **settings)

        def feed() -> object:
            load_tokenizer(config)
            return build_model(config, seed=0)

        return feed

    return make


def _edit(name: str, **values: Any) -> Callable[[Path, Path], object]:
    """Set keys of a JSON file of the model; its folder also gets a module that must not be imported."""

    def spoil(model: Path, folder: Path) -> None:
        (model / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
        content = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps(content | values), encoding="utf-8")

    return spoil


def _weights(content: Callable[[bytes], bytes]) -> Callable[[Path, Path], object]:
    def spoil(model: Path, folder: Path) -> None:
        file = model / "model.safetensors"
        file.write_bytes(content(file.read_bytes()))

    return spoil


def _pickled(model: Path, folder: Path) -> None:
    import torch

    torch.save({"lm_head.weight": RunsCode(folder)}, model / "pytorch_model.bin")


def _bare_pickle(model: Path, folder: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(folder), protocol=2))


def _outside_index(model: Path, folder: Path) -> None:
    (model / "model.safetensors").rename(folder / "private.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../private.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _huge_gguf(model: Path, folder: Path) -> None:
    (model / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40) + bytes(64))


_EVIL = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
_TEMPLATES = [
    (
        "a chat template that goes for `__subclasses__`",
        _template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "uses what the sandbox forbids … unsafe",
    ),
    (
        "a chat template that loops for ever, within a tag of transformers' own",
        _template(
            "{% generation %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
            "{% endgeneration %}"
        ),
        "the chat template takes more than 5 s",
    ),
    (
        "a chat template that asks for 10 GB",
        _template("{{ 'a' * 10000000000 }}"),
        "the chat template takes more than 1 GiB",
    ),
    (
        "a chat template that writes 30 MB",
        _template("{% for a in range(30000) %}{{ 'a' * 1000 }}{% endfor %}"),
        "writes 30000000 characters for short conversations",
    ),
    (
        "a chat template that is none",
        _template("{% for"),
        "no pair is left for train ( … dropped_template_error 8 … the chat template refuses it",
    ),
]
_MODELS = [
    (
        "`pytorch_model.bin` that runs a command",
        _model(_pickled, weights=False),
        "could run code; nothing of it was run",
    ),
    ("a bare pickle in its place", _model(_bare_pickle, weights=False), "could run code; nothing of it was run"),
    ("code that comes with a model (`auto_map`)", _model(_edit("config.json", **_EVIL)), "contains custom code"),
    (
        "code that comes with a tokenizer",
        _model(_edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")),
        "contains custom code",
    ),
    (
        "an attention kernel from a hub, named by config.json",
        _model(_edit("config.json", _attn_implementation="evil/kernel")),
        "names the attention evil/kernel, code on a hub",
    ),
    (
        "weights outside of the model's folder",
        _model(_outside_index),
        "'../private.safetensors', which is not a file of this folder",
    ),
    (
        "`model.gguf_file: ../x.gguf`",
        _model(lambda m, f: None, gguf_file="../x.gguf"),
        "must be a file inside model.path",
    ),
    (
        "GGUF that says it has 2⁴⁰ tensors",
        _model(_huge_gguf, gguf_file="x.gguf"),
        "transformers cannot read its tokenizer",
    ),
    ("safetensors cut short", _model(_weights(lambda content: content[:-100])), "SafetensorError: … not fully covered"),
    (
        "safetensors with a header of 2⁶² bytes",
        _model(_weights(lambda content: struct.pack("<Q", 2**62) + content[8:])),
        "SafetensorError: … header too large",
    ),
    (
        "`config.json` that is a list",
        _model(lambda model, f: (model / "config.json").write_text("[1]")),
        "cannot read its tokenizer",
    ),
    (
        "a vocabulary of 10¹⁵ tokens",
        _model(_edit("config.json", vocab_size=10**15)),
        "transformers cannot read its causal language model",
    ),
    (
        "a tokenizer that makes its Rust code panic",
        _model(_edit("tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAA/w=="})),
        "transformers cannot read its tokenizer: PanicException",
    ),
]

CASES = [
    *(Case("Model, chat template", what, make, "DataError", says) for what, make, says in _TEMPLATES),
    *(Case("Model, chat template", what, make, "ModelError", says) for what, make, says in _MODELS),
]
