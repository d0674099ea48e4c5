"""Commands that show what sweeps found: `report`, `watch`, `compare` and `transfer`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_ray.cli.command import Commands, add_command

if TYPE_CHECKING:
    from rich.console import Console


def add_report(commands: Commands) -> None:
    """Declare `report`."""
    report = add_command(commands, "report", _report, "Write the report of a sweep, finished or still running.")
    report.add_argument(
        "run_dir", metavar="NAME", help="name of the sweep, its run directory (runs/NAME) or s3://.../NAME"
    )
    report.add_argument("--output-dir", default="runs", help="where sweeps were run (default: runs)")
    report.add_argument(
        "--format",
        action="append",
        choices=("html", "md", "png", "csv"),
        help="what to write; may be given more than once (default: html and md)",
    )


def add_watch(commands: Commands) -> None:
    """Declare `watch`."""
    watch = add_command(
        commands, "watch", _watch, "Follow a running sweep in the terminal; stop one trial, or the sweep."
    )
    watch.add_argument("name", help="name of the sweep, or its run directory")
    watch.add_argument("--output-dir", default="runs", help="where the sweep runs (default: runs)")
    watch.add_argument(
        "--address", help="Ray cluster it runs on: ray://HEAD:10001, HOST:PORT or auto (default: this machine)"
    )
    form = watch.add_mutually_exclusive_group()
    form.add_argument("--once", action="store_true", help="print one frame and exit; needs no terminal")
    form.add_argument("--json", action="store_true", help="print the sweep's state as one JSON object and exit")


def add_compare(commands: Commands) -> None:
    """Declare `compare`."""
    compare = add_command(commands, "compare", _compare, "Compare two sweeps or two runs: settings, metrics, cost.")
    for side in ("a", "b"):
        compare.add_argument(side, metavar=side.upper(), help="run directory, name, NAME/TRIAL_ID, or MLflow run id")
    compare.add_argument("--metric", help="held-out metric to compare by (default: the metric that ranks both)")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument("--format", choices=("text", "md"), default="text", help="text (default) or Markdown")
    compare.add_argument(
        "--output-dir", type=Path, default=Path("runs"), help="where names are looked up (default: runs)"
    )
    compare.add_argument("--tracking-uri", help="read both from this MLflow server instead of run directories")
    compare.add_argument("--experiment", help="MLflow experiment to search (default: all)")


def add_transfer(commands: Commands) -> None:
    """Declare `transfer`."""
    transfer = add_command(
        commands,
        "transfer",
        _transfer,
        "Predict lr and λ of a larger model from sweeps over smaller sizes, if they can be.",
    )
    transfer.add_argument(
        "runs", metavar="RUN", nargs="+", help="run directory or name; the sizes of several are taken together"
    )
    transfer.add_argument("--metric", help="held-out metric to judge by (default: the metric that ranks the sweeps)")
    transfer.add_argument(
        "--parameters",
        type=float,
        action="append",
        metavar="N",
        help="model size to predict for; may be given more than once (default: 1.3e9 and 7e9)",
    )
    transfer.add_argument("--to", type=Path, metavar="DIR", help="folder for the page (default: RUN_DIR/transfer)")
    transfer.add_argument(
        "--output-dir", type=Path, default=Path("runs"), help="where names are looked up (default: runs)"
    )
    transfer.add_argument("--tracking-uri", help="read the sweeps from this MLflow server instead of run directories")


def _report(arguments: argparse.Namespace, console: Console) -> int:
    from orpo_ray.reports import report
    from orpo_ray.storage import find, results

    run_dir = find.find_run_dir(arguments.run_dir, arguments.output_dir)
    files = report.write_report(run_dir, formats=arguments.format or ("html", "md"))
    console.print(report.results_table(results.current(run_dir)))
    for file in files:
        console.print(str(file), soft_wrap=True)
    return 0


def _watch(arguments: argparse.Namespace, console: Console) -> int:
    from orpo_ray.reports import watch, watch_view

    with watch.opened(arguments.name, arguments.output_dir, arguments.address) as source:
        if arguments.json:
            print(watch_view.current(source).to_json())
        elif arguments.once:
            watch_view.once(source, console)
        else:
            watch_view.live(source, console)
    return 0


def _compare(arguments: argparse.Namespace, console: Console) -> int:
    with console.status("comparing"):
        from orpo_ray.reports.comparison import comparison_markdown, comparison_view
        from orpo_ray.results.compare import compare_runs

        compared = compare_runs(
            arguments.a,
            arguments.b,
            arguments.metric,
            output_dir=arguments.output_dir,
            tracking_uri=arguments.tracking_uri,
            experiment=arguments.experiment,
        )
    if arguments.json:
        print(compared.to_json())
    elif arguments.format == "md":
        print(comparison_markdown(compared), end="")
    else:
        console.print(comparison_view(compared))
        if compared.compare_page:
            console.print(f"\nMLflow     {compared.compare_page}", soft_wrap=True, markup=False)
    return 0


def _transfer(arguments: argparse.Namespace, console: Console) -> int:
    import shlex

    with console.status("fitting"):
        from orpo_ray.reports import transfer_page
        from orpo_ray.results import transfer
        from orpo_ray.results.runs import read_sweep

        records = [
            read_sweep(run, tracking_uri=arguments.tracking_uri, output_dir=arguments.output_dir)
            for run in arguments.runs
        ]
        sizes = tuple(arguments.parameters or transfer.TARGETS)
        evidence, found = transfer_page.study(records, arguments.metric, sizes)
    folder = arguments.to or (records[0].run_dir or arguments.output_dir / records[0].name) / "transfer"
    command = ["orpo-ray", "transfer", *(record.name for record in records)]
    command += ["--metric", arguments.metric] if arguments.metric else []
    command += [text for size in arguments.parameters or () for text in ("--parameters", f"{size:g}")]
    page = transfer_page.write(folder, evidence, found, shlex.join(command))
    console.print(transfer_page.table(found))
    console.print(f"page       {page}", soft_wrap=True)
    return 0
