"""`orpo-ray export`: write the best model of a sweep as a folder that transformers loads."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_ray.cli.command import Commands, add_command

if TYPE_CHECKING:
    from rich.console import Console


def add_export(commands: Commands) -> None:
    """Declare `export`."""
    export = add_command(
        commands, "export", _export, "Write a sweep's best model for transformers, check it, register it in MLflow."
    )
    export.add_argument(
        "source",
        metavar="RUN",
        help="run directory, name or s3://.../NAME of a sweep (its best trial is exported); a trial's directory; or an "
        "MLflow run id",
    )
    export.add_argument("--to", type=Path, metavar="DIR", help="folder to write (default: RUN_DIR/export/TRIAL_ID)")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the weights (default: float32)"
    )
    export.add_argument("--name", help="name of the registered model in MLflow (default: the sweep's name)")
    export.add_argument("--no-register", action="store_true", help="do not register the model in MLflow")
    export.add_argument("--tracking-uri", help="MLflow tracking URI (default: where the sweep logged)")
    export.add_argument("--no-check", action="store_true", help="do not evaluate the exported model")


def _export(arguments: argparse.Namespace, console: Console) -> int:
    from orpo_ray.results import export, export_source

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    candidate = export_source.find(arguments.source, arguments.tracking_uri)
    with console.status(f"exporting trial {candidate.trial['trial_id']}"):
        exported = export.export(candidate, arguments.to, arguments.dtype, check=not arguments.no_check)
    if (check := exported.check) is not None:
        console.print(check.table())
        if not check.passed:
            reason = check.problem or "the exported model does not give the numbers that the run logged"
            if arguments.dtype != "float32":
                reason += " (rounding its weights may move them so far: try --dtype float32)"
            console.print(f"{reason}; the model was not registered; {exported.folder} is kept", style="red")
            return 1
    console.print(f"model      {exported.folder}", soft_wrap=True)
    if not arguments.no_register:
        made = export.register(candidate, exported, arguments.name, arguments.tracking_uri)
        known = "" if made.is_new else " (registered before)"
        console.print(f"registered {made.uri}, version {made.version}{known}", soft_wrap=True, markup=False)
    return 0
