"""Typed config to a DeepSpeed ZeRO engine, and one optimizer step on it."""

from __future__ import annotations

import gc
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from filelock import FileLock
from torch.utils.cpp_extension import get_default_build_root

from orpo_ray.config import DeepSpeedConfig, ExperimentConfig, OptimConfig
from orpo_ray.models.pair_model import PairModel

_COMMUNICATION_OP = "ShareMemCommBuilder"
"""DeepSpeed compiles it on every CPU start; other accelerators have none."""
_LONGEST_BUILD_S = 180
"""A build's guard file older than this was left by a process that was killed."""


def init_process_group() -> None:
    """Join the process group that the launcher's environment describes, unless that has happened already."""
    _prebuild(_COMMUNICATION_OP)
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)


@cache
def _prebuild(op_builder: str) -> None:
    """Compile one of DeepSpeed's ops, once for all processes of this machine.

    PyTorch guards a build by a plain file, which stays when the builder is killed; every later process then waits for
    ever (pytorch/pytorch#189245). Here processes take turns under a lock that dies with its owner, and an old guard
    file is removed.
    """
    builder = get_accelerator().create_op_builder(op_builder)
    if builder is None or not builder.is_compatible(verbose=False):
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "orpo_ray.lock"):
        for guard in root.rglob("lock"):
            while guard.exists() and time.time() - guard.stat().st_mtime < _LONGEST_BUILD_S:
                time.sleep(1)
            guard.unlink(missing_ok=True)
        builder.load(verbose=False)


def build_engine(model: PairModel, config: ExperimentConfig) -> deepspeed.DeepSpeedEngine:
    """Wrap a model for training. The process group must exist; every rank calls this with the same weights.

    Weights and gradients are fp32 at every ZeRO stage and `train.precision` acts through autocast (inside the model:
    on CUDA, DeepSpeed switches off one that it finds around its engine), so that the stage changes memory and speed
    but never the numbers.
    """
    _quiet()
    _prebuild(_COMMUNICATION_OP)
    get_accelerator().reset_peak_memory_stats()  # a warm worker had other models before
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = _parameter_groups(trainable, config.optim)
    ds_config = deepspeed_config(config)
    if config.deepspeed.offload_optimizer == "none":
        # torch's own fused kernel runs on CPU and CUDA alike and needs no compiler, unlike DeepSpeed's FusedAdam.
        arguments: dict[str, Any] = {"optimizer": torch.optim.AdamW(groups, fused=True, **_adam(config.optim))}
    else:
        _prebuild("CPUAdamBuilder")
        arguments = {"model_parameters": groups}
        ds_config["optimizer"] = {"type": "AdamW", "params": _adam(config.optim)}
    engine, *_ = deepspeed.initialize(model=model, config=ds_config, dist_init_required=False, **arguments)
    if config.deepspeed.zero_stage == 0 and dist.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # with nobody to reduce with, it would copy all gradients twice
    if config.deepspeed.zero_stage == 3:
        for parameter in model.outside_parameters:
            deepspeed.zero.register_external_parameter(model, parameter)
    return engine


def deepspeed_config(config: ExperimentConfig) -> dict[str, Any]:
    """The DeepSpeed configuration that an experiment stands for."""
    stage = config.deepspeed.zero_stage
    return {
        # Nominal: the loop packs micro-batches by tokens and marks the last one of a step itself; 2 stands for several.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        # Stage 0 has no DeepSpeed optimizer to report the norm it clipped to: `step` clips there.
        "gradient_clipping": (config.optim.max_grad_norm or 0.0) if stage else 0.0,
        "zero_optimization": _zero(config.deepspeed),
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def step(engine: deepspeed.DeepSpeedEngine, lr: float, max_grad_norm: float | None) -> float:
    """Clip, update, clear. Call on every rank after the last micro-batch's backward.

    Returns:
        Norm of the global gradient before clipping, the same on every rank. Not finite if any rank's gradient was not.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    if engine.zero_optimization_stage() == 0:
        parameters = [p for p in engine.module.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
        engine.step()
    else:
        engine.step()
        norm = engine.get_global_grad_norm()
    return float(norm)


def destroy(engine: deepspeed.DeepSpeedEngine) -> None:
    """Free what the engine holds; the process group stays for the next one."""
    optimizers = (engine.basic_optimizer, engine.optimizer)
    modules, parameters = list(engine.module.modules()), list(engine.module.parameters())
    engine.destroy()
    # ZeRO-3 leaves hooks in autograd's nodes, where Python's collector cannot see that they and what they refer to
    # form cycles. So everything is taken from what they reach, the modules' own hooks and DeepSpeed's classes of
    # autograd functions included: otherwise every engine leaves all of its state behind.
    for optimizer in optimizers:
        vars(optimizer).clear()
    for parameter in parameters:
        vars(parameter).clear()
        parameter.data = torch.empty(0)
        parameter.grad = None
    for module in (*modules, engine):
        vars(module).clear()
    gc.collect()  # what remains refers to each other in cycles
    get_accelerator().empty_cache()


def _adam(optim: OptimConfig) -> dict[str, Any]:
    return {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}


def _parameter_groups(trainable: list[torch.nn.Parameter], optim: OptimConfig) -> list[dict[str, Any]]:
    """Matrices decay, biases and norms do not. A group without parameters would break ZeRO's flat buffers."""
    decayed = [p for p in trainable if p.dim() >= 2]
    plain = [p for p in trainable if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _zero(config: DeepSpeedConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage >= 2:
        zero |= {"overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True}
    if config.zero_stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    for name in ("offload_optimizer", "offload_param"):
        device = getattr(config, name)
        if device != "none":
            zero[name] = {"device": device, "pin_memory": torch.cuda.is_available()}
            if device == "nvme":
                zero[name]["nvme_path"] = config.nvme_path
    return zero


def _quiet() -> None:
    """DeepSpeed logs dozens of INFO lines per engine; a warm worker starts one engine per trial."""
    import logging

    from deepspeed.utils import logger

    logger.setLevel(os.environ.get("ORPO_RAY_DEEPSPEED_LOG_LEVEL", "WARNING").upper())
    logging.getLogger("DeepSpeed").setLevel(logger.level)
