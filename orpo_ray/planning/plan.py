"""What a sweep will need, before anything starts: trials, memory, hours, disk, and what would not run.

Imports neither Ray nor torch, so that a plan of any size takes a second or two.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orpo_ray.config import ConfigError, ExperimentConfig, SweepConfig
from orpo_ray.config.space import Bundle, Grid, LogUniform, Uniform, grid_cells
from orpo_ray.hardware import NodeMemory, this_machine
from orpo_ray.planning import speed
from orpo_ray.planning.architecture import Architecture, architecture_of
from orpo_ray.planning.cost import CostModel
from orpo_ray.planning.fit import fit_to
from orpo_ray.planning.problems import Problem, without_disk, without_effect, without_room
from orpo_ray.planning.sizes import Size, SizeEstimator
from orpo_ray.storage.sweep_state import read_state

_MOST_CELLS = 200


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a sweep will need; see `plan_table` for the terminal and `to_json` for programs."""

    name: str
    trials: int
    """Upper limit, confirmations included."""
    confirmations: int
    steps_per_trial: int | None
    """None where the experiment sets epochs."""
    pairs_per_trial: int | None
    cpus: int
    gpus: int
    memory_bytes: int
    gpu_memory_bytes: int
    """Memory of each GPU."""
    concurrent: int
    """Trials of the smallest size that train at once."""
    sizes: list[Size]
    device_hours: float | None
    wall_hours: float | None
    """On this cluster, without early stopping."""
    checkpoint_bytes: int | None
    """Checkpoints of all trials, and new ones being written."""
    free_disk_bytes: int
    """Free space under `output_dir`."""
    pair_tokens: speed.PairTokens
    problems: list[Problem]
    axes: dict[str, str]
    cells: list[dict[str, Any]]
    """Cells of the grid, at most 200; sampled axes are drawn when the sweep runs."""

    @property
    def possible(self) -> bool:
        """Whether every trial can run on this cluster."""
        return not any(problem.kind == "error" for problem in self.problems)

    def to_json(self) -> str:
        """The whole plan as JSON."""
        return json.dumps(asdict(self) | {"possible": self.possible}, indent=2, ensure_ascii=False)


def plan(config: ExperimentConfig, node: NodeMemory | None = None, flops_per_second: float | None = None) -> Plan:
    """Work out what a sweep would run, without Ray.

    Args:
        config: a loaded experiment.
        node: the cluster to plan for, as one node; by default this machine. A GPU memory of 0 means unknown.
        flops_per_second: rate of a worker's matrix products, for devices that this machine lacks; by default a CPU's
            rate is measured.
    """
    config, sweep = config.as_sweep()
    node = node or this_machine()
    problems: list[Problem] = []
    labels = [str(label) for label in sweep.space[sweep.bundle_axis].candidates()] if sweep.bundle_axis else [""]
    tokens = speed.pair_tokens(config.data)
    trials = {label: _fitted(config, sweep, label, node, problems) for label in labels}
    shapes = {label: _shape(label, trial, problems) for label, trial in trials.items()}
    measured = _measured(config, trials, shapes)
    estimator = SizeEstimator(sweep, node, tokens, measured, flops_per_second, len(labels))
    sizes = [estimator.size(label, trials[label], shapes[label]) for label in labels]
    problems += without_room(sizes, sweep, node) + without_effect(sizes, sweep)
    most = max((size.at_once for size in sizes), default=0)
    concurrent = min(most, sweep.num_trials, sweep.max_concurrent or most)
    disk_needed = _sum([_times(size.checkpoint_bytes, size.share_of(sweep, len(sizes))) for size in sizes])
    if disk_needed is not None:
        disk_needed += concurrent * max(size.checkpoint_bytes or 0 for size in sizes)
    folder = _existing(config.run_dir)
    free = shutil.disk_usage(folder).free
    problems += without_disk(disk_needed, free, folder)
    steps = config.train.max_steps
    return Plan(
        name=config.name,
        trials=sweep.num_trials + sweep.num_confirmations,
        confirmations=sweep.num_confirmations,
        steps_per_trial=steps,
        pairs_per_trial=None if steps is None else steps * config.train.global_batch_size,
        cpus=node.cpus,
        gpus=node.gpus,
        memory_bytes=node.memory_bytes,
        gpu_memory_bytes=node.gpu_memory_bytes,
        concurrent=concurrent,
        sizes=sizes,
        device_hours=_sum([size.device_hours for size in sizes]),
        wall_hours=_wall_hours(sizes, sweep),
        checkpoint_bytes=disk_needed,
        free_disk_bytes=free,
        pair_tokens=tokens,
        problems=problems,
        axes={name: _axis_text(axis) for name, axis in sweep.space.items()},
        cells=[] if sweep.is_model_based else grid_cells(sweep.space)[:_MOST_CELLS],
    )


def _fitted(
    config: ExperimentConfig, sweep: SweepConfig, label: str, node: NodeMemory, problems: list[Problem]
) -> ExperimentConfig:
    """Trial config of a bundle, with `scaling: auto` resolved; unresolved where nothing fits, which is a problem."""
    trial = config.trial({sweep.bundle_axis: label} if sweep.bundle_axis else {})
    try:
        return fit_to(trial, [node])
    except ConfigError as error:
        problems.append(Problem("error", f"{label}: {error}" if label else str(error)))
        return trial


def _shape(label: str, trial: ExperimentConfig, problems: list[Problem]) -> Architecture | None:
    """Architecture of a bundle's model; None where its configuration cannot be read, which is a problem."""
    try:
        return architecture_of(trial.model)
    except ConfigError as error:
        text = f"{label}: {error}" if label else str(error)
        if all(text != problem.text for problem in problems):
            problems.append(Problem("warning", text))
        return None


def _measured(
    config: ExperimentConfig, trials: dict[str, ExperimentConfig], shapes: dict[str, Architecture | None]
) -> dict[str, float]:
    """Device-seconds per step of the bundles whose trials have run in this sweep's directory."""
    state = read_state(config.run_dir)
    if not state.trials:
        return {}
    parameters = {label: 1 if shape is None else shape.parameters for label, shape in shapes.items()}
    devices = {label: trial.scaling.num_workers for label, trial in trials.items()}
    return CostModel(parameters, devices).rates(state)


def _wall_hours(sizes: list[Size], sweep: SweepConfig) -> float | None:
    """Time of the sizes one after another on the whole cluster; None where a size's time is not known.

    Running sizes in parallel instead fills the idle devices at each size's end, so the estimate holds for both.
    """
    hours = 0.0
    for size in sizes:
        if size.seconds_per_trial is None or not size.at_once:
            return None
        at_once = min(size.at_once, sweep.max_concurrent or size.at_once)
        rounds = size.share_of(sweep, len(sizes)) / at_once
        hours += max(1.0, rounds) * size.seconds_per_trial / 3600
    limit = sweep.budget.device_hours if sweep.budget else None
    total = _sum([size.device_hours for size in sizes])
    return hours if limit is None or not total else hours * min(1.0, limit / total)


def _axis_text(axis: Any) -> str:
    match axis:
        case Uniform() | LogUniform():
            return f"{axis.type} {axis.low:g} to {axis.high:g}"
        case Bundle():
            return "\n".join(
                f"{label}: " + ", ".join(f"{path}={value}" for path, value in settings.items())
                for label, settings in axis.values.items()
            )
        case Grid():
            return "each of " + ", ".join(map(str, axis.values))
        case _:
            return "one of " + ", ".join(map(str, axis.values))


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _sum(numbers: list[Any]) -> Any:
    """Sum, or None where a number is not known."""
    return None if any(number is None for number in numbers) else sum(numbers)


def _times(number: int | None, by: int) -> int | None:
    return None if number is None else number * by
