"""orpo-ray: train, sweep, watch, plan, report, doctor. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_ray.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from orpo_ray.config import ExperimentConfig


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 done; 1 no trial finished, or something needed is missing; 2 the input is wrong; 130 interrupted. Of `submit`:
        0 the job succeeded, 1 it failed, 2 it could not be sent, 3 it was stopped, 4 the cluster was lost sight of, 130
        no longer followed by Ctrl-C (the job goes on).
    """
    arguments = _parser().parse_args(argv)
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
    submit = command("submit", _submit, "Run FILE as a job of a Ray cluster, or follow the job that runs it already.")
    submit.description = _SUBMIT_HELP
    submit.formatter_class = argparse.RawDescriptionHelpFormatter
    submit.add_argument(
        "--address",
        help="of the job server: http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265)",
    )
    submit.add_argument(
        "--working-dir",
        type=Path,
        default=Path(),
        help="goes to every node; holds FILE (default: the current directory)",
    )
    submit.add_argument("--python", default="python", help="interpreter on the head node (default: python)")
    then = submit.add_mutually_exclusive_group()
    then.add_argument("--no-wait", action="store_true", help="do not follow the job, leave once it is submitted")
    then.add_argument("--stop", action="store_true", help="stop the job that runs FILE, as Ctrl-C stops a local sweep")
    report = command("report", _report, "Report on a sweep that has ended, or on one under way.", overrides=False)
    report.add_argument("run_dir", metavar="NAME", help="of the sweep, its run directory (runs/NAME), or s3://.../NAME")
    report.add_argument("--output-dir", default="runs", help="where sweeps were run (default: runs)")
    report.add_argument(
        "--format",
        action="append",
        choices=("html", "md", "png", "csv"),
        help="what to write; may be given more than once (default: html and md)",
    )
    watch = command("watch", _watch, "Follow a running sweep in the terminal; stop a trial, or all.", overrides=False)
    watch.add_argument("name", help="name of the sweep, or its run directory")
    watch.add_argument("--output-dir", default="runs", help="where the sweep runs (default: runs)")
    watch.add_argument("--address", help="Ray cluster it runs on: ray://HEAD:10001, HOST:PORT or auto (default: here)")
    form = watch.add_mutually_exclusive_group()
    form.add_argument("--once", action="store_true", help="print one frame, needs no terminal")
    form.add_argument("--json", action="store_true", help="print what is known as one JSON object")
    export = command("export", _export, "Write a sweep's best model for transformers, check it, register it.", False)
    export.add_argument(
        "source",
        metavar="RUN",
        help="run directory, name or s3://.../NAME (its best trial); a trial's directory; MLflow run id",
    )
    export.add_argument("--to", type=Path, metavar="DIR", help="folder to write (default: RUN_DIR/export/TRIAL_ID)")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    export.add_argument("--name", help="registered model in MLflow (default: the sweep's name)")
    export.add_argument("--no-register", action="store_true", help="leave MLflow alone")
    export.add_argument("--tracking-uri", help="MLflow tracking URI (default: where the sweep logged)")
    export.add_argument("--no-check", action="store_true", help="do not evaluate what was written")
    compare = command("compare", _compare, "Two sweeps or two runs side by side: settings, metrics, cost.", False)
    for side in ("a", "b"):
        compare.add_argument(side, metavar=side.upper(), help="run directory, name, NAME/TRIAL_ID, or MLflow run id")
    compare.add_argument("--metric", help="held-out metric to compare by (default: the one both are judged by)")
    compare.add_argument("--json", action="store_true", help="machine-readable")
    compare.add_argument("--format", choices=("text", "md"), default="text", help="text (default) or Markdown")
    compare.add_argument("--output-dir", type=Path, default=Path("runs"), help="where names are looked up (runs)")
    compare.add_argument("--tracking-uri", help="read both from this MLflow, not from run directories")
    compare.add_argument("--experiment", help="MLflow experiment to look in (default: all)")
    again = command("reproduce", _reproduce, "Reproduce the ORPO paper: train, sample, judge, one page.", False)
    again.add_argument("what", choices=("paper",))
    again.add_argument(
        "--scale",
        choices=("tiny", "small", "full"),
        default="tiny",
        help="tiny: 2 CPU cores, 10 minutes, or 25 with a --model of 135M (default); small: OPT-125M on a GPU; full: "
        "OPT-1.3B as in the paper",
    )
    again.add_argument("--model", help="start from this model: folder or hub name (tiny: trained with LoRA)")
    again.add_argument("--data", help="preference pairs: file or hub name (default: the scale's)")
    again.add_argument("--seed", type=int, default=0, help="another one: the page shows those done before, too (0)")
    again.add_argument("--output-dir", type=Path, default=Path("runs"), help="where its folder is made (runs)")
    again.add_argument("--num-cpus", type=int, help="CPUs of the local Ray cluster (default: all)")
    transfer = command("transfer", _transfer, "From sweeps over sizes: a larger model's lr and λ, if any.", False)
    transfer.add_argument("runs", metavar="RUN", nargs="+", help="run directory or name; several: sizes of all of them")
    transfer.add_argument("--metric", help="held-out metric to judge by (default: the one the sweeps are judged by)")
    transfer.add_argument(
        "--parameters",
        type=float,
        action="append",
        metavar="N",
        help="size asked about; may be given more than once (default: 1.3e9 and 7e9)",
    )
    transfer.add_argument("--to", type=Path, metavar="DIR", help="folder for the page (default: RUN_DIR/transfer)")
    transfer.add_argument("--output-dir", type=Path, default=Path("runs"), help="where names are looked up (runs)")
    transfer.add_argument("--tracking-uri", help="read the sweeps from this MLflow, not from run directories")
    doctor = command("doctor", _doctor, "Check this machine, or every node of a cluster; say what to do.", False)
    doctor.add_argument("--tracking-uri", help="MLflow tracking URI to check (default: where a sweep would log)")
    doctor.add_argument(
        "--address", help="check every node of a cluster: HOST:PORT, auto or ray://HEAD:10001 (default: RAY_ADDRESS)"
    )
    doctor.add_argument("--storage", help="check that this URI or folder is seen alike by every node")
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    return parser


_SUBMIT_HELP = """\
Run FILE as a job of a Ray cluster: its sweep, or a single run where it has none. Where a job of the same sweep waits or
runs, that one is followed; where an earlier one has ended, the sweep continues.

With it go the working directory (without what .gitignore and .rayignore name, results, weights, caches), this very
orpo_ray, and the variables MLFLOW_TRACKING_URI, HF_HUB_OFFLINE, AWS_ENDPOINT_URL and their like. Secrets do not:
whoever may use the cluster can read a job's environment. Set HF_TOKEN, MLFLOW_TRACKING_PASSWORD and AWS keys on the
nodes.

A cluster with token authentication needs RAY_AUTH_MODE=token here, and RAY_AUTH_TOKEN or ~/.ray/auth_token.

Exit code: 0 the job succeeded, 1 it failed, 2 it could not be sent, 3 it was stopped, 4 the cluster was lost sight of,
130 Ctrl-C: the job goes on.
"""


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
        from orpo_ray.reports import progress, report
        from orpo_ray.tracking import uri as mlflow_uri
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it makes
    _, settings = config.as_sweep()
    num_trials = settings.num_trials + settings.num_confirmations
    display = progress.SweepProgress(console, settings.metric, num_trials)
    with ray_session.connected(num_cpus), display:
        outcome = sweep.run(config, display)
    console.print(report.results_table(outcome.results))
    best = outcome.results["best"]
    if best is not None:
        from orpo_ray.config.space import describe

        value = best["metrics"][settings.metric]
        console.print(f"\nbest       [bold green]{describe(best['params'])}[/]   {settings.metric} {value:.4f}")
        if best["checkpoint"]:
            console.print(f"checkpoint {best['checkpoint']}", soft_wrap=True)
    console.print(f"results    {outcome.run_dir / 'results.json'}", soft_wrap=True)
    console.print(f"report     {outcome.run_dir / 'report.html'}", soft_wrap=True)
    shown = without_password(mlflow_uri.ui_command(outcome.tracking_uri))
    console.print(f"MLflow     {shown}", soft_wrap=True, markup=False)
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
    transformers_logging.disable_progress_bar()  # of weights: dozens, each gone in a second
    transformers_logging.set_verbosity_error()  # a reward model's score is new before its training: no news
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    scale = scales.scale(arguments.scale, arguments.model, arguments.data, arguments.seed)
    name = f"paper-{scale.name}" + (f"-{Path(arguments.model).name}" if arguments.model else "")
    name += f"-seed-{scale.seed}" if scale.seed else ""
    place = reproduce.Place(arguments.output_dir.expanduser().absolute() / name, scale)
    with ray_session.connected(arguments.num_cpus):
        result = reproduce.run(place, console)
    command = ["orpo-ray", "reproduce", "paper", "--scale", scale.name]
    for option in ("model", "data"):
        if (given := getattr(arguments, option)) is not None:
            command += [f"--{option}", Path(given).name if Path(given).exists() else given]
    command += ["--seed", str(scale.seed)] if scale.seed else []
    page = reproduction_page.write(place.folder / "page", result, shlex.join(command), reproduce.of_other_seeds(place))
    for claim in reproduction_page.claims(result):
        console.print(f"{claim.verdict:<12} {claim.text}: {claim.ours} ({claim.interval})", soft_wrap=True)
    console.print(f"\npage       {page}", soft_wrap=True)
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


def _plan(arguments: argparse.Namespace, console: Console) -> int:
    from dataclasses import replace

    from orpo_ray import hardware
    from orpo_ray.config import load
    from orpo_ray.planning import plan

    given = {"cpus": arguments.num_cpus, "gpus": arguments.num_gpus}
    for name, gib in (("memory_bytes", arguments.memory_gib), ("gpu_memory_bytes", arguments.gpu_memory_gib)):
        given[name] = None if gib is None else int(gib * 2**30)
    node = replace(hardware.this_machine(), **{name: value for name, value in given.items() if value is not None})
    planned = plan.plan(load(arguments.file, arguments.overrides), node, arguments.flops_per_second)
    if arguments.json:
        print(planned.to_json())
    else:
        console.print(planned)
    return 0 if planned.possible else 1


def _submit(arguments: argparse.Namespace, console: Console) -> int:
    from orpo_ray.cluster import jobs, submit

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, soft_wrap=True, markup=False)

    job = submit.prepare(arguments.file, arguments.overrides, arguments.working_dir, arguments.python)
    client = jobs.connect(arguments.address)
    try:
        if arguments.stop:
            stopped = submit.stop(client, job)
            say(f"job {stopped} was stopped; without --stop it continues" if stopped else "no job runs this sweep")
            return 0 if stopped else 1
        if job.withheld:
            names = ", ".join(job.withheld)
            say(f"set here and not sent, as a job's environment is open: {names}; set them on the nodes")
        sent = submit.start(client, job)
        if sent.is_new:
            say(f"job {sent.submission_id} was submitted with {job.num_files} files ({job.num_bytes / 2**20:.1f} MiB)")
        else:
            say(f"job {sent.submission_id} runs this sweep already; nothing new was submitted", "yellow")
        if arguments.no_wait:
            return 0
        try:
            ended = jobs.follow(client, sent.submission_id, lambda text: print(text, end="", flush=True))
        except KeyboardInterrupt:
            say(f"\njob {sent.submission_id} goes on; the same command follows it, and --stop stops it", "yellow")
            return 130
    except jobs.LostError as error:
        say(str(error), "red")
        return jobs.EXIT_LOST
    code = jobs.EXIT_CODES[ended.status.value]
    say(jobs.describe_end(ended), "red" if code == 1 else "yellow" if code else "green")
    return code


def _report(arguments: argparse.Namespace, console: Console) -> int:
    from orpo_ray.reports import report
    from orpo_ray.storage import find, results

    run_dir = find.find_run_dir(arguments.run_dir, arguments.output_dir)
    files = report.write_report(run_dir, formats=arguments.format or ("html", "md"))
    console.print(report.results_table(results.current(run_dir)))
    for file in files:
        console.print(str(file), soft_wrap=True)
    return 0


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
            console.print(f"{reason}; nothing is registered, and {exported.folder} is left for a look", style="red")
            return 1
    console.print(f"model      {exported.folder}", soft_wrap=True)
    if not arguments.no_register:
        made = export.register(candidate, exported, arguments.name, arguments.tracking_uri)
        known = "" if made.is_new else " (registered before)"
        console.print(f"registered {made.uri}, version {made.version}{known}", soft_wrap=True, markup=False)
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


def _watch(arguments: argparse.Namespace, console: Console) -> int:
    from orpo_ray.reports import watch

    with watch.opened(arguments.name, arguments.output_dir, arguments.address) as source:
        if arguments.json:
            print(watch.current(source).to_json())
        elif arguments.once:
            watch.once(source, console)
        else:
            watch.live(source, console)
    return 0


def _doctor(arguments: argparse.Namespace, console: Console) -> int:
    import os
    from contextlib import ExitStack

    from orpo_ray.cluster import doctor
    from orpo_ray.orchestration import ray_session
    from orpo_ray.tracking import uri as mlflow_uri

    uri = mlflow_uri.resolve_uri(arguments.tracking_uri, Path("runs"))
    storage = arguments.storage
    if storage is not None and "://" not in storage:
        storage = str(Path(storage).absolute())
    address = arguments.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        diagnosis = doctor.this_machine(uri, storage)
    else:
        doctor.require_reachable(address)
        os.environ["RAY_ADDRESS"] = address
        with ExitStack() as connection:
            try:
                connection.enter_context(ray_session.connected())
            except RuntimeError as error:  # Ray's own, where its versions differ
                raise doctor.not_let_in(address, error) from error
            diagnosis = doctor.cluster(uri, storage)
    if arguments.json:
        print(diagnosis.to_json())
    else:
        console.print(diagnosis, soft_wrap=True)
    return 0 if diagnosis.ok else 1


if __name__ == "__main__":
    sys.exit(main())
