import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from orpo_ray.config import LoraConfig, ModelConfig
from orpo_ray.data.dataset import Pair
from orpo_ray.models import loading as model_module
from orpo_ray.models.loading import (
    ModelError,
    build_model,
    count_parameters,
    count_parameters_of,
    load_tokenizer,
)
from orpo_ray.models.presets import PRESETS
from orpo_ray.models.probe import probe_forward_mode
from orpo_ray.training.loss import BatchCounts, orpo
from tests.support.forwards import FAST, PLAIN, logps

NaiveLogps = Callable[..., dict[str, torch.Tensor]]
PRESET = ModelConfig(path="tiny-llama-1m")
TEXT = "Which λ?\n  Two of them."
COMMON = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT = {"ffn_dim": 64, "max_position_embeddings": 64, "init_std": 0.2}
RANGE = {"initializer_range": 0.2}  # large, so that a wrong position or mask shows
ARCHITECTURES = {
    "llama": LlamaConfig(**COMMON, **RANGE, intermediate_size=64, num_key_value_heads=2),
    "opt": OPTConfig(**COMMON, **OPT, word_embed_proj_dim=32),
    "opt-350m": OPTConfig(**COMMON, **OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "qwen2": Qwen2Config(**COMMON, **RANGE, intermediate_size=64, num_key_value_heads=2),
    "qwen3": Qwen3Config(**COMMON, **RANGE, intermediate_size=64, num_key_value_heads=2, head_dim=8),
    "phi": PhiConfig(**COMMON, **RANGE, intermediate_size=64),
    "mistral": MistralConfig(**COMMON, **RANGE, intermediate_size=64, num_key_value_heads=2, sliding_window=8),
    "gemma2": Gemma2Config(
        **COMMON, **RANGE, intermediate_size=64, num_key_value_heads=2, head_dim=8, sliding_window=8
    ),
}


def make_pairs(lengths: list[tuple[int, int, int]]) -> list[Pair]:
    rng = np.random.default_rng(0)
    ids = [[rng.integers(6, 1024, n).astype(np.int32) for n in sizes] for sizes in lengths]
    return [Pair("test:1", prompt, chosen, rejected, chosen_bytes=1) for prompt, chosen, rejected in ids]


PAIRS = make_pairs([(12, 6, 17), (1, 9, 1), (20, 3, 4)])


def save(config: object, folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> ModelConfig:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(path=str(folder))


def backward(model: torch.nn.Module) -> torch.Tensor:
    """One batch forth and back."""
    batch = logps(model, PAIRS, pad_token_id=2)
    counts = BatchCounts(len(PAIRS), int(batch.nll_tokens_P.sum()))
    loss = orpo(batch, counts, orpo_lambda=0.5, nll_reduction="token").loss
    loss.backward()
    return loss.detach()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_weights(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ---- presets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_of_their_names(name: str) -> None:
    millions = int(name.removeprefix("tiny-llama-").removesuffix("m"))
    config = ModelConfig(path=name)
    model = build_model(config, seed=0)
    total, trainable = count_parameters(model)
    assert total == trainable == count_parameters_of(config)
    assert total == pytest.approx(millions * 1e6, rel=0.12)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(load_tokenizer(config)) == model.config.vocab_size
    assert load_tokenizer(config).eos_token_id == model.config.eos_token_id


def test_tied_weights_are_counted_once() -> None:
    model = build_model(PRESET, seed=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert count_parameters(model)[0] == len(torch.nn.utils.parameters_to_vector(model.parameters()))


def test_seed_decides_the_weights() -> None:
    first = build_model(PRESET, seed=1)
    torch.randn(7)  # whatever was drawn before does not matter
    assert same_weights(first, build_model(PRESET, seed=1))
    assert not same_weights(first, build_model(PRESET, seed=2))


# ---- tokenizer ----------------------------------------------------------------------------------------------------


@given(st.text())
def test_preset_tokenizer_round_trips_any_text(text: str) -> None:
    tokenizer = load_tokenizer(PRESET)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("text", ["", " ", "  two", "naïve λ·∇", "日本語", "👩‍👩‍👧", "a\r\n\tb", "\x00\x7f", "\ufffd"])
def test_preset_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_preset_tokenizer_is_the_same_in_every_process(tokenizer: PreTrainedTokenizerBase) -> None:
    script = (
        "import hashlib; from orpo_ray.config import ModelConfig; "
        "from orpo_ray.models.loading import load_tokenizer; "
        "t = load_tokenizer(ModelConfig(path='tiny-llama-1m')); "
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert other == hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def test_tokenizer_without_padding_pads_with_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>").save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert loaded.pad_token_id == loaded.eos_token_id == 1


# ---- models on disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture_on_disk_equals_the_definition(
    architecture: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    naive_logps: NaiveLogps,
) -> None:
    config = save(ARCHITECTURES[architecture], tmp_path, tokenizer)
    model = build_model(config, seed=0)
    assert load_tokenizer(config)(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert count_parameters(model)[0] == count_parameters_of(config)

    expected = naive_logps(model, PAIRS, "prompt_and_response")
    form = probe_forward_mode(model, config.attention)
    assert form == FAST
    for result in (logps(model, PAIRS, form=form), logps(model, PAIRS, form=PLAIN)):
        torch.testing.assert_close(result.chosen_logps_P.double(), expected["chosen"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.rejected_logps_P.double(), expected["rejected"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.nll_sums_P.double(), expected["nll_sums"], rtol=1e-4, atol=1e-4)

    assert backward(model).isfinite()
    # A weight without a gradient would have no part in the model's output.
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_folder_gives_its_own_weights_afresh_for_every_trial(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = save(ARCHITECTURES["llama"], tmp_path, tokenizer, seed=3)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    first = build_model(config, seed=0)
    assert same_weights(first, saved)
    with torch.no_grad():
        first.model.embed_tokens.weight.zero_()  # what a trial does to its model
    assert same_weights(build_model(config, seed=1), saved)


# ---- GGUF ---------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """A Llama in llama.cpp's names and layout, with a byte-level BPE tokenizer."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    tokens = [backend.id_to_token(i) for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i < 6 else gguf.TokenType.NORMAL for i in range(len(tokens))])
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    for name, parameter in model.state_dict().items():
        weight = parameter.numpy()
        short = name.removeprefix("model.").removesuffix(".weight")
        if short.startswith("layers."):
            _, layer, part = short.split(".", 2)
            if (count := heads.get(part.rpartition(".")[2])) is not None:  # llama.cpp interleaves rotary halves
                weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            short = f"blk.{layer}.{names[part]}"
        else:
            short = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[short]
        writer.add_tensor(f"{short}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_single_run_does_not_hold_its_weights_twice(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = save(ARCHITECTURES["llama"], tmp_path, tokenizer)
    kept = model_module._cached
    before = kept.cache_info()
    first = build_model(config, seed=0)
    assert kept.cache_info() == before
    second, third = build_model(config, seed=0), build_model(config, seed=0)
    assert kept.cache_info().hits == before.hits + 1  # the third trial reads nothing
    assert same_weights(first, second)
    assert same_weights(first, third)
    with torch.no_grad():
        next(third.parameters()).zero_()
    assert same_weights(first, build_model(config, seed=0))


def test_gguf_gives_dense_weights_that_train_and_save(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"]).eval()
    write_gguf(tmp_path / "tiny.gguf", tokenizer, model)
    config = ModelConfig(path=str(tmp_path), gguf_file="tiny.gguf")
    loaded = build_model(config, seed=0)
    torch.testing.assert_close(logps(loaded, PAIRS).chosen_logps_P, logps(model, PAIRS).chosen_logps_P)
    assert count_parameters(loaded) == count_parameters(model)
    assert not loaded.is_quantized
    assert backward(loaded).isfinite()
    loaded.save_pretrained(tmp_path / "saved")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), loaded)

    read = load_tokenizer(config)
    assert read.eos_token_id == 1
    assert read(TEXT, add_special_tokens=False)["input_ids"] == tokenizer(TEXT, add_special_tokens=False)["input_ids"]


# ---- LoRA and gradient checkpointing ------------------------------------------------------------------------------


def test_lora_trains_its_adapters_only() -> None:
    base = build_model(PRESET, seed=0)
    model = build_model(PRESET.model_copy(update={"lora": LoraConfig(rank=4)}), seed=0)
    linear = [m for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    adapters = sum(4 * (m.in_features + m.out_features) for m in linear)
    assert len(linear) == 4 * 7  # q, k, v, o, gate, up, down
    assert count_parameters(model) == (count_parameters(base)[0] + adapters, adapters)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    # B starts at zero, so the adapted model starts as the base model.
    assert torch.equal(logps(model.eval(), PAIRS).chosen_logps_P, logps(base.eval(), PAIRS).chosen_logps_P)


def test_lora_seed_decides_the_adapters_over_the_same_base(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = save(ARCHITECTURES["llama"], tmp_path, tokenizer).model_copy(update={"lora": LoraConfig(rank=2)})
    one, again, other = (dict(build_model(config, seed=s).named_parameters()) for s in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    moved = {name for name in one if not torch.equal(one[name], other[name])}
    assert moved == {name for name in one if "lora_A" in name}


def test_lora_takes_named_modules() -> None:
    lora = LoraConfig(rank=1, target_modules=("q_proj", "v_proj"))
    model = build_model(PRESET.model_copy(update={"lora": lora}), seed=0)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(lora: LoraConfig | None) -> None:
    plain, checkpointed = (
        build_model(PRESET.model_copy(update={"lora": lora, "gradient_checkpointing": on}), seed=0).train()
        for on in (False, True)
    )
    if lora is not None:
        with torch.no_grad():  # away from B = 0, where A has no gradient
            for model in (plain, checkpointed):
                torch.manual_seed(0)
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.normal_(std=0.1)
    assert torch.equal(backward(plain), backward(checkpointed))
    expected, result = gradients(plain), gradients(checkpointed)
    assert expected.keys() == {name for name, p in plain.named_parameters() if p.requires_grad}
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(result[name], gradient)


@pytest.mark.parametrize(("on", "expected"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_runs_a_layer_again_in_the_backward_pass(on: bool, expected: int) -> None:
    model = build_model(PRESET.model_copy(update={"gradient_checkpointing": on}), seed=0).train()
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    model.model.layers[0].input_layernorm.register_forward_hook(count)
    backward(model)
    assert runs == expected


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [load_tokenizer, lambda config: build_model(config, seed=0), count_parameters_of])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("tiny-llama-3m", ["model.path tiny-llama-3m", "no such preset", *PRESETS]),
        ("nobody/no-model", ["model.path nobody/no-model", "hub", "reachable", "folder"]),
        ("/no/such/folder", ["model.path /no/such/folder", "folder"]),
    ],
)
def test_a_model_that_is_not_there_is_refused(
    function: Callable[[ModelConfig], object], path: str, words: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        function(ModelConfig(path=path))
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_folder_without_a_model_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot read its causal language model.*Unrecognized model"):
        build_model(ModelConfig(path=str(tmp_path)), seed=0)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    T5Config(vocab_size=8, d_model=8, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"(?s)cannot read its causal language model.*T5Config"):
        build_model(ModelConfig(path=str(tmp_path)), seed=0)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no EOS token.*eos_token in the folder's tokenizer_config\.json"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_lora_on_modules_that_are_not_there_is_refused() -> None:
    lora = LoraConfig(target_modules=("nose",))
    with pytest.raises(ModelError, match=r"model\.lora\.target_modules .*nose"):
        build_model(PRESET.model_copy(update={"lora": lora}), seed=0)
