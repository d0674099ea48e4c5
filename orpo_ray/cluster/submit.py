"""`orpo-ray submit`: an experiment as a job of a Ray cluster, with the code and files it needs, followed to its end.

The job runs `orpo-ray sweep` on the head node, which continues a sweep where its journal
ends; so submitting again after any end continues the sweep, and while it runs there is only one job of it.
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
"""Variables that go along where they are set."""
SECRETS = (
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
"""Variables that never do: Ray keeps a job's environment in the open, and `ray job list` prints it."""

_STOP_WAIT_S = 60
_POLL_S = 0.5
_RUN_KEY = "orpo_ray.run"


@dataclass(frozen=True, slots=True)
class Job:
    """What is sent, checked and complete."""

    name: str
    """Of the experiment."""
    run: str
    """Where its journal lies, which is what makes two submissions the same sweep."""
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    withheld: tuple[str, ...]
    """Secrets that are set here and are not sent."""
    num_files: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Submission:
    """A job on the cluster."""

    submission_id: str
    is_new: bool
    """False: the sweep was running already."""


def prepare(
    file: Path, overrides: list[str], working_dir: Path, python: str = "python", environ: Mapping[str, str] = os.environ
) -> Job:
    """Check an experiment and what goes along with it; sends nothing.

    Args:
        file: experiment file, inside `working_dir`.
        overrides: `key.path=value`.
        working_dir: goes to every node, and is the job's current directory.
        python: the interpreter on the head node.
        environ: variables that may be set here.

    Raises:
        ConfigError: the experiment is wrong.
        SubmitError: the job would not find something, or the working directory cannot be sent.
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
            "tracking.uri holds a password, and whoever may use the cluster can read what a job brings: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the nodes instead"
        )
    if not Path(config.output_dir).expanduser().is_absolute():
        raise SubmitError(
            f"output_dir ({config.output_dir}) is relative: on a cluster it would lie in the job's copy of the working "
            "directory, which Ray deletes. Name a directory that all nodes share, e.g. output_dir=/mnt/shared/runs"
            + (", or one on the head node, as storage is given" if config.storage else ", or add storage: s3://...")
        )
    files = files_to_send(working_dir)
    if inside.as_posix() not in files:
        raise SubmitError(f"{file} is named in .gitignore or .rayignore, so it would not reach the cluster")
    require_paths(tree, working_dir, files)
    require_size(working_dir, files)

    command = "train" if config.sweep is None else "sweep"
    # Not the script orpo-ray, which is there only where the package was installed.
    words = [python, "-m", "orpo_ray.cli", command, inside.as_posix(), *overrides]
    environment, withheld = environment_to_send(environ)
    runtime_env: dict[str, Any] = {
        "working_dir": str(working_dir.resolve()),
        "excludes": list(EXCLUDES),
        "env_vars": environment,
    }
    if "orpo_ray/__init__.py" not in files:
        # The code that checked the experiment here is what runs there, on every node, whatever is installed there.
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
    """The job's variables, and the names of secrets that are set here and stay here.

    Raises:
        SubmitError: MLFLOW_TRACKING_URI names a place on this machine, or holds a password.
    """
    sent = {name: environ[name] for name in SENT if environ.get(name)}
    uri = sent.get("MLFLOW_TRACKING_URI", "")
    if uri and without_password(uri) != uri:
        raise SubmitError(
            "MLFLOW_TRACKING_URI holds a password, and a job's environment is readable by all who use the cluster: "
            f"name {without_password(uri)} and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the nodes"
        )
    for variable in ("MLFLOW_TRACKING_URI", "HF_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        if (value := sent.get(variable, "")) and without_password(value) != value:
            raise SubmitError(f"{variable} holds a password, which would be readable by all who use the cluster")
    if uri.startswith(("sqlite:", "file:", "/")) or (uri and "://" not in uri and not uri.startswith("databricks")):
        raise SubmitError(
            f"MLFLOW_TRACKING_URI is {uri}, a place on this machine, which the cluster does not see: name a server "
            "(http://host:5000), or unset it and the runs go to a database beside output_dir"
        )
    sent |= {
        # Not a terminal there: the width of tables is what this one has.
        "COLUMNS": str(max(100, shutil.get_terminal_size().columns)),
        # Stopped as by Ctrl-C, and given time: the sweep then writes its results and MLflow's statuses. Ray's job
        # supervisor reads both (its defaults: SIGTERM, 3 s).
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S),
    }
    return sent, tuple(name for name in SECRETS if environ.get(name))


def start(client: Any, job: Job) -> Submission:
    """Submit the job, unless one of the same sweep waits or runs: then that one.

    Raises:
        SubmitError: another command of the same sweep is running, or the cluster refuses the job.
    """
    for _ in range(3):
        jobs = client.list_jobs()
        if (running := find_running(jobs, job.run)) is not None:
            if running.entrypoint != job.entrypoint:
                raise SubmitError(
                    f"job {running.submission_id} runs the sweep {job.run} now, with another command:\n"
                    f"  there  {running.entrypoint}\n  here   {job.entrypoint}\n"
                    "stop that one first (--stop), or give this one another name"
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
                continue  # somebody was faster; perhaps with the same sweep
            raise SubmitError(f"the cluster refuses the job: {error}") from None
        return Submission(submission_id, is_new=True)
    raise SubmitError(f"the cluster takes no job id for {job.name}: others submit at the same time; try again")


def find_running(jobs: list[Any], run: str) -> Any | None:
    """The job that waits or runs for a sweep, if there is one."""
    for job in jobs:
        if (job.metadata or {}).get(_RUN_KEY) == run and not job.status.is_terminal():
            return job
    return None


def stop(client: Any, job: Job) -> str | None:
    """Stop the sweep as Ctrl-C does, and wait until it has ended. Returns the job's id, or None where none runs."""
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
    """The experiment, and its tree as written, with overrides applied: paths are still relative in it."""
    config = load(file, overrides)
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    if tree.get("scaling") == "auto":
        tree["scaling"] = {"auto": True}
    parse(tree, overrides, source=str(file))  # sets the overrides in the tree it is given
    return config, tree


def _origin(working_dir: Path) -> dict[str, str]:
    """Which code is sent: its version, and the commit where the working directory is a repository."""
    found = {"orpo_ray.version": importlib.metadata.version("orpo-ray")}
    if shutil.which("git"):
        git = ["git", "-C", str(working_dir), "--no-optional-locks"]
        commit = subprocess.run([*git, "rev-parse", "--verify", "--quiet", "HEAD"], capture_output=True, text=True)
        if commit.returncode == 0:
            status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
            found |= {"git.commit": commit.stdout.strip(), "git.dirty": str(bool(status.stdout)).lower()}
    return found
