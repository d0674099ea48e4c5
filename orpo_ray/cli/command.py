"""Declare one command of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run: TypeAlias = "Callable[[argparse.Namespace, Console], int]"
"""Runs a command with its arguments; returns the exit code."""


def add_command(commands: Commands, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """Add a command; `text` says what it does, in the list of commands and in its own help."""
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def add_file_command(commands: Commands, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """Like `add_command`, for a command that takes an experiment file and overrides."""
    command = add_command(commands, name, run, text)
    command.add_argument("file", type=Path, help="experiment file (YAML)")
    command.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="settings to change, e.g. optim.lr=1e-5"
    )
    return command


def add_num_cpus(command: argparse.ArgumentParser) -> None:
    """Add the option of commands that start a local Ray cluster."""
    command.add_argument("--num-cpus", type=int, help="CPUs of the local Ray cluster (default: all)")
