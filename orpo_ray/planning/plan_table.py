"""A plan as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orpo_ray.config.space import describe
from orpo_ray.formatting import GIB, byte_size, gib, rough_duration
from orpo_ray.planning.fit import SAFETY
from orpo_ray.planning.plan import Plan
from orpo_ray.planning.sizes import MEASURED, Size

_STYLE: dict[str, Any] = {"title_justify": "left", "box": None, "padding": (0, 2, 0, 0)}
_SHOWN_CELLS = 16


def plan_table(plan: Plan) -> RenderableType:
    """Sizes, totals, problems and search space of a plan."""
    parts: list[RenderableType] = [_heading(plan), _sizes(plan.sizes), _totals(plan)]
    for problem in plan.problems:
        style = "red" if problem.kind == "error" else "yellow"
        parts.append(Padding(Text(f"{problem.kind}: {problem.text}", style=style), (1, 0, 0, 0)))
    return Group(*parts, *_search_space(plan))


def _search_space(plan: Plan) -> list[RenderableType]:
    if not plan.axes:
        return []
    axes = Table("axis", "values", title="\nsearch space", **_STYLE)
    for name, values in plan.axes.items():
        axes.add_row(name, values)
    if not plan.cells:
        return [axes]
    drawn = [name for name, values in plan.axes.items() if values.startswith(("uniform", "loguniform", "one of"))]
    title = f"grid cells ({', '.join(drawn)} drawn for each trial)" if drawn else "trials"
    body = "\n".join(f"  {describe(cell)}" for cell in plan.cells[:_SHOWN_CELLS])
    more = len(plan.cells) - _SHOWN_CELLS
    return [axes, Text(f"\n{title}\n{body}" + (f"\n  ... {more} more" if more > 0 else ""))]


def _heading(plan: Plan) -> Text:
    length = f"{plan.steps_per_trial} steps" if plan.steps_per_trial else "by epochs"
    more = f" ({plan.confirmations} of them to confirm the best)" if plan.confirmations else ""
    gpus = f", {plan.gpus} GPU" + (f" of {gib(plan.gpu_memory_bytes)}" if plan.gpu_memory_bytes else "")
    return Text.assemble(
        (f"{plan.name}: {plan.trials} {'trial' if plan.trials == 1 else 'trials'}", "bold"),
        f"{more}, each {length}; {plan.concurrent} at once on {plan.cpus} CPU{gpus}, {gib(plan.memory_bytes)}\n",
    )


def _sizes(sizes: list[Size]) -> Table:
    table = Table(**_STYLE)
    table.add_column("size")
    for column in ("trials", "params", "workers", "ZeRO", "tokens/pass", "GiB each", "ckpt", "s/step", "device-h"):
        table.add_column(column, no_wrap=True, justify="right")
    for size in sizes:
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
            "?" if size.checkpoint_bytes is None else byte_size(size.checkpoint_bytes),
            "?" if size.seconds_per_step is None else f"{size.seconds_per_step:.2g}",
            "?" if size.device_hours is None else f"{size.device_hours:.2g}",
        )
    return table


def _totals(plan: Plan) -> Text:
    is_measured = all(size.time_basis == MEASURED for size in plan.sizes)
    tolerance = "" if is_measured else " (± a factor of 2)"
    wall = "not known" if plan.wall_hours is None else f"{rough_duration(plan.wall_hours)}{tolerance}"
    hours = "?" if plan.device_hours is None else f"{plan.device_hours:.2g}"
    disk = "?" if plan.checkpoint_bytes is None else byte_size(plan.checkpoint_bytes)
    bases = "; ".join(dict.fromkeys(size.time_basis for size in plan.sizes if size.time_basis))
    accuracy = "predicted within 15 % on CPUs" if not plan.gpus else "predicted; not checked on GPUs"
    return Text(
        f"\nwall time    {wall}, {hours} device-hours, without early stopping"
        f"\n             {bases}"
        f"\n             {plan.pair_tokens.basis}"
        f"\nmemory       GiB of each worker are {accuracy}; at most {SAFETY:.0%} of a memory is filled"
        f"\ncheckpoints  {disk} in total, {byte_size(plan.free_disk_bytes)} free"
    )
