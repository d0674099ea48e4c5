"""Commands that train: `train`, `sweep` and `reproduce`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_ray.cli.command import Commands, add_command, add_file_command, add_num_cpus
from orpo_ray.storage.events import Status

if TYPE_CHECKING:
    from rich.console import Console

    from orpo_ray.config import ExperimentConfig


def add_train(commands: Commands) -> None:
    """Declare `train`."""
    train = add_file_command(
        commands, "train", _train, "Train once with the settings of FILE; a sweep section in it is ignored."
    )
    add_num_cpus(train)


def add_sweep(commands: Commands) -> None:
    """Declare `sweep`."""
    sweep = add_file_command(
        commands, "sweep", _sweep, "Run the sweep of FILE, or continue it where it was interrupted."
    )
    add_num_cpus(sweep)


def add_reproduce(commands: Commands) -> None:
    """Declare `reproduce`."""
    reproduce = add_command(
        commands, "reproduce", _reproduce, "Reproduce the ORPO paper: train, sample, judge, and write one page."
    )
    reproduce.add_argument("what", choices=("paper",))
    reproduce.add_argument(
        "--scale",
        choices=("tiny", "small", "full"),
        default="tiny",
        help="tiny (default): 2 CPU cores, 10 minutes, or 25 with a --model of 135M; small: OPT-125M on a GPU; full: "
        "OPT-1.3B as in the paper",
    )
    reproduce.add_argument("--model", help="start from this model: folder or hub name (tiny: trained with LoRA)")
    reproduce.add_argument("--data", help="preference pairs: file or hub name (default: the scale's)")
    reproduce.add_argument(
        "--seed", type=int, default=0, help="training seed; the page shows the seeds run before as well (default: 0)"
    )
    reproduce.add_argument(
        "--output-dir", type=Path, default=Path("runs"), help="where its folder is created (default: runs)"
    )
    add_num_cpus(reproduce)


def _train(arguments: argparse.Namespace, console: Console) -> int:
    from orpo_ray.config import load

    return _run(load(arguments.file, [*arguments.overrides, "sweep=null"]), arguments.num_cpus, console)


def _sweep(arguments: argparse.Namespace, console: Console) -> int:
    from orpo_ray.config import ConfigError, load

    config = load(arguments.file, arguments.overrides)
    if config.sweep is None:
        raise ConfigError(f"{arguments.file} has no sweep section; use orpo-ray train, or add one")
    return _run(config, arguments.num_cpus, console)


def _run(config: ExperimentConfig, num_cpus: int | None, console: Console) -> int:
    with console.status("starting Ray"):
        from orpo_ray.orchestration import ray_session, sweep
        from orpo_ray.provenance import without_password
        from orpo_ray.reports import live_state, progress, report
        from orpo_ray.tracking import uri as mlflow_uri
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs every table it creates
    about = live_state.about_sweep(config, "", config.run_dir)
    display = progress.SweepProgress(console, about)
    with ray_session.connected(num_cpus), display:
        outcome = sweep.run(config, display)
    console.print(report.results_table(outcome.results))
    best = outcome.results["best"]
    if best is not None:
        from orpo_ray.config.space import describe

        value = best["metrics"][about.metric]
        console.print(f"\nbest       [bold green]{describe(best['params'])}[/]   {about.metric} {value:.4f}")
        if best["checkpoint"]:
            console.print(f"checkpoint {best['checkpoint']}", soft_wrap=True)
    console.print(f"results    {outcome.run_dir / 'results.json'}", soft_wrap=True)
    console.print(f"report     {outcome.run_dir / 'report.html'}", soft_wrap=True)
    shown = without_password(mlflow_uri.ui_command(outcome.tracking_uri))
    console.print(f"MLflow     {shown}", soft_wrap=True, markup=False)
    if outcome.undelivered:
        console.print(
            f"{outcome.undelivered} events have not reached MLflow; run the same command again to deliver them",
            style="yellow",
        )
    failed = sum(trial["status"] == Status.FAILED for trial in outcome.results["trials"])
    if failed:
        console.print(
            f"{failed} trials failed, for the reasons in the table; they are not tried again under this name",
            style="yellow",
        )
        logs = outcome.run_dir / "logs"
        console.print(f"logs       {logs}/*.jsonl on the nodes, by trial_id", soft_wrap=True)
    if outcome.interrupted:
        console.print("interrupted; the same command continues where this one stopped", style="yellow")
        return 130
    return 0 if best is not None else 1


def _reproduce(arguments: argparse.Namespace, console: Console) -> int:
    import shlex

    with console.status("starting Ray"):
        from transformers.utils import logging as transformers_logging

        from orpo_ray.orchestration import ray_session
        from orpo_ray.reproduction import page as reproduction_page
        from orpo_ray.reproduction import run as reproduce
        from orpo_ray.reproduction import scales
        from orpo_ray.reproduction.workspace import Workspace
    transformers_logging.disable_progress_bar()  # one per model loaded, dozens in all, each for a second
    transformers_logging.set_verbosity_error()  # it would warn that a reward model's head is untrained
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    scale = scales.scale(arguments.scale, arguments.model, arguments.data, arguments.seed)
    name = f"paper-{scale.name}" + (f"-{Path(arguments.model).name}" if arguments.model else "")
    name += f"-seed-{scale.seed}" if scale.seed else ""
    workspace = Workspace(arguments.output_dir.expanduser().absolute() / name, scale)
    with ray_session.connected(arguments.num_cpus):
        result = reproduce.run(workspace, console)
    command = ["orpo-ray", "reproduce", "paper", "--scale", scale.name]
    for option in ("model", "data"):
        if (given := getattr(arguments, option)) is not None:
            command += [f"--{option}", Path(given).name if Path(given).exists() else given]
    command += ["--seed", str(scale.seed)] if scale.seed else []
    others = workspace.results_of_other_seeds()
    page = reproduction_page.write(workspace.folder / "page", result, shlex.join(command), others)
    for claim in reproduction_page.claims(result):
        console.print(f"{claim.verdict:<12} {claim.text}: {claim.ours} ({claim.interval})", soft_wrap=True)
    console.print(f"\npage       {page}", soft_wrap=True)
    return 0
