"""The command line, `orpo-ray COMMAND`: the parser, and errors as messages and exit codes.

One module per group of commands declares their options beside the functions that run them. These functions import what
they need themselves, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse

from orpo_ray.cli import cluster, export, plan, run, view
from orpo_ray.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; by default those of the process.

    Returns:
        0 done; 1 no trial finished, or a requirement is not met; 2 the input is wrong; 130 interrupted. For `submit`:
        0 the job succeeded, 1 it failed, 2 it could not be submitted, 3 it was stopped, 4 the connection to the cluster
        was lost, 130 Ctrl-C ended following the job (the job continues).
    """
    arguments = parser().parse_args(argv)
    from rich.console import Console

    console = Console(highlight=False)
    try:
        return int(arguments.run(arguments, console))
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command continues where this one stopped", style="yellow")
        return 130
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
        return 2


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it returns has `run`, the function that takes it and a console."""
    found = argparse.ArgumentParser(
        prog="orpo-ray", description="ORPO preference tuning: which λ, which learning rate, which model size?"
    )
    commands = found.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        *(run.add_train, run.add_sweep, plan.add_plan, cluster.add_submit, view.add_report, view.add_watch),
        *(export.add_export, view.add_compare, run.add_reproduce, view.add_transfer, cluster.add_doctor),
    ):
        add(commands)
    return found
