"""What differs between a laptop and a cluster: connecting to Ray, and checking that everything needed is there."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class ClusterError(RuntimeError):
    """No cluster can be had as asked for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `orpo-ray doctor`."""

    name: str
    ok: bool
    detail: str
    """What was found; for a problem, what to do."""


@contextmanager
def connected(num_cpus: int | None = None) -> Iterator[None]:
    """A Ray connection: the cluster that RAY_ADDRESS names (a submitted job has it set), else one started here.

    Args:
        num_cpus: CPUs of a cluster started here; by default the machine's.
    """
    import ray

    # A virtual environment that is not activated has its ninja, which DeepSpeed needs, off PATH; children inherit this.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    # Ray Train polls its workers this often: it bounds how fast a crashed or finished group is noticed.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    # Tune would save its list of all trials again and again; the journal has what matters.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
    # Population-based schedulers link checkpoints and fit models between two results; Tune warns from half a second.
    os.environ.setdefault("TUNE_WARN_THRESHOLD_S", "30")
    # Tune's table and files would repeat the sweep's own.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # A driver per submitted trial is more processes than CPUs, and meant; Ray warns from 3 × this many.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    # A group that must wait for room, or for a node to be added, gives up after this long.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    local = "RAY_ADDRESS" not in os.environ
    if num_cpus is not None and not local:
        raise ClusterError(f"--num-cpus is for a local cluster, but RAY_ADDRESS is {os.environ['RAY_ADDRESS']}")
    if local and "RAY_AUTH_MODE" not in os.environ:
        # Ray then uses token authentication, makes the token itself, and warns that it does. (Set here, the variable
        # would come too late: Ray's core reads it when it is imported.)
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        _init(local, num_cpus)
    except ConnectionError as error:
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS {os.environ.get('RAY_ADDRESS')}; unset it to start one here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _init(local: bool, num_cpus: int | None) -> None:
    import ray

    ray.init(
        address="local" if local else None,
        include_dashboard=False if local else None,
        num_cpus=num_cpus if local else None,
        logging_level="WARNING",
        log_to_driver=False,
    )


def doctor(tracking_uri: str) -> list[Finding]:
    """Versions, accelerator, compiler and ninja, Ray's authentication, MLflow.

    Args:
        tracking_uri: as `mlflow_uri.resolve_uri` gives it.
    """
    findings = [_versions(), _python(), _accelerator(), _compiler(), _ninja(), _extensions_dir(), _ray_auth()]
    return [*findings, _mlflow(tracking_uri), _disk()]


def _versions() -> Finding:
    names = ("ray", "torch", "transformers", "datasets", "deepspeed", "mlflow", "optuna", "peft")
    missing, found = [], []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding(
            "packages", False, f"not installed: {', '.join(missing)}; run pip install -e . -c constraints.txt"
        )
    return Finding("packages", True, ", ".join(found))


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), f"{version} (3.11 or newer is needed)")


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("accelerator", True, f"{torch.cuda.device_count()} × {', '.join(sorted(names))}")
    return Finding("accelerator", True, f"none; CPU with {os.cpu_count()} cores, DS_ACCELERATOR=cpu is set for workers")


def _compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        return Finding("C++ compiler", False, "none found; DeepSpeed compiles ops at first use: install g++")
    return Finding("C++ compiler", True, compiler)


def _ninja() -> Finding:
    path = shutil.which("ninja", path=os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", ""))
    return Finding("ninja", path is not None, path or "not found; pip install ninja")


def _extensions_dir() -> Finding:
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    locks = sorted(folder.rglob("lock")) if folder.is_dir() else []
    if locks:
        return Finding(
            "compiled ops",
            False,
            f"{locks[0]} was left by a build that was killed: later builds would wait for it; remove it",
        )
    return Finding("compiled ops", True, str(folder))


def _ray_auth() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    address = os.environ.get("RAY_ADDRESS", "")
    detail = f"RAY_AUTH_MODE={mode or '(unset)'}, RAY_ADDRESS={address or '(unset: a local cluster is started)'}"
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    default_token = Path("~/.ray/auth_token").expanduser()
    if mode == "token" and address and not token and not default_token.exists():
        return Finding(
            "Ray authentication", False, f"{detail}; but there is no token: set RAY_AUTH_TOKEN or write {default_token}"
        )
    return Finding("Ray authentication", True, detail)


def _mlflow(uri: str) -> Finding:
    from orpo_ray.mlflow_uri import probe

    problem = probe(uri)
    return Finding("MLflow", problem is None, uri if problem is None else f"{uri}: {problem}")


def _disk() -> Finding:
    free = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    return Finding("disk", free > 5, f"{free:.0f} GiB free in {tempfile.gettempdir()} (Ray keeps its sessions there)")
