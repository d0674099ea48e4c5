"""`scaling: auto`: choose settings with which a trial fits in memory on as few devices as possible."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

from orpo_ray.config import ConfigError, ExperimentConfig
from orpo_ray.formatting import gib
from orpo_ray.hardware import Device, NodeMemory, device_of
from orpo_ray.planning.architecture import architecture_of
from orpo_ray.planning.memory import Memory, peak_memory

SAFETY = 0.85
"""Share of a memory that a prediction may fill: predictions are within 15 % of measurements."""
_MOST_CPUS_PER_GPU = 4
"""A worker with a GPU needs CPUs only to prepare batches."""
_PASSES = {Device.CUDA: (16384, 8192, 4096, 2048, 1024, 512), Device.CPU: (4096, 2048, 1024, 512)}
"""Tokens per pass to choose from."""


def fit_to(config: ExperimentConfig, nodes: list[NodeMemory], longest_pair: int | None = None) -> ExperimentConfig:
    """Choose the settings that `scaling: auto` leaves open so that the trial fits; return other configs unchanged.

    Chooses `scaling.num_workers`, `cpus_per_worker` and `use_gpu`, `deepspeed.zero_stage` and `offload_*`,
    `train.max_tokens_per_micro_batch` and `model.gradient_checkpointing`, except those that the file sets. Prefers, in
    this order: fewest devices per trial (a sweep gains more from more trials at once), no offload, no recomputation,
    larger passes, the lowest ZeRO stage. None of these changes a gradient. A CPU worker reserves CPUs in proportion to
    its memory, so that Ray never places more workers on a node than its memory holds.

    Args:
        config: one trial's config (`ExperimentConfig.trial`).
        nodes: the cluster. The result depends only on the arguments.
        longest_pair: see `tokens_per_pass`.

    Returns:
        The config with `scaling.auto` off.

    Raises:
        ConfigError: nothing fits (the message has the smallest need and the cluster's resources), or the model's
            configuration cannot be read.
    """
    if not config.scaling.auto:
        return config
    return config.trial(fitted_settings(config, nodes, longest_pair))


def fitted_settings(
    config: ExperimentConfig, nodes: list[NodeMemory], longest_pair: int | None = None
) -> dict[str, Any]:
    """Settings that `fit_to` chooses, as config path -> value. Arguments and errors are those of `fit_to`."""
    architecture = architecture_of(config.model)
    use_gpu = config.scaling.use_gpu
    on_gpu = any(node.gpus for node in nodes) if use_gpu == "auto" else use_gpu
    device = device_of(on_gpu, nodes)
    free = {name: _choices(config, name, values) for name, values in _candidates(config, nodes, device).items()}
    best: tuple[tuple[int, ...], dict[str, Any]] | None = None
    smallest: tuple[int, Memory, dict[str, Any]] | None = None
    for chosen in product(*free.values()):
        settings = dict(zip(free, chosen, strict=True)) | {"scaling.use_gpu": on_gpu, "scaling.auto": False}
        if not _consistent(settings):
            continue
        workers = settings["scaling.num_workers"]
        cost = _cost(settings, workers)
        if best is not None and cost >= best[0]:
            continue  # reserving CPUs only adds to the cost
        memory = peak_memory(_with(config, settings), architecture, device, longest_pair=longest_pair)
        if smallest is None or memory.peak < smallest[0]:
            smallest = memory.peak, memory, settings
        cpus = _cpus_needed(config, memory, nodes, workers, on_gpu)
        if cpus is None:
            continue
        cost = _cost(settings, workers if on_gpu else workers * cpus)
        if best is None or cost < best[0]:
            best = cost, settings | {"scaling.cpus_per_worker": cpus}
    if best is None:
        raise ConfigError(_nothing_fits(config, nodes, on_gpu, smallest))
    return best[1]


def workers_on(node: NodeMemory, memory: Memory, cpus: int, on_gpu: bool) -> int:
    """Number of workers that a node has CPUs, GPUs and memory for.

    Args:
        node: the node.
        memory: predicted memory of one worker.
        cpus: CPUs of one worker.
        on_gpu: whether each worker has a GPU.
    """
    by_cpu = node.cpus // cpus
    if not on_gpu:
        return min(by_cpu, int(SAFETY * node.memory_bytes / memory.peak))
    if memory.peak > SAFETY * node.gpu_memory_bytes:
        return 0
    return min(by_cpu, node.gpus, int(SAFETY * node.memory_bytes / memory.host))


def _candidates(config: ExperimentConfig, nodes: list[NodeMemory], device: Device) -> dict[str, tuple[Any, ...]]:
    on_gpu = device is Device.CUDA
    places = sum(node.gpus if on_gpu else node.cpus for node in nodes)
    most = min(places, config.train.global_batch_size)
    offloads = ("none", "cpu") if on_gpu else ("none",)  # a CPU has nowhere to offload to
    return {
        "scaling.num_workers": tuple(n for n in range(1, most + 1) if n <= 16 or n % 8 == 0),
        "deepspeed.zero_stage": (0, 1, 2, 3),
        "deepspeed.offload_optimizer": offloads,
        "deepspeed.offload_param": offloads,
        "model.gradient_checkpointing": (False, True),
        "train.max_tokens_per_micro_batch": _PASSES[Device.CUDA if on_gpu else Device.CPU],
    }


def _choices(config: ExperimentConfig, path: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The value that the file sets, or else all candidates."""
    section, _, name = path.partition(".")
    given = getattr(config, section)
    return (getattr(given, name),) if name in given.model_fields_set else values


def _consistent(settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed supports the combination (`DeepSpeedConfig` refuses the others)."""
    stage, optimizer = settings["deepspeed.zero_stage"], settings["deepspeed.offload_optimizer"]
    if settings["deepspeed.offload_param"] != "none" and stage != 3:
        return False
    return stage >= {"none": 0, "cpu": 1, "nvme": 3}[optimizer]


def _cost(settings: dict[str, Any], devices: int) -> tuple[int, ...]:
    offloads = (settings["deepspeed.offload_optimizer"] != "none") + (settings["deepspeed.offload_param"] != "none")
    return (
        devices,
        offloads,
        int(settings["model.gradient_checkpointing"]),
        -settings["train.max_tokens_per_micro_batch"],
        settings["deepspeed.zero_stage"],
        settings["scaling.num_workers"],
    )


def _with(config: ExperimentConfig, settings: dict[str, Any]) -> ExperimentConfig:
    """Set valid settings without validation, which would be too slow for thousands of candidates."""
    changed: dict[str, dict[str, Any]] = {}
    for path, value in settings.items():
        section, _, name = path.partition(".")
        changed.setdefault(section, {})[name] = value
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=values) for section, values in changed.items()}
    )


def _cpus_needed(
    config: ExperimentConfig, memory: Memory, nodes: list[NodeMemory], workers: int, on_gpu: bool
) -> int | None:
    """CPUs that each worker must reserve; None where the trial does not fit.

    Ray places workers by CPUs and GPUs and ignores memory, so every node must have the memory for as many workers as
    its CPUs and GPUs admit.
    """
    given = config.scaling.cpus_per_worker if "cpus_per_worker" in config.scaling.model_fields_set else None
    usable = [node for node in nodes if node.gpus or not on_gpu]
    if not usable:
        return None
    if given is not None:
        enough = sum(workers_on(node, memory, given, on_gpu) for node in usable) >= workers
        return given if enough else None
    if on_gpu:
        cpus = max(1, min(_MOST_CPUS_PER_GPU, *(node.cpus // node.gpus for node in usable)))
        held = [workers_on(node, memory, cpus, on_gpu) for node in usable]
        return (
            cpus if sum(held) >= workers and all(n == node.gpus for n, node in zip(held, usable, strict=True)) else None
        )
    for cpus in range(1, max(node.cpus for node in usable) + 1):
        places = [node.cpus // cpus for node in usable]
        if sum(places) < workers:
            return None
        if all(n * memory.peak <= SAFETY * node.memory_bytes for n, node in zip(places, usable, strict=True)):
            return cpus
    return None


def _nothing_fits(
    config: ExperimentConfig,
    nodes: list[NodeMemory],
    on_gpu: bool,
    smallest: tuple[int, Memory, dict[str, Any]] | None,
) -> str:
    has = "; ".join(
        (f"{count} × " if count > 1 else "")
        + f"{n.cpus} CPU, {gib(n.memory_bytes)}"
        + (f", {n.gpus} GPU of {gib(n.gpu_memory_bytes)}" if n.gpus else "")
        for n, count in Counter(nodes).items()
    )
    what = f"scaling: auto: {config.model.path} fits in no way"
    if smallest is None:
        return f"{what}: the cluster has no {'GPU' if on_gpu else 'CPU'}, or the given settings conflict ({has})"
    _, memory, settings = smallest
    needs = gib(memory.peak) + (f" of GPU and {gib(memory.host)} of host memory" if on_gpu else "")
    return (
        f"{what}. The least is {needs} per worker, with {', '.join(f'{k} {v}' for k, v in settings.items())}; at most "
        f"{SAFETY:.0%} of each memory may be filled, and there is: {has}. Use a smaller model, model.lora or a shorter "
        "data.max_tokens, drop settings that were given, or add nodes"
    )
