"""Memory, time and checkpoints of the trials of one model size, which is one bundle of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orpo_ray.config import ExperimentConfig, SweepConfig
from orpo_ray.hardware import Device, NodeMemory, device_of
from orpo_ray.planning import speed
from orpo_ray.planning.architecture import Architecture
from orpo_ray.planning.memory import Memory, checkpoint_bytes, peak_memory, precision_on, tokens_per_pass

MEASURED = "measured"
"""`Size.time_basis` of times from this sweep's journal."""


@dataclass(frozen=True, slots=True)
class Size:
    """One bundle of the sweep, or the whole sweep if it has no bundles."""

    label: str
    model: str
    parameters: int | None
    """None where the model's configuration cannot be read; memory, checkpoint and time are then None, too."""
    trainable_parameters: int | None
    trials: int | None
    """None where the searcher decides."""
    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    zero_stage: int
    offload_optimizer: str
    gradient_checkpointing: bool
    tokens_per_pass: int
    """Upper limit."""
    precision: str
    memory: Memory | None
    """Predicted for each worker, in bytes."""
    checkpoint_bytes: int | None
    """Size of the last checkpoint of one trial, which is kept."""
    seconds_per_step: float | None
    seconds_per_trial: float | None
    """Evaluations included, without early stopping."""
    device_hours: float | None
    """Training time × workers, summed over this size's trials."""
    time_basis: str
    """`measured` in this sweep's journal, or how the time was estimated."""
    at_once: int
    """Trials of this size for which the cluster has devices at the same time."""

    def share_of(self, sweep: SweepConfig, num_sizes: int) -> int:
        """Trials of this size; an equal share where the searcher decides."""
        return -(-sweep.num_trials // num_sizes) if self.trials is None else self.trials


@dataclass(frozen=True, slots=True)
class SizeEstimator:
    """Estimates sizes; holds what all sizes of a plan have in common."""

    sweep: SweepConfig
    node: NodeMemory
    pair_tokens: speed.PairTokens
    measured: Mapping[str, float]
    """Device-seconds per step of the bundles that have run, by label."""
    flops_per_second: float | None
    """Rate of a worker's matrix products; None: measure this machine's CPU."""
    num_sizes: int

    def size(self, label: str, trial: ExperimentConfig, shape: Architecture | None) -> Size:
        """Estimate one size.

        Args:
            label: bundle label; empty without bundles.
            trial: config of one trial of this size, `scaling: auto` resolved.
            shape: the model's; None where it cannot be read.
        """
        sweep, workers = self.sweep, trial.scaling.num_workers
        on_gpu = self.node.gpus > 0 if trial.scaling.use_gpu == "auto" else trial.scaling.use_gpu
        device = device_of(on_gpu, [self.node])
        step, basis = self._step(label, trial, shape, device)
        steps, seconds = trial.train.max_steps, None
        if step is not None and steps is not None:
            # A measured rate includes the evaluations already.
            seconds = step * steps if basis == MEASURED else speed.trial_seconds(trial, steps, step)
        searcher_decides = sweep.is_model_based and self.num_sizes > 1
        count = sweep.num_trials // self.num_sizes
        return Size(
            label=label,
            model=trial.model.path,
            parameters=None if shape is None else shape.parameters,
            trainable_parameters=None if shape is None else shape.trainable(trial.model.lora),
            trials=None if searcher_decides else count,
            num_workers=workers,
            cpus_per_worker=trial.scaling.cpus_per_worker,
            gpus_per_worker=int(on_gpu),
            zero_stage=trial.deepspeed.zero_stage,
            offload_optimizer=trial.deepspeed.offload_optimizer,
            gradient_checkpointing=trial.model.gradient_checkpointing,
            tokens_per_pass=tokens_per_pass(trial),
            precision=precision_on(trial.train.precision, device),
            memory=None if shape is None else peak_memory(trial, shape, device, is_first_trial=sweep.num_trials == 1),
            checkpoint_bytes=None if shape is None else checkpoint_bytes(trial, shape),
            seconds_per_step=step,
            seconds_per_trial=seconds,
            device_hours=None if seconds is None else seconds * workers * count / 3600,
            time_basis=basis,
            at_once=_places(self.node, trial.scaling.cpus_per_worker, on_gpu) // workers,
        )

    def _step(
        self, label: str, trial: ExperimentConfig, shape: Architecture | None, device: Device
    ) -> tuple[float | None, str]:
        """Seconds per optimizer step, and the basis of the number."""
        if label in self.measured:
            return self.measured[label] / trial.scaling.num_workers, MEASURED
        if shape is None or (self.flops_per_second is None and device is Device.CUDA):
            return None, "time not known: give --flops-per-second of the device"
        rate, basis = self.flops_per_second, f"at {self.flops_per_second or 0:.2g} operations per second"
        if rate is None:
            rate = trial.scaling.cpus_per_worker * speed.cpu_rate(shape)
            basis = "estimated from a matrix product measured here"
            if device is Device.CPU_BF16 and precision_on(trial.train.precision, device) == "bf16":
                rate *= speed.CPU_BF16_GAIN
                basis += f", times {speed.CPU_BF16_GAIN:g} for bf16"
        return speed.step_seconds(trial, speed.pair_flops(trial, shape, self.pair_tokens), rate), basis


def _places(node: NodeMemory, cpus: int, on_gpu: bool) -> int:
    """Workers for which a node has CPUs and GPUs."""
    return min(node.cpus // cpus, node.gpus) if on_gpu else node.cpus // cpus
