"""orpo-ray: train, sweep, plan, report, doctor. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from orpo_ray.config import ExperimentConfig


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 done; 1 no trial finished, or something needed is missing; 2 the input is wrong; 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    from rich.console import Console

    console = Console(highlight=False)
    try:
        return int(arguments.run(arguments, console))
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command continues where this one stopped", style="yellow")
        return 130
    except Exception as error:
        if not _is_users_to_mend(error):
            raise
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
        return 2


def _is_users_to_mend(error: Exception) -> bool:
    """Whether the message is all a user needs; anything else is a bug and shows its traceback."""
    names = {
        "ConfigError",
        "DataError",
        "ModelError",
        "SweepError",
        "ClusterError",
        "TrackingError",
        "FileNotFoundError",
    }
    return type(error).__name__ in names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orpo-ray", description="ORPO preference tuning: which λ, which learning rate, which model size?"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, overrides: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if overrides:
            sub.add_argument("file", type=Path, help="experiment file (YAML)")
            sub.add_argument(
                "overrides", nargs="*", metavar="key.path=value", help="settings to change, e.g. optim.lr=1e-5"
            )
        return sub

    train = command("train", _train, "Train once with the settings of FILE; a sweep section in it is left out.")
    sweep = command("sweep", _sweep, "Run the sweep of FILE, or continue it where it was interrupted.")
    for sub in (train, sweep):
        sub.add_argument("--num-cpus", type=int, help="CPUs of the local Ray cluster (default: all)")
    plan = command("plan", _plan, "Show what FILE would run, after checking every candidate; starts nothing.")
    plan.add_argument("--json", action="store_true", help="machine-readable")
    plan.add_argument("--num-cpus", type=int, help="CPUs to plan for (default: this machine's)")
    plan.add_argument("--num-gpus", type=int, help="GPUs to plan for (default: this machine's)")
    plan.add_argument("--memory-gib", type=float, help="memory to plan for (default: this machine's)")
    plan.add_argument("--gpu-memory-gib", type=float, help="memory of each GPU (default: this machine's)")
    plan.add_argument(
        "--flops-per-second", type=float, help="of a worker's matrix products (default: this machine's CPUs, measured)"
    )
    report = command("report", _report, "Tables and plots of a finished sweep, or of one under way.", overrides=False)
    report.add_argument("run_dir", type=Path, help="run directory, e.g. runs/quickstart")
    doctor = command("doctor", _doctor, "Check versions, accelerator, compiler, Ray and MLflow.", overrides=False)
    doctor.add_argument("--tracking-uri", help="MLflow tracking URI to check (default: where a sweep would log)")
    return parser


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
        from orpo_ray import cluster, mlflow_uri, progress, report, sweep
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it makes
    _, settings = config.as_sweep()
    num_trials = settings.num_trials + settings.num_confirmations
    display = progress.SweepProgress(console, settings.metric, num_trials)
    with cluster.connected(num_cpus), display:
        outcome = sweep.run(config, display)
    console.print(report.results_table(outcome.results))
    best = outcome.results["best"]
    if best is not None:
        from orpo_ray.space import describe

        value = best["metrics"][settings.metric]
        console.print(f"\nbest       [bold green]{describe(best['params'])}[/]   {settings.metric} {value:.4f}")
        if best["checkpoint"]:
            console.print(f"checkpoint {best['checkpoint']}", soft_wrap=True)
    console.print(f"results    {outcome.run_dir / 'results.json'}", soft_wrap=True)
    console.print(f"report     {outcome.run_dir / 'report.md'}, plots in {outcome.run_dir / 'plots'}", soft_wrap=True)
    console.print(f"MLflow     {mlflow_uri.ui_command(outcome.tracking_uri)}", soft_wrap=True, markup=False)
    if outcome.undelivered:
        console.print(
            f"{outcome.undelivered} events have not reached MLflow; the same command delivers them", style="yellow"
        )
    failed = sum(trial["status"] == "failed" for trial in outcome.results["trials"])
    if failed:
        console.print(
            f"{failed} trials failed, for the reasons in the table; they are not tried again under this name",
            style="yellow",
        )
    if outcome.interrupted:
        console.print("interrupted; the same command continues where this one stopped", style="yellow")
        return 130
    return 0 if best is not None else 1


def _plan(arguments: argparse.Namespace, console: Console) -> int:
    from dataclasses import replace

    from orpo_ray import plan
    from orpo_ray.config import load

    given = {"cpus": arguments.num_cpus, "gpus": arguments.num_gpus}
    for name, gib in (("memory_bytes", arguments.memory_gib), ("gpu_memory_bytes", arguments.gpu_memory_gib)):
        given[name] = None if gib is None else int(gib * 2**30)
    node = replace(plan.this_machine(), **{name: value for name, value in given.items() if value is not None})
    planned = plan.plan(load(arguments.file, arguments.overrides), node, arguments.flops_per_second)
    if arguments.json:
        print(planned.to_json())
    else:
        console.print(planned)
    return 0 if planned.possible else 1


def _report(arguments: argparse.Namespace, console: Console) -> int:
    from orpo_ray import report, results

    files = report.write_report(arguments.run_dir)
    console.print(report.results_table(results.current(arguments.run_dir)))
    for file in files:
        console.print(str(file), soft_wrap=True)
    return 0


def _doctor(arguments: argparse.Namespace, console: Console) -> int:
    from orpo_ray import cluster, mlflow_uri

    findings = cluster.doctor(mlflow_uri.resolve_uri(arguments.tracking_uri, Path("runs")))
    for finding in findings:
        mark = "[green]ok[/]     " if finding.ok else "[red]problem[/]"
        console.print(f"{mark} [bold]{finding.name}[/]: {finding.detail}", soft_wrap=True)
    return 0 if all(finding.ok for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
