"""The memory model: its terms against autograd and real parameter counts, and the laws of ZeRO, LoRA and offload."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import memory_model
from orpo_ray.config import ConfigError, ExperimentConfig, LoraConfig, ModelConfig, parse
from orpo_ray.data.dataset import Pair
from orpo_ray.hardware import Device, device_of, this_machine
from orpo_ray.models import lm_head, loading, presets
from orpo_ray.models import precision as cpu_bf16
from orpo_ray.models.packing import LossMask, collate
from orpo_ray.models.pair_model import ForwardMode, PairModel
from orpo_ray.planning import memory
from orpo_ray.planning.architecture import Architecture, architecture_of
from orpo_ray.planning.memory import Memory, peak_memory
from tests.support import ranks
from tests.support.pair_sources import sources_of_pairs, write_stand_in

LLAMA_8B = Architecture(
    parameters=8_030_261_248,
    layers=32,
    hidden=4096,
    attention=4096,
    key_value=1024,
    intermediate=14336,
    gated=True,
    vocabulary=128256,
    tied=False,
    read_from_files=True,
)


def experiment(**settings: Any) -> ExperimentConfig:
    tree = {
        "name": "test",
        "model": {"path": "tiny-llama-8m"},
        "data": {"path": "builtin://style-pairs"},
        "train": {"max_steps": 10, "precision": "fp32"},
    }
    return parse(tree, [f"{path.replace('__', '.')}={json.dumps(value)}" for path, value in settings.items()])


def predicted(device: Device = Device.CPU, shape: Architecture = LLAMA_8B, **settings: Any) -> Memory:
    return peak_memory(experiment(**settings), shape, device)


# ---- terms --------------------------------------------------------------------------------------------------------


def test_what_other_modules_define_is_what_is_counted_with() -> None:
    assert (memory._CHUNK_BYTES, memory._KEPT_BYTES) == (lm_head.CHUNK_BYTES, lm_head.KEPT_BYTES)
    assert loading.load_tokenizer(ModelConfig(path="tiny-llama-1m")).vocab_size == presets.PRESET_VOCABULARY


@pytest.mark.parametrize("path", presets.PRESETS)
def test_parameters_are_those_of_the_model(path: str) -> None:
    config = ModelConfig(path=path)
    assert architecture_of(config).parameters == loading.count_parameters_of(config)


def write_config(folder: Path, **changes: Any) -> ModelConfig:
    """A folder with a Llama's configuration: three heads of 64 share a key head, as in SmolLM2."""
    shape = {"vocab_size": 500, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3}
    LlamaConfig(**shape | {"num_attention_heads": 3, "num_key_value_heads": 1} | changes).save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_a_folder_come_from_its_configuration(tied: bool, tmp_path: Path) -> None:
    config = write_config(tmp_path, tie_word_embeddings=tied)
    found = architecture_of(config)
    assert found.parameters == loading.count_parameters_of(config)
    assert (found.attention, found.key_value, found.tied, found.read_from_files) == (192, 64, tied, True)


def test_a_kind_that_is_not_known_by_formula_is_counted_by_building_it(tmp_path: Path) -> None:
    config = write_config(tmp_path, attention_bias=True)
    assert architecture_of(config).parameters == loading.count_parameters_of(config)


def test_a_model_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no configuration could be read"):
        architecture_of(ModelConfig(path=str(tmp_path / "empty")))


def test_adapters_are_counted_as_peft_makes_them() -> None:
    config = ModelConfig(path="tiny-llama-2m", lora=LoraConfig(rank=4))
    assert architecture_of(config).trainable(config.lora) == loading.count_parameters(loading.build_model(config, 0))[1]


def saved_bytes_per_token(layers: int, precision: torch.dtype | None, lora: LoraConfig | None) -> float:
    """What autograd keeps for the backward pass, weights left out, of pairs as HH-RLHF has them."""
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=256, hidden_size=192, intermediate_size=512, num_hidden_layers=layers)
    shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim = 3, 1, 64
    lm = LlamaForCausalLM(shape)
    pair_model = PairModel(
        lm if lora is None else loading.with_lora(lm, lora), ForwardMode(True, True), precision
    ).train()
    ids = np.random.default_rng(0).integers(3, 256, 240, dtype=np.int32)
    pair = Pair("p", ids[:148], ids[148:189], ids[189:], 1)
    batch = collate([pair, pair], LossMask("prompt_and_response"), share_prompt=True)
    weights = {p.untyped_storage().data_ptr() for p in pair_model.parameters()}
    shapes = {shape for p in pair_model.parameters() for shape in (p.shape, p.T.shape) if p.dim() == 2}

    def is_cast_weight(tensor: torch.Tensor) -> bool:  # `Memory.bf16_weights` counts those
        return tensor.dtype is torch.bfloat16 and tensor.shape in shapes

    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not is_cast_weight(tensor):
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pair_model(batch)
    return sum(storage.nbytes() for storage in kept.values()) / 480


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=8)], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("device", "bf16"),
    [(Device.CPU, False), (Device.CPU, True), (Device.CPU_BF16, True)],
    ids=["fp32", "bf16", "bf16 units"],
)
def test_activations_are_what_autograd_keeps(
    device: Device, bf16: bool, lora: LoraConfig | None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cpu_bf16, "has_bf16_units", lambda: device is Device.CPU_BF16)
    shape = Architecture(0, 3, 192, 192, 64, 512, True, 256, False, True)
    precision = torch.bfloat16 if bf16 else None
    layer = saved_bytes_per_token(3, precision, lora) - saved_bytes_per_token(2, precision, lora)
    counted = memory.activation_bytes_per_token(shape, lora, device, bf16, max_tokens=256)
    assert counted == pytest.approx(layer, rel=0.05)


# ---- laws ---------------------------------------------------------------------------------------------------------


def test_an_8b_model_takes_16_bytes_a_parameter_and_more() -> None:
    found = predicted()
    assert (found.weights, found.gradients) == (4 * LLAMA_8B.parameters,) * 2
    assert found.optimizer == 8 * LLAMA_8B.parameters
    assert found.peak > 16 * LLAMA_8B.parameters


def test_zero_divides_state_by_the_workers() -> None:
    parameters = LLAMA_8B.parameters
    for stage, weights, gradients, optimizer in ((0, 4, 4, 8), (1, 4, 4, 6), (2, 4, 2, 6), (3, 2, 2, 4)):
        found = predicted(scaling__num_workers=2, deepspeed__zero_stage=stage)
        expected = [parameters * share for share in (weights, gradients, optimizer)]
        assert [found.weights, found.gradients, found.optimizer] == expected, stage
    four, eight = (
        predicted(Device.CUDA, scaling__num_workers=n, deepspeed__zero_stage=3, train__precision="bf16") for n in (4, 8)
    )
    assert eight.weights == four.weights // 2
    assert eight.peak < four.peak


def test_zero_3_gathers_weights_up_to_deepspeeds_limit() -> None:
    assert predicted(deepspeed__zero_stage=2).gathered == 0
    assert predicted(deepspeed__zero_stage=3).gathered == 4_000_000_000
    tiny = architecture_of(ModelConfig(path="tiny-llama-1m"))
    assert predicted(shape=tiny, deepspeed__zero_stage=3).gathered == 4 * tiny.parameters


def test_a_gpu_allocates_deepspeeds_buckets_whole() -> None:
    tiny = architecture_of(ModelConfig(path="tiny-llama-1m"))
    settings = {"scaling__num_workers": 2, "deepspeed__zero_stage": 2}
    assert predicted(Device.CUDA, tiny, **settings).buckets > 4_000_000_000
    assert predicted(Device.CPU, tiny, **settings).buckets < 10_000_000


def test_checkpointing_keeps_one_tensor_a_layer() -> None:
    full, recomputed = predicted(), predicted(model__gradient_checkpointing=True)
    assert recomputed.activations < full.activations / 6
    assert full.peak - recomputed.peak == full.activations - recomputed.activations


def test_activations_grow_with_the_tokens_of_a_pass() -> None:
    small, large = (predicted(train__max_tokens_per_micro_batch=n, data__max_tokens=1024) for n in (2048, 4096))
    assert large.activations == pytest.approx(2 * small.activations, rel=0.01)
    assert predicted(train__precision="bf16").activations < predicted().activations


def test_bf16_copies_of_weights_exist_where_products_run_in_bf16() -> None:
    linear = 2 * (LLAMA_8B.linear_parameters + LLAMA_8B.hidden * LLAMA_8B.vocabulary)
    assert predicted(Device.CUDA, train__precision="bf16").bf16_weights == linear
    assert predicted(Device.CPU_BF16, train__precision="bf16").bf16_weights == linear
    assert predicted(Device.CPU, train__precision="bf16").bf16_weights == 0  # products of fp32 there


def test_offload_moves_optimizer_state_to_the_host() -> None:
    settings = {"scaling__num_workers": 2, "deepspeed__zero_stage": 3, "train__precision": "bf16"}
    here = predicted(Device.CUDA, **settings)
    there = predicted(Device.CUDA, **settings, deepspeed__offload_optimizer="cpu")
    assert (there.optimizer, there.gradients) == (0, 0)
    assert there.peak == here.peak - here.optimizer - here.gradients
    # While the model is built its weights lie on the host, before there is optimizer state.
    assert there.host - here.host == LLAMA_8B.parameters * ((8 + 4 + 4) // 2 - 4)
    both = predicted(Device.CUDA, **settings, deepspeed__offload_optimizer="cpu", deepspeed__offload_param="cpu")
    assert both.weights == 0
    assert both.host - there.host == here.weights


def test_lora_has_state_for_its_adapters_only() -> None:
    found = predicted(model__lora={"rank": 16})
    adapters = LLAMA_8B.trainable(LoraConfig(rank=16))
    assert adapters == 41_943_040  # peft's count for Llama 3 8B, all linear layers
    assert (found.weights, found.gradients, found.optimizer) == (4 * LLAMA_8B.parameters, 4 * adapters, 8 * adapters)
    assert memory.checkpoint_bytes(experiment(model__lora={"rank": 16}), LLAMA_8B) == 12 * adapters


def test_later_trials_find_the_weights_kept() -> None:
    config = experiment()
    first, later = (peak_memory(config, LLAMA_8B, Device.CPU, is_first_trial=first) for first in (True, False))
    assert later.peak - first.peak == later.kept_weights == 4 * LLAMA_8B.parameters
    made_anew = replace(LLAMA_8B, read_from_files=False)
    assert peak_memory(config, made_anew, Device.CPU).kept_weights == 0
    # dpo's reference model is read before the trained one.
    dpo = experiment(loss__name="dpo")
    assert peak_memory(dpo, LLAMA_8B, Device.CPU, is_first_trial=True).kept_weights == 4 * LLAMA_8B.parameters


def test_tokens_of_a_pass() -> None:
    def tokens(longest: int | None = None, **settings: Any) -> int:
        return memory.tokens_per_pass(experiment(data__max_tokens=1024, **settings), longest)

    assert tokens() == 4096
    assert tokens(train__max_tokens_per_micro_batch=1024) == 2047, "a longer pair goes alone"
    assert tokens(300, train__max_tokens_per_micro_batch=1024) == 1024
    assert tokens(300, train__micro_batch_size=2) == 600
    assert tokens(300, train__global_batch_size=6, scaling__num_workers=2) == 900
    assert tokens(model__attention="sdpa", train__max_tokens_per_micro_batch=1024) == 2048


def test_checkpoint_sizes() -> None:
    for stage, per_parameter in ((0, 12), (1, 16), (2, 16), (3, 12)):
        config = experiment(deepspeed__zero_stage=stage)
        assert memory.checkpoint_bytes(config, LLAMA_8B) == per_parameter * LLAMA_8B.parameters
    tied = architecture_of(ModelConfig(path="tiny-llama-1m"))
    config = experiment(model__lora={"rank": 8})
    adapters = tied.trainable(config.model.lora)
    assert memory.checkpoint_bytes(config, tied) == 12 * adapters + 4 * 1024 * 128


# ---- the benchmark ------------------------------------------------------------------------------------------------


def test_benchmark_cases_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "hh-rlhf-harmless-base-test.jsonl.gz").touch()
    monkeypatch.setenv("ORPO_RAY_SHARED", str(tmp_path))
    names = [case.name for case in memory_model.cases()]
    assert len(set(names)) == len(names)
    for case in memory_model.cases():
        config = case.experiment()
        assert memory.tokens_per_pass(config) == config.train.max_tokens_per_micro_batch


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"deepspeed.zero_stage": 2}, {"deepspeed.zero_stage": 3}, {"model.lora": {}}])
def test_checkpoints_have_the_size_that_is_predicted(changes: dict[str, Any], tmp_path: Path) -> None:
    workers = 2 if "deepspeed.zero_stage" in changes else 1
    short = {"train.max_steps": 1, "train.eval_every": None, "data.eval_pairs": 2, "scaling.num_workers": workers}
    config = ranks.experiment(tmp_path / "cache", **short, **changes)
    ranks.train(config, tmp_path / "trial")
    written = sum(file.stat().st_size for file in (tmp_path / "trial").rglob("*") if file.is_file())
    assert memory.checkpoint_bytes(config, architecture_of(config.model)) == pytest.approx(written, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "tiny 1m, fp32, 1024 tokens",
        "tiny 1m, bf16, 4096 tokens",
        "tiny 8m, fp32, 4096 tokens",
        "tiny 8m, fp32, 1024 tokens, ZeRO-3 × 2",
    ],
)
def test_predictions_hold_in_real_processes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "hh-rlhf" not in sources_of_pairs():
        monkeypatch.setenv("ORPO_RAY_SHARED", str(write_stand_in(tmp_path / "shared")))
    (case,) = (case for case in memory_model.cases() if case.name == name)
    measured = max(rank["peak"] for rank in memory_model.measure(case, tmp_path))
    config = case.experiment()
    device = device_of(False, [this_machine()])
    found = peak_memory(config, architecture_of(config.model), device, is_first_trial=True)
    assert found.peak == pytest.approx(measured, rel=0.15)
