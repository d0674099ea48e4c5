"""`orpo-ray plan`: what an experiment would run, and whether it fits."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from orpo_ray.cli.command import Commands, add_file_command

if TYPE_CHECKING:
    from rich.console import Console


def add_plan(commands: Commands) -> None:
    """Declare `plan`."""
    plan = add_file_command(
        commands, "plan", _plan, "Show what FILE would run, after checking every candidate; starts nothing."
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--num-cpus", type=int, help="CPUs to plan for (default: this machine's)")
    plan.add_argument("--num-gpus", type=int, help="GPUs to plan for (default: this machine's)")
    plan.add_argument("--memory-gib", type=float, help="memory to plan for, in GiB (default: this machine's)")
    plan.add_argument("--gpu-memory-gib", type=float, help="memory of each GPU, in GiB (default: this machine's)")
    plan.add_argument(
        "--flops-per-second",
        type=float,
        help="matrix-multiplication speed of one worker (default: measured on this machine's CPUs)",
    )


def _plan(arguments: argparse.Namespace, console: Console) -> int:
    from dataclasses import replace

    from orpo_ray import hardware
    from orpo_ray.config import load
    from orpo_ray.planning import plan
    from orpo_ray.planning.plan_table import plan_table

    given = {"cpus": arguments.num_cpus, "gpus": arguments.num_gpus}
    for name, gib in (("memory_bytes", arguments.memory_gib), ("gpu_memory_bytes", arguments.gpu_memory_gib)):
        given[name] = None if gib is None else int(gib * 2**30)
    node = replace(hardware.this_machine(), **{name: value for name, value in given.items() if value is not None})
    planned = plan.plan(load(arguments.file, arguments.overrides), node, arguments.flops_per_second)
    if arguments.json:
        print(planned.to_json())
    else:
        console.print(plan_table(planned))
    return 0 if planned.possible else 1
