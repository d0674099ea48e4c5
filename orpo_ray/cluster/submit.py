"""`orpo-ray submit`: run an experiment as a job of a Ray cluster, with the code and files it needs.

The job runs `orpo-ray sweep` on the head node, which continues from the sweep's journal. So submitting again after any
end continues the sweep, and while a job of the sweep runs, no second one is started.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.cluster.jobs import LostError
from orpo_ray.cluster.upload import EXCLUDES, SubmitError, files_to_send, package_bytes, require_paths, require_size
from orpo_ray.config import ExperimentConfig, load, parse
from orpo_ray.provenance import without_password

SENT = (
    *("MLFLOW_TRACKING_URI", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION"),
)
"""Environment variables that are sent with the job if they are set."""
SECRETS = (
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
"""Environment variables that are never sent: Ray does not protect a job's environment, and `ray job list` prints it."""

_STOP_WAIT_S = 60
_POLL_S = 0.5
_RUN_KEY = "orpo_ray.run"


@dataclass(frozen=True, slots=True)
class Job:
    """A job that has been checked and is ready to send."""

    name: str
    """Name of the experiment."""
    run: str
    """Location of its journal, by which two submissions are the same sweep."""
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    withheld: tuple[str, ...]
    """Secrets that are set here but not sent."""
    num_files: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Submission:
    """A job on the cluster."""

    submission_id: str
    is_new: bool
    """False if the sweep was running already."""


def prepare(
    file: Path, overrides: list[str], working_dir: Path, python: str = "python", environ: Mapping[str, str] = os.environ
) -> Job:
    """Check an experiment and the files it needs; sends nothing.

    Args:
        file: experiment file, inside `working_dir`.
        overrides: `key.path=value`.
        working_dir: directory that is sent to every node, and becomes the job's current directory.
        python: the interpreter on the head node.
        environ: environment variables from which those to send are taken.

    Raises:
        ConfigError: the experiment is invalid.
        SubmitError: the job would lack a file, the working directory cannot be sent, or a password would be exposed.
    """
    config, tree = _read(file, overrides)
    if not working_dir.is_dir():
        raise SubmitError(f"--working-dir {working_dir}: no such directory")
    if not file.resolve().is_relative_to(working_dir.resolve()):
        raise SubmitError(
            f"{file} is not in the working directory {working_dir.resolve()}, so it would not reach the cluster: "
            "run this in a directory that holds it, or name one with --working-dir"
        )
    inside = file.resolve().relative_to(working_dir.resolve())
    if (uri := config.tracking.uri or "") != without_password(uri):
        raise SubmitError(
            "tracking.uri holds a password, which every user of the cluster could read in the job: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the nodes instead"
        )
    if not Path(config.output_dir).expanduser().is_absolute():
        raise SubmitError(
            f"output_dir ({config.output_dir}) is relative: on a cluster it would be inside the job's copy of the "
            "working directory, which Ray deletes. Name a directory that all nodes share, e.g. "
            "output_dir=/mnt/shared/runs"
            + (", or one on the head node, because storage is set" if config.storage else ", or add storage: s3://...")
        )
    files = files_to_send(working_dir)
    if inside.as_posix() not in files:
        raise SubmitError(f"{file} is ignored by .gitignore or .rayignore, so it would not reach the cluster")
    require_paths(tree, working_dir, files)
    require_size(working_dir, files)

    command = "train" if config.sweep is None else "sweep"
    # Not the script orpo-ray, which exists only where the package was installed.
    words = [python, "-m", "orpo_ray.cli", command, inside.as_posix(), *overrides]
    environment, withheld = environment_to_send(environ)
    runtime_env: dict[str, Any] = {
        "working_dir": str(working_dir.resolve()),
        "excludes": list(EXCLUDES),
        "env_vars": environment,
    }
    if "orpo_ray/__init__.py" not in files:
        # Every node runs the code that checked the experiment here, whatever version is installed there.
        runtime_env["py_modules"] = [str(Path(__file__).parents[1])]
    return Job(
        name=config.name,
        run=f"{(config.storage or config.output_dir).rstrip('/')}/{config.name}",
        entrypoint=shlex.join(words),
        runtime_env=runtime_env,
        metadata=_origin(working_dir),
        withheld=withheld,
        num_files=len(files),
        num_bytes=package_bytes(files),
    )


def environment_to_send(environ: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The job's environment variables, and the names of secrets that are set here but not sent.

    Raises:
        SubmitError: MLFLOW_TRACKING_URI names a location on this machine, or a variable holds a password.
    """
    sent = {name: environ[name] for name in SENT if environ.get(name)}
    uri = sent.get("MLFLOW_TRACKING_URI", "")
    if uri and without_password(uri) != uri:
        raise SubmitError(
            "MLFLOW_TRACKING_URI holds a password, which every user of the cluster could read in the job's "
            f"environment: use {without_password(uri)} and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
            "on the nodes"
        )
    for variable in ("MLFLOW_TRACKING_URI", "HF_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        if (value := sent.get(variable, "")) and without_password(value) != value:
            raise SubmitError(f"{variable} holds a password, which every user of the cluster could read")
    if uri.startswith(("sqlite:", "file:", "/")) or (uri and "://" not in uri and not uri.startswith("databricks")):
        raise SubmitError(
            f"MLFLOW_TRACKING_URI is {uri}, a location on this machine that the cluster cannot see: name a server "
            "(http://host:5000), or unset it to log to a database beside output_dir"
        )
    sent |= {
        # The job has no terminal: its tables get this terminal's width.
        "COLUMNS": str(max(100, shutil.get_terminal_size().columns)),
        # Stopped as by Ctrl-C, with time for the sweep to write its results and MLflow's statuses. Ray's job supervisor
        # reads both variables (its defaults: SIGTERM, 3 s).
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S),
    }
    return sent, tuple(name for name in SECRETS if environ.get(name))


def start(client: Any, job: Job) -> Submission:
    """Submit the job, unless a job of the same sweep is pending or running; then return that one.

    Raises:
        SubmitError: the same sweep runs with another command, or the cluster refuses the job.
    """
    for _ in range(3):
        jobs = client.list_jobs()
        if (running := find_running(jobs, job.run)) is not None:
            if running.entrypoint != job.entrypoint:
                raise SubmitError(
                    f"job {running.submission_id} is running the sweep {job.run} with another command:\n"
                    f"  there  {running.entrypoint}\n  here   {job.entrypoint}\n"
                    "stop that job first (--stop), or give this experiment another name"
                )
            return Submission(str(running.submission_id), is_new=False)
        prefix = f"{job.name}-"
        counters = [
            int(number)
            for known in jobs
            if (known.submission_id or "").startswith(prefix)
            and (number := known.submission_id.removeprefix(prefix)).isdecimal()
        ]
        submission_id = f"{prefix}{max(counters, default=0) + 1}"
        try:
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=submission_id,
                runtime_env=job.runtime_env,
                metadata=job.metadata | {_RUN_KEY: job.run},
            )
        except SubmitError:
            raise
        except OSError as error:
            raise SubmitError(f"the connection to the cluster broke while the job was sent: {error}") from None
        except RuntimeError as error:
            if "already exists" in str(error):
                continue  # another client took the id; perhaps for the same sweep
            raise SubmitError(f"the cluster refuses the job: {error}") from None
        return Submission(submission_id, is_new=True)
    raise SubmitError(f"every job id tried for {job.name} was taken by other submissions at the same time; try again")


def find_running(jobs: list[Any], run: str) -> Any | None:
    """The pending or running job of a sweep, or None."""
    for job in jobs:
        if (job.metadata or {}).get(_RUN_KEY) == run and not job.status.is_terminal():
            return job
    return None


def stop(client: Any, job: Job) -> str | None:
    """Stop the sweep like Ctrl-C, and wait until it has ended.

    Returns:
        The job's id, or None if no job of the sweep runs.

    Raises:
        LostError: the job has not ended in time.
    """
    running = find_running(client.list_jobs(), job.run)
    if running is None:
        return None
    client.stop_job(running.submission_id)
    deadline = time.monotonic() + _STOP_WAIT_S + 30
    while not client.get_job_info(running.submission_id).status.is_terminal():
        if time.monotonic() > deadline:
            raise LostError(f"job {running.submission_id} was asked to stop and has not ended yet")
        time.sleep(_POLL_S)
    return str(running.submission_id)


def _read(file: Path, overrides: list[str]) -> tuple[ExperimentConfig, dict[str, Any]]:
    """The experiment, and its tree as written with overrides applied, in which paths are still relative."""
    config = load(file, overrides)
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    if tree.get("scaling") == "auto":
        tree["scaling"] = {"auto": True}
    parse(tree, overrides, source=str(file))  # sets the overrides in the tree it is given
    return config, tree


def _origin(working_dir: Path) -> dict[str, str]:
    """Origin of the code that is sent: its version, and the commit if the working directory is a repository."""
    found = {"orpo_ray.version": importlib.metadata.version("orpo-ray")}
    if shutil.which("git"):
        git = ["git", "-C", str(working_dir), "--no-optional-locks"]
        commit = subprocess.run([*git, "rev-parse", "--verify", "--quiet", "HEAD"], capture_output=True, text=True)
        if commit.returncode == 0:
            status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
            found |= {"git.commit": commit.stdout.strip(), "git.dirty": str(bool(status.stdout)).lower()}
    return found
