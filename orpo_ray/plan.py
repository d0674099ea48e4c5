"""What a sweep will need, before anything starts. Loading the config has checked every candidate already."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orpo_ray.config import ExperimentConfig, OptunaConfig
from orpo_ray.model import ModelError, count_parameters_of
from orpo_ray.space import Bundle, Grid, LogUniform, Uniform, describe, grid_cells
from orpo_ray.trainer import Resources, fits, most_groups

_BYTES_PER_PARAMETER = 12
"""A checkpoint holds fp32 weights and AdamW's two fp32 moments; frozen weights are left out."""


@dataclass(frozen=True, slots=True)
class Size:
    """One bundle (or the whole sweep, where there is none)."""

    label: str
    model: str
    parameters: int | None
    """None where the model cannot be looked up from here."""
    resources: Resources
    micro_batch_size: int | None
    """Pairs per forward pass at most; None where only tokens limit it."""
    max_tokens_per_micro_batch: int
    zero_stage: int
    precision: str
    trials: int | None
    """None where the searcher decides."""
    checkpoint_bytes: int | None
    """Per trial; the last checkpoint is kept. LoRA's are smaller."""
    fits: bool
    """Whether one of its groups finds room on the cluster planned for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Print it with rich, or as JSON."""

    name: str
    trials: int
    steps_per_trial: int | None
    """None where it is given in epochs."""
    pairs_per_trial: int | None
    cpus: int
    gpus: int
    concurrent: int
    """Trials that train at once, of the smallest size."""
    sizes: list[Size]
    axes: dict[str, str]
    cells: list[dict[str, Any]]
    """The grid's cells, at most 200; sampled axes are drawn when the sweep runs."""

    @property
    def possible(self) -> bool:
        """Whether every trial can run on this cluster."""
        return all(size.fits for size in self.sizes)

    def to_json(self) -> str:
        """All of the plan, for programs."""
        return json.dumps(asdict(self) | {"possible": self.possible}, indent=2, ensure_ascii=False)

    def __rich__(self) -> RenderableType:
        length = f"{self.steps_per_trial} steps" if self.steps_per_trial else "by epochs"
        head = Text.assemble(
            (f"{self.name}: {self.trials} trials", "bold"),
            f", each {length}; {self.concurrent} at once on {self.cpus} CPU and {self.gpus} GPU\n",
        )
        axes = Table("axis", "values", title="search space", title_justify="left", box=None, padding=(0, 3, 0, 0))
        for name, values in self.axes.items():
            axes.add_row(name, values)
        sizes = Table(title="per size", title_justify="left", box=None, padding=(0, 3, 0, 0))
        for column in (
            "bundle",
            "model",
            "parameters",
            "workers",
            "per pass, at most",
            "ZeRO",
            "checkpoint",
            "room",
        ):
            sizes.add_column(column)
        for size in self.sizes:
            r = size.resources
            device = f"{r.gpus_per_worker} GPU" if r.gpus_per_worker else f"{r.cpus_per_worker} CPU"
            sizes.add_row(
                size.label or "-",
                size.model,
                "?" if size.parameters is None else f"{size.parameters / 1e6:.1f}M",
                f"{r.num_workers} × {device}",
                ("" if size.micro_batch_size is None else f"{size.micro_batch_size} pairs, ")
                + f"{size.max_tokens_per_micro_batch} tokens {size.precision}",
                str(size.zero_stage),
                "?" if size.checkpoint_bytes is None else f"{size.checkpoint_bytes / 2**20:.0f} MiB",
                Text("yes") if size.fits else Text("no: it would wait for ever", style="red"),
            )
        cells = Text("\n".join(f"  {describe(cell)}" for cell in self.cells))
        sampled = [name for name, values in self.axes.items() if values.startswith(("uniform", "loguniform", "one of"))]
        title = f"\ngrid cells ({', '.join(sampled)} drawn for each trial)" if sampled else "\ntrials"
        return Group(head, axes, "", sizes, title, cells) if self.axes else Group(head, sizes)


def plan(config: ExperimentConfig, num_cpus: int | None = None, num_gpus: int | None = None) -> Plan:
    """Work out what a sweep would run, without Ray.

    Args:
        config: a loaded experiment.
        num_cpus: CPUs of the cluster to plan for, as one node; by default this machine's.
        num_gpus: its GPUs.
    """
    import torch

    config, sweep = config.as_sweep()
    cpus = num_cpus or os.cpu_count() or 1
    gpus = torch.cuda.device_count() if num_gpus is None else num_gpus
    nodes = [{"CPU": float(cpus), "GPU": float(gpus)}]
    labels = sweep.space[sweep.bundle_axis].candidates() if sweep.bundle_axis else [""]
    model_based = isinstance(sweep.searcher, OptunaConfig)
    sizes = []
    for label in labels:
        trial = config.trial({sweep.bundle_axis: label} if sweep.bundle_axis else {})
        resources = Resources.of(trial.scaling, gpus > 0)
        try:
            parameters = count_parameters_of(trial.model)
        except ModelError:
            parameters = None
        full = parameters if trial.model.lora is None else None
        sizes.append(
            Size(
                label=str(label),
                model=trial.model.path,
                parameters=parameters,
                resources=resources,
                micro_batch_size=trial.train.micro_batch_size,
                max_tokens_per_micro_batch=trial.train.max_tokens_per_micro_batch,
                zero_stage=trial.deepspeed.zero_stage,
                precision=trial.train.precision,
                trials=None if model_based and len(labels) > 1 else sweep.num_trials // len(labels),
                checkpoint_bytes=None if full is None else full * _BYTES_PER_PARAMETER,
                fits=fits([resources], nodes),
            )
        )
    slots = most_groups([size.resources for size in sizes], nodes)
    steps = config.train.max_steps
    return Plan(
        name=config.name,
        trials=sweep.num_trials,
        steps_per_trial=steps,
        pairs_per_trial=None if steps is None else steps * config.train.global_batch_size,
        cpus=cpus,
        gpus=gpus,
        concurrent=min(slots, sweep.num_trials, sweep.max_concurrent or slots),
        sizes=sizes,
        axes={name: _axis_text(axis) for name, axis in sweep.space.items()},
        cells=[] if model_based else grid_cells(sweep.space)[:200],
    )


def _axis_text(axis: Any) -> str:
    match axis:
        case Uniform() | LogUniform():
            return f"{axis.type} {axis.low:g} to {axis.high:g}"
        case Bundle():
            return "; ".join(
                f"{label}: " + ", ".join(f"{path}={value}" for path, value in settings.items())
                for label, settings in axis.values.items()
            )
        case Grid():
            return "each of " + ", ".join(map(str, axis.values))
        case _:
            return "one of " + ", ".join(map(str, axis.values))
