"""A DeepSpeed ZeRO engine: built from the typed config, stepped, and freed."""

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
"""DeepSpeed compiles it at every start on a CPU; other accelerators have none."""
_LONGEST_BUILD_S = 180
"""A build's guard file that is older than this was left by a killed process."""


def init_process_group() -> None:
    """Join the process group that the launcher's environment describes, unless this process is in one already."""
    _prebuild(_COMMUNICATION_OP)
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)


@cache
def _prebuild(op_builder: str) -> None:
    """Compile one of DeepSpeed's ops, once for all processes of this machine.

    PyTorch guards a build with a plain file, which remains when the builder is killed; every later process then waits
    for ever (pytorch/pytorch#189245). Here processes take turns under a lock that the system releases with its owner,
    and an old guard file is removed.
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

    Weights and gradients are fp32 at every ZeRO stage, and `train.precision` acts through autocast, so that the stage
    changes memory and speed but never the numbers. Autocast is inside the model because on CUDA DeepSpeed disables an
    autocast region around its engine.
    """
    _quiet()
    _prebuild(_COMMUNICATION_OP)
    get_accelerator().reset_peak_memory_stats()  # a warm worker has trained other models before
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
        engine.enable_backward_allreduce = False  # a single rank needs none, and it would copy all gradients twice
    if config.deepspeed.zero_stage == 3:
        for parameter in model.outside_parameters:
            deepspeed.zero.register_external_parameter(model, parameter)
    return engine


def deepspeed_config(config: ExperimentConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of an experiment."""
    stage = config.deepspeed.zero_stage
    return {
        # Nominal values: the loop packs micro-batches by tokens and marks a step's last one itself; 2 means several.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        # Stage 0 has no DeepSpeed optimizer to report the norm it clipped to: `step` clips there.
        "gradient_clipping": (config.optim.max_grad_norm or 0.0) if stage else 0.0,
        "zero_optimization": _zero(config.deepspeed),
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def step(engine: deepspeed.DeepSpeedEngine, lr: float, max_grad_norm: float | None) -> float:
    """Clip the gradient, update the weights, clear the gradient. Call on every rank after the last backward pass.

    Returns:
        Norm of the global gradient before clipping, the same on every rank; not finite if any rank's gradient is not.
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
    """Free the engine's memory; the process group remains for the next engine."""
    optimizers = (engine.basic_optimizer, engine.optimizer)
    modules, parameters = list(engine.module.modules()), list(engine.module.parameters())
    engine.destroy()
    # ZeRO-3 leaves hooks in autograd's nodes, where Python's collector cannot see that they form cycles with the
    # objects that they refer to. So these objects are emptied, the modules' own hooks and DeepSpeed's classes of
    # autograd functions included: otherwise every engine leaks all of its state.
    for optimizer in optimizers:
        vars(optimizer).clear()
    for parameter in parameters:
        vars(parameter).clear()
        parameter.data = torch.empty(0)
        parameter.grad = None
    for module in (*modules, engine):
        vars(module).clear()
    gc.collect()  # the remaining objects form cycles
    get_accelerator().empty_cache()


def _adam(optim: OptimConfig) -> dict[str, Any]:
    return {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}


def _parameter_groups(trainable: list[torch.nn.Parameter], optim: OptimConfig) -> list[dict[str, Any]]:
    """Weight decay for matrices only, not for biases and norms. An empty group would break ZeRO's flat buffers."""
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
    """Hide INFO lines: DeepSpeed logs dozens per engine, and a warm worker starts one engine per trial."""
    import logging

    from deepspeed.utils import logger

    logger.setLevel(os.environ.get("ORPO_RAY_DEEPSPEED_LOG_LEVEL", "WARNING").upper())
    logging.getLogger("DeepSpeed").setLevel(logger.level)
