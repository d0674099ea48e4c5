"""`scaling: auto`: what is chosen fits, is the least, keeps what the file says, and depends on its inputs alone."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_ray.config import ConfigError, ExperimentConfig, parse
from orpo_ray.formatting import GIB
from orpo_ray.hardware import Device, NodeMemory, device_of
from orpo_ray.planning.architecture import architecture_of
from orpo_ray.planning.fit import SAFETY, fit_to, fitted_settings
from orpo_ray.planning.memory import peak_memory

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama-8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(folder)


def experiment(path: str = "tiny-llama-8m", scaling: Any = "auto", **settings: Any) -> ExperimentConfig:
    tree = {
        "name": "test",
        "model": {"path": path},
        "data": {"path": "builtin://style-pairs"},
        "train": {"max_steps": 10},
        "scaling": scaling,
    }
    return parse(tree, [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()])


def gpus(count: int, gib: float, host_gib: float = 1024) -> NodeMemory:
    return NodeMemory(cpus=16 * count, gpus=count, memory_bytes=int(host_gib * GIB), gpu_memory_bytes=int(gib * GIB))


def test_the_word_auto_is_short_for_a_section() -> None:
    assert experiment().scaling == experiment(scaling={"auto": True}).scaling
    assert experiment().scaling.auto
    assert experiment(scaling__cpus_per_worker=3).scaling.cpus_per_worker == 3
    with pytest.raises(ConfigError, match="scaling"):
        experiment(scaling="automatic")


def test_a_bundle_may_ask_for_it() -> None:
    tree = experiment(scaling={}).model_dump(exclude_unset=True)
    values = {"fixed": {"scaling.num_workers": 2}, "fitted": {"scaling": "auto"}, "half": {"scaling.auto": True}}
    tree["sweep"] = {"space": {"size": {"type": "bundle", "values": values}}}
    config = parse(tree)
    chosen = {label: config.trial({"size": label}).scaling for label in values}
    assert [scaling.auto for scaling in chosen.values()] == [False, True, True]


def test_without_auto_nothing_changes() -> None:
    config = experiment(scaling={"num_workers": 2})
    assert fit_to(config, []) is config


def test_a_small_model_gets_one_worker_and_large_passes() -> None:
    fitted = fit_to(experiment(), [NodeMemory(8, 0, 64 * GIB)])
    assert (fitted.scaling.num_workers, fitted.scaling.cpus_per_worker, fitted.scaling.use_gpu) == (1, 1, False)
    assert (fitted.deepspeed.zero_stage, fitted.model.gradient_checkpointing) == (0, False)
    assert fitted.train.max_tokens_per_micro_batch == 4096
    assert not fitted.scaling.auto
    assert fit_to(fitted, []) is fitted


def test_less_memory_costs_first_pass_size_then_recomputation_then_offload_then_devices(llama_8b: str) -> None:
    def on(node: NodeMemory) -> tuple[Any, ...]:
        chosen = fitted_settings(experiment(llama_8b), [node])
        return (
            chosen["scaling.num_workers"],
            chosen["deepspeed.offload_optimizer"],
            chosen["model.gradient_checkpointing"],
            chosen["train.max_tokens_per_micro_batch"],
        )

    assert on(gpus(1, 400)) == (1, "none", False, 16384)
    assert on(gpus(1, 270)) == (1, "none", False, 8192)
    assert on(gpus(1, 180)) == (1, "none", True, 8192)
    assert on(gpus(1, 160)) == (1, "cpu", False, 8192)
    assert on(gpus(8, 80)) == (2, "cpu", False, 2048)
    assert on(gpus(8, 80, host_gib=700)) == (3, "none", True, 2048), "no host memory for eight workers' offload"


def test_what_the_file_says_is_kept(llama_8b: str) -> None:
    given_settings = {
        "scaling__num_workers": 4,
        "deepspeed__zero_stage": 3,
        "deepspeed__offload_optimizer": "none",
        "model__gradient_checkpointing": True,
        "train__max_tokens_per_micro_batch": 2048,
        "scaling__cpus_per_worker": 2,
    }
    fitted = fit_to(experiment(llama_8b, **given_settings), [gpus(8, 80)])
    assert (fitted.scaling.num_workers, fitted.scaling.cpus_per_worker, fitted.deepspeed.zero_stage) == (4, 2, 3)
    assert (fitted.deepspeed.offload_optimizer, fitted.train.max_tokens_per_micro_batch) == ("none", 2048)


def test_nothing_but_how_it_is_run_changes(llama_8b: str) -> None:
    config = experiment(llama_8b, loss__orpo_lambda=0.3, optim__lr=1e-5)
    fitted = fit_to(config, [gpus(8, 80)])
    assert fitted.loss == config.loss
    assert fitted.optim == config.optim
    assert fitted.train.global_batch_size == config.train.global_batch_size


def test_what_fits_nowhere_is_told_with_the_least_need(llama_8b: str) -> None:
    with pytest.raises(ConfigError, match=r"The least is \d+\.\d GiB per worker.*there is: 4 CPU, 8\.0 GiB"):
        fit_to(experiment(llama_8b), [NodeMemory(4, 0, 8 * GIB)])
    with pytest.raises(ConfigError, match="the cluster has no GPU"):
        fit_to(experiment(scaling__use_gpu=True), [NodeMemory(4, 0, 8 * GIB)])


def test_workers_may_lie_on_several_nodes(llama_8b: str) -> None:
    node = gpus(1, 80, host_gib=90)
    fitted = fit_to(experiment(llama_8b), [node] * 8)
    assert 1 < fitted.scaling.num_workers <= 8
    assert fitted.deepspeed.zero_stage == 3


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 64), st.floats(1.5, 64), st.integers(1, 3))
def test_a_full_node_is_never_promised_more_memory_than_it_has(cpus: int, gib: float, nodes: int) -> None:
    cluster = [NodeMemory(cpus, 0, int(gib * GIB))] * nodes
    config = experiment()
    fitted = fit_to(config, cluster)
    assert fitted == fit_to(config, cluster)
    memory = peak_memory(fitted, architecture_of(fitted.model), Device.CPU)
    assert cpus // fitted.scaling.cpus_per_worker * memory.peak <= SAFETY * cluster[0].memory_bytes


def test_device() -> None:
    plain, amx = NodeMemory(2, 0, GIB), NodeMemory(2, 0, GIB, bf16_units=True)
    assert device_of(False, [plain, amx]) is Device.CPU
    assert device_of(False, [amx, amx]) is Device.CPU_BF16
    assert device_of(True, [plain]) is Device.CUDA


def test_choosing_is_fast_on_a_large_cluster(llama_8b: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match="64 × 128 CPU"):  # so every candidate is looked at
        fit_to(experiment(llama_8b, train__global_batch_size=512), [gpus(8, 16, host_gib=100)] * 64)
    assert time.process_time() - began < 3.0
