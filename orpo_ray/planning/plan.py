"""What a sweep will need, before anything starts: trials, memory, hours, disk, and what would not run.

Neither Ray nor torch is imported, so that a plan of any size is there in a second or two.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orpo_ray.config import AshaConfig, ConfigError, ExperimentConfig, MedianConfig, SweepConfig
from orpo_ray.config.space import Bundle, Grid, LogUniform, Uniform, describe, grid_cells
from orpo_ray.hardware import Device, NodeMemory, device_of, this_machine
from orpo_ray.planning import speed
from orpo_ray.planning.architecture import Architecture, architecture_of
from orpo_ray.planning.cost import CostModel
from orpo_ray.planning.fit import SAFETY, fit_to, workers_on
from orpo_ray.planning.memory import GIB, Memory, checkpoint_bytes, peak_memory, precision_on, tokens_per_pass
from orpo_ray.planning.plan_table import TABLE_STYLE, _bytes, _duration, _gib
from orpo_ray.storage.sweep_state import read_state

_MOST_CELLS = 200


@dataclass(frozen=True, slots=True)
class Problem:
    """Something to know before the sweep is started."""

    kind: Literal["error", "warning"]
    """An error keeps trials from running; a warning does not."""
    text: str
    """What, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Size:
    """One bundle (or the whole sweep, where there is none)."""

    label: str
    model: str
    parameters: int | None
    """None where the model cannot be looked up from here; then so are memory, checkpoint and time."""
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
    """At most."""
    precision: str
    memory: Memory | None
    """Predicted for each worker, in bytes."""
    checkpoint_bytes: int | None
    """Of one trial, which keeps its last one."""
    seconds_per_step: float | None
    seconds_per_trial: float | None
    """Without early stopping, evaluations included."""
    device_hours: float | None
    """Of all its trials: training time × workers."""
    time_basis: str
    """`measured` in this sweep's journal, or how it was estimated."""
    at_once: int
    """Trials of this size that the cluster holds at the same time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Print it with rich, or as JSON."""

    name: str
    trials: int
    """Confirmation included, at most."""
    confirmations: int
    steps_per_trial: int | None
    """None where it is given in epochs."""
    pairs_per_trial: int | None
    cpus: int
    gpus: int
    memory_bytes: int
    gpu_memory_bytes: int
    """Of each GPU."""
    concurrent: int
    """Trials that train at once, of the smallest size."""
    sizes: list[Size]
    device_hours: float | None
    wall_hours: float | None
    """On this cluster, without early stopping."""
    checkpoint_bytes: int | None
    """Of all trials, and of those being written."""
    free_disk_bytes: int
    """Under `output_dir`."""
    pair_tokens: speed.PairTokens
    problems: list[Problem]
    axes: dict[str, str]
    cells: list[dict[str, Any]]
    """The grid's cells, at most 200; sampled axes are drawn when the sweep runs."""

    @property
    def possible(self) -> bool:
        """Whether every trial can run on this cluster."""
        return not any(problem.kind == "error" for problem in self.problems)

    def to_json(self) -> str:
        """All of the plan, for programs."""
        return json.dumps(asdict(self) | {"possible": self.possible}, indent=2, ensure_ascii=False)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._heading(), self._table(), self._totals()]
        for problem in self.problems:
            style = "red" if problem.kind == "error" else "yellow"
            parts.append(Padding(Text(f"{problem.kind}: {problem.text}", style=style), (1, 0, 0, 0)))
        if not self.axes:
            return Group(*parts)
        axes = Table("axis", "values", title="\nsearch space", **TABLE_STYLE)
        for name, values in self.axes.items():
            axes.add_row(name, values)
        drawn = [name for name, values in self.axes.items() if values.startswith(("uniform", "loguniform", "one of"))]
        lines = [describe(cell) for cell in self.cells]
        if lines:
            shown, more = lines[:16], len(lines) - 16
            title = f"grid cells ({', '.join(drawn)} drawn for each trial)" if drawn else "trials"
            body = "\n".join(f"  {line}" for line in shown) + (f"\n  ... {more} more" if more > 0 else "")
            return Group(*parts, axes, Text(f"\n{title}\n{body}"))
        return Group(*parts, axes)

    def _heading(self) -> Text:
        length = f"{self.steps_per_trial} steps" if self.steps_per_trial else "by epochs"
        more = f" ({self.confirmations} of them to confirm the best)" if self.confirmations else ""
        gpus = f", {self.gpus} GPU" + (f" of {_gib(self.gpu_memory_bytes)}" if self.gpu_memory_bytes else "")
        return Text.assemble(
            (f"{self.name}: {self.trials} {'trial' if self.trials == 1 else 'trials'}", "bold"),
            f"{more}, each {length}; {self.concurrent} at once on {self.cpus} CPU{gpus}, {_gib(self.memory_bytes)}\n",
        )

    def _table(self) -> Table:
        table = Table(**TABLE_STYLE)
        table.add_column("size")
        for column in ("trials", "params", "workers", "ZeRO", "tokens/pass", "GiB each", "ckpt", "s/step", "device-h"):
            table.add_column(column, no_wrap=True, justify="right")
        for size in self.sizes:
            device = f"{size.gpus_per_worker} GPU" if size.gpus_per_worker else f"{size.cpus_per_worker} CPU"
            offload = "" if size.offload_optimizer == "none" else " offload"
            recompute = " recompute" if size.gradient_checkpointing else ""
            table.add_row(
                size.label or size.model.rsplit("/", 1)[-1],
                "?" if size.trials is None else str(size.trials),
                "?" if size.parameters is None else f"{size.parameters / 1e6:.1f}M",
                f"{size.num_workers} × {device}",
                f"{size.zero_stage}{offload}",
                f"{size.tokens_per_pass} {size.precision}{recompute}",
                "?" if size.memory is None else f"{size.memory.peak / GIB:.1f}",
                "?" if size.checkpoint_bytes is None else _bytes(size.checkpoint_bytes),
                "?" if size.seconds_per_step is None else f"{size.seconds_per_step:.2g}",
                "?" if size.device_hours is None else f"{size.device_hours:.2g}",
            )
        return table

    def _totals(self) -> Text:
        measured = all(size.time_basis == "measured" for size in self.sizes)
        off = "" if measured else " (± a factor of 2)"
        wall = "not known" if self.wall_hours is None else f"{_duration(self.wall_hours)}{off}"
        hours = "?" if self.device_hours is None else f"{self.device_hours:.2g}"
        disk = "?" if self.checkpoint_bytes is None else _bytes(self.checkpoint_bytes)
        bases = "; ".join(dict.fromkeys(size.time_basis for size in self.sizes if size.time_basis))
        accuracy = "predicted within 15 % on CPUs" if not self.gpus else "predicted; not checked on GPUs"
        return Text(
            f"\nwall time    {wall}, {hours} device-hours, without early stopping"
            f"\n             {bases}"
            f"\n             {self.pair_tokens.basis}"
            f"\nmemory       GiB of each worker are {accuracy}; a memory is filled to {SAFETY:.0%}"
            f"\ncheckpoints  {disk} in all, {_bytes(self.free_disk_bytes)} free"
        )


def plan(config: ExperimentConfig, node: NodeMemory | None = None, flops_per_second: float | None = None) -> Plan:
    """Work out what a sweep would run, without Ray.

    Args:
        config: a loaded experiment.
        node: the cluster to plan for, as one node; by default this machine. A GPU memory of 0 is one not known.
        flops_per_second: of a worker's matrix products, for devices that are not here; by default a CPU's is measured.
    """
    config, sweep = config.as_sweep()
    node = node or this_machine()
    problems: list[Problem] = []
    labels = [str(label) for label in sweep.space[sweep.bundle_axis].candidates()] if sweep.bundle_axis else [""]
    tokens = speed.pair_tokens(config.data)
    trials = {label: _fitted(config, sweep, label, node, problems) for label in labels}
    shapes = {label: _shape(label, trial, problems) for label, trial in trials.items()}
    measured = _measured(config, trials, shapes)
    sizes = [
        _size(label, sweep, trials[label], shapes[label], node, tokens, measured, flops_per_second, len(labels))
        for label in labels
    ]
    problems += _no_room(sizes, sweep, node) + _too_short(sizes, sweep)
    most = max((size.at_once for size in sizes), default=0)
    concurrent = min(most, sweep.num_trials, sweep.max_concurrent or most)
    disk_needed = _sum([_times(size.checkpoint_bytes, _share(size, sweep, sizes)) for size in sizes])
    if disk_needed is not None:
        disk_needed += concurrent * max(size.checkpoint_bytes or 0 for size in sizes)
    free = shutil.disk_usage(_existing(config.run_dir)).free
    if disk_needed is not None and disk_needed > free:
        problems.append(
            Problem(
                "error",
                f"checkpoints need {_bytes(disk_needed)}, but {_existing(config.run_dir)} has {_bytes(free)} free: "
                "choose another output_dir, use model.lora, or fewer trials",
            )
        )
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
    """The trial config of a bundle, `scaling: auto` resolved; as it stands in the file where nothing fits."""
    trial = config.trial({sweep.bundle_axis: label} if sweep.bundle_axis else {})
    try:
        return fit_to(trial, [node])
    except ConfigError as error:
        problems.append(Problem("error", f"{label}: {error}" if label else str(error)))
        return trial


def _shape(label: str, trial: ExperimentConfig, problems: list[Problem]) -> Architecture | None:
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
    """Device-seconds a step of the bundles whose trials have run in this sweep's directory."""
    state = read_state(config.run_dir)
    if not state.trials:
        return {}
    parameters = {label: 1 if shape is None else shape.parameters for label, shape in shapes.items()}
    devices = {label: trial.scaling.num_workers for label, trial in trials.items()}
    return CostModel(parameters, devices).rates(state)


def _size(
    label: str,
    sweep: SweepConfig,
    trial: ExperimentConfig,
    shape: Architecture | None,
    node: NodeMemory,
    tokens: speed.PairTokens,
    measured: dict[str, float],
    flops_per_second: float | None,
    labels: int,
) -> Size:
    workers = trial.scaling.num_workers
    on_gpu = node.gpus > 0 if trial.scaling.use_gpu == "auto" else trial.scaling.use_gpu
    device = device_of(on_gpu, [node])
    precision = precision_on(trial.train.precision, device)
    step, basis = None, "time not known: give --flops-per-second of the device"
    if label in measured:
        step, basis = measured[label] / workers, "measured"
    elif shape is not None and (flops_per_second is not None or not on_gpu):
        rate, basis = flops_per_second, f"at {flops_per_second or 0:.2g} operations per second"
        if rate is None:
            rate = trial.scaling.cpus_per_worker * speed.cpu_rate(shape)
            basis = "estimated from a matrix product measured here"
            if device is Device.CPU_BF16 and precision == "bf16":
                rate *= speed.CPU_BF16_GAIN
                basis += f", times {speed.CPU_BF16_GAIN:g} for bf16"
        step = speed.step_seconds(trial, speed.pair_flops(trial, shape, tokens), rate)
    steps = trial.train.max_steps
    seconds = None
    if step is not None and steps is not None:
        # A measured rate holds the evaluations already.
        seconds = step * steps if basis == "measured" else speed.trial_seconds(trial, steps, step)
    decided = not (sweep.is_model_based and labels > 1)
    count = sweep.num_trials // labels
    return Size(
        label=label,
        model=trial.model.path,
        parameters=None if shape is None else shape.parameters,
        trainable_parameters=None if shape is None else shape.trainable(trial.model.lora),
        trials=count if decided else None,
        num_workers=workers,
        cpus_per_worker=trial.scaling.cpus_per_worker,
        gpus_per_worker=int(on_gpu),
        zero_stage=trial.deepspeed.zero_stage,
        offload_optimizer=trial.deepspeed.offload_optimizer,
        gradient_checkpointing=trial.model.gradient_checkpointing,
        tokens_per_pass=tokens_per_pass(trial),
        precision=precision,
        memory=None if shape is None else peak_memory(trial, shape, device, is_first_trial=sweep.num_trials == 1),
        checkpoint_bytes=None if shape is None else checkpoint_bytes(trial, shape),
        seconds_per_step=step,
        seconds_per_trial=seconds,
        device_hours=None if seconds is None else seconds * workers * count / 3600,
        time_basis=basis,
        at_once=_places(node, trial.scaling.cpus_per_worker, on_gpu) // workers,
    )


def _places(node: NodeMemory, cpus: int, on_gpu: bool) -> int:
    return min(node.cpus // cpus, node.gpus) if on_gpu else node.cpus // cpus


def _no_room(sizes: list[Size], sweep: SweepConfig, node: NodeMemory) -> list[Problem]:
    """What keeps trials from starting, from running together, or from surviving."""
    problems = []
    for size in sizes:
        name, on_gpu = size.label or "a trial", size.gpus_per_worker > 0
        if not size.at_once:
            problems.append(
                Problem(
                    "error",
                    f"{name} needs {size.num_workers} workers × {size.cpus_per_worker} CPU and {size.gpus_per_worker} "
                    f"GPU, but there are {node.cpus} CPU and {node.gpus} GPU: it would wait for ever",
                )
            )
            continue
        if size.memory is None or (on_gpu and not node.gpu_memory_bytes):
            if on_gpu:
                problems.append(Problem("warning", f"{name}: give --gpu-memory-gib to check that it fits the GPU"))
            continue
        holds = workers_on(node, size.memory, size.cpus_per_worker, on_gpu)
        wanted = min(size.at_once, sweep.max_concurrent or size.at_once, size.trials or size.at_once)
        each, has = f"{_gib(size.memory.peak)} each", f"{_gib(node.memory_bytes)}"
        if on_gpu:
            each = f"{_gib(size.memory.peak)} of GPU and {_gib(size.memory.host)} of host memory each"
            has = f"{_gib(node.gpu_memory_bytes)} a GPU and {has}"
        if holds < size.num_workers:
            problems.append(
                Problem(
                    "error",
                    f"{name} does not fit in memory: {size.num_workers} workers take {each}, and of {has} "
                    f"{SAFETY:.0%} may be filled; use scaling: auto, model.gradient_checkpointing, model.lora or a "
                    "smaller train.max_tokens_per_micro_batch",
                )
            )
        elif holds < wanted * size.num_workers:
            at_once = holds // size.num_workers
            problems.append(
                Problem(
                    "error",
                    f"{name}: {wanted} trials would train at once, and memory holds {at_once} ({size.num_workers} "
                    f"workers a trial take {each}, and of {has} {SAFETY:.0%} may be filled): use scaling: auto, or "
                    f"sweep.max_concurrent={at_once}",
                )
            )
    apart = [
        f"{a.label} and {b.label}"
        for number, a in enumerate(sizes)
        for b in sizes[number + 1 :]
        if a.at_once and b.at_once and not _together(a, b, node)
    ]
    if apart and sweep.max_concurrent != 1:
        problems.append(
            Problem(
                "warning",
                f"{'; '.join(apart)} have no room at the same time: they train in turn, and each time groups of one "
                "must end before one of the other starts",
            )
        )
    return problems


def _together(a: Size, b: Size, node: NodeMemory) -> bool:
    cpus = sum(size.num_workers * size.cpus_per_worker for size in (a, b))
    return cpus <= node.cpus and sum(size.num_workers * size.gpus_per_worker for size in (a, b)) <= node.gpus


def _too_short(sizes: list[Size], sweep: SweepConfig) -> list[Problem]:
    """A scheduler that can stop nothing, a budget that pays for nothing."""
    problems = []
    fewest = min((size.trials for size in sizes if size.trials is not None), default=None)
    match sweep.scheduler:
        case AshaConfig(reduction_factor=needed):
            what = "asha keeps one in"
        case MedianConfig(min_trials=needed):
            what = "median compares with at least"
        case _:
            needed, what = 0, ""
    if fewest is not None and fewest < needed:
        problems.append(
            Problem(
                "warning",
                f"{what} {needed:g} trials of a size, and there are {fewest}: nothing would be stopped early",
            )
        )
    cheapest = min(
        (size.seconds_per_trial * size.num_workers / 3600 for size in sizes if size.seconds_per_trial is not None),
        default=None,
    )
    if sweep.budget is not None and cheapest is not None and cheapest > sweep.budget.device_hours:
        problems.append(
            Problem(
                "error",
                f"sweep.budget of {sweep.budget.device_hours:g} device-hours is below one trial of the cheapest size "
                f"({cheapest:.2g}): raise it, or shorten trials",
            )
        )
    return problems


def _share(size: Size, sweep: SweepConfig, sizes: list[Size]) -> int:
    """Trials of a size; an equal share where the searcher decides."""
    return -(-sweep.num_trials // len(sizes)) if size.trials is None else size.trials


def _wall_hours(sizes: list[Size], sweep: SweepConfig) -> float | None:
    """Sizes one after another, each on the whole cluster: what is lost at their ends, sizes side by side win back."""
    hours = 0.0
    for size in sizes:
        if size.seconds_per_trial is None or not size.at_once:
            return None
        lanes = min(size.at_once, sweep.max_concurrent or size.at_once)
        rounds = _share(size, sweep, sizes) / lanes
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
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _sum(numbers: list[Any]) -> Any:
    """None where a number is not known."""
    return None if any(number is None for number in numbers) else sum(numbers)


def _times(number: int | None, by: int) -> int | None:
    return None if number is None else number * by
