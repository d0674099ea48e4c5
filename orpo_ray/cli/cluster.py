"""Commands for clusters: `submit` and `doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_ray.cli.command import Commands, add_command, add_file_command

if TYPE_CHECKING:
    from rich.console import Console


_SUBMIT_HELP = """\
Run FILE as a job on a Ray cluster: its sweep, or a single run if it has no sweep section. If a job of the same sweep is
waiting or running, that job is followed; if an earlier job has ended, the sweep continues.

The job is sent the working directory (without the paths that .gitignore and .rayignore name, results, weights and
caches), this installation of orpo_ray, and the variables MLFLOW_TRACKING_URI, HF_HUB_OFFLINE, AWS_ENDPOINT_URL and
similar ones. Secrets are not sent: every user of the cluster can read a job's environment. Set HF_TOKEN,
MLFLOW_TRACKING_PASSWORD and AWS keys on the nodes.

A cluster with token authentication needs RAY_AUTH_MODE=token here, and RAY_AUTH_TOKEN or ~/.ray/auth_token.

Exit code: 0 the job succeeded, 1 it failed, 2 it could not be submitted, 3 it was stopped, 4 the connection to the
cluster was lost, 130 Ctrl-C (the job continues).
"""


def add_submit(commands: Commands) -> None:
    """Declare `submit`."""
    submit = add_file_command(
        commands, "submit", _submit, "Run FILE as a job on a Ray cluster, or follow the job that already runs it."
    )
    submit.description = _SUBMIT_HELP
    submit.formatter_class = argparse.RawDescriptionHelpFormatter
    submit.add_argument(
        "--address",
        help="job server: http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265)",
    )
    submit.add_argument(
        "--working-dir",
        type=Path,
        default=Path(),
        help="directory that holds FILE and is copied to every node (default: the current directory)",
    )
    submit.add_argument("--python", default="python", help="interpreter on the head node (default: python)")
    then = submit.add_mutually_exclusive_group()
    then.add_argument("--no-wait", action="store_true", help="exit once the job is submitted, without following it")
    then.add_argument("--stop", action="store_true", help="stop the job that runs FILE, as Ctrl-C stops a local sweep")


def add_doctor(commands: Commands) -> None:
    """Declare `doctor`."""
    doctor = add_command(
        commands, "doctor", _doctor, "Check this machine, or every node of a cluster; say how to fix what is wrong."
    )
    doctor.add_argument("--tracking-uri", help="MLflow tracking URI to check (default: where a sweep would log)")
    doctor.add_argument(
        "--address", help="check every node of a cluster: HOST:PORT, auto or ray://HEAD:10001 (default: RAY_ADDRESS)"
    )
    doctor.add_argument("--storage", help="check that every node sees the same contents in this URI or folder")
    doctor.add_argument("--json", action="store_true", help="print JSON")


def _submit(arguments: argparse.Namespace, console: Console) -> int:
    from orpo_ray.cluster import jobs, submit

    def show(text: str, style: str = "") -> None:
        console.print(text, style=style, soft_wrap=True, markup=False)

    job = submit.prepare(arguments.file, arguments.overrides, arguments.working_dir, arguments.python)
    client = jobs.connect(arguments.address)
    try:
        if arguments.stop:
            stopped = submit.stop(client, job)
            show(f"job {stopped} was stopped; without --stop it continues" if stopped else "no job runs this sweep")
            return 0 if stopped else 1
        if job.withheld:
            names = ", ".join(job.withheld)
            show(f"set here and not sent, as a job's environment is open: {names}; set them on the nodes")
        sent = submit.start(client, job)
        if sent.is_new:
            show(f"job {sent.submission_id} was submitted with {job.num_files} files ({job.num_bytes / 2**20:.1f} MiB)")
        else:
            show(f"job {sent.submission_id} runs this sweep already; nothing new was submitted", "yellow")
        if arguments.no_wait:
            return 0
        try:
            ended = jobs.follow(client, sent.submission_id, lambda text: print(text, end="", flush=True))
        except KeyboardInterrupt:
            show(f"\njob {sent.submission_id} goes on; the same command follows it, and --stop stops it", "yellow")
            return 130
    except jobs.LostError as error:
        show(str(error), "red")
        return jobs.EXIT_LOST
    code = jobs.EXIT_CODES[ended.status.value]
    show(jobs.describe_end(ended), "red" if code == 1 else "yellow" if code else "green")
    return code


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
            except RuntimeError as error:  # Ray's own error if the versions of Ray differ
                raise doctor.connection_error(address, error) from error
            diagnosis = doctor.cluster(uri, storage)
    if arguments.json:
        print(diagnosis.to_json())
    else:
        console.print(diagnosis, soft_wrap=True)
    return 0 if diagnosis.ok else 1
