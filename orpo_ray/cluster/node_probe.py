"""Measure what a machine offers to training, in this process or through an actor on a node of a cluster.

The module is sent to nodes by value (`ray.cloudpickle.register_pickle_by_value`), because doctor must also detect nodes
that lack orpo_ray. So its top level imports only the standard library, and it returns plain JSON values.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "transformers", "datasets", "deepspeed", "mlflow", "optuna", "peft", "orpo-ray")
"""Distributions whose version must be the same everywhere."""
_PATIENCE_S = 10.0
"""Retry a storage for this long before reporting a problem."""


class NodeProbe:
    """Actor class. Methods report on the process they run in; each may take long, and none raises for a fault."""

    def facts(self) -> dict[str, Any]:
        """`measure()` of the node."""
        return measure()

    def mlflow(self, uri: str) -> str | None:
        """Why MLflow cannot be used from here, or None."""
        return mlflow_problem(uri)

    def write(self, storage: str, name: str) -> str | None:
        """Write a small object of that name to the storage. Returns the problem, or None."""
        return storage_problem(storage, write=name)

    def read(self, storage: str, names: list[str]) -> str | None:
        """Look for the objects that other nodes wrote. Returns the problem, or None."""
        return storage_problem(storage, read=names)

    def clean_up(self, storage: str, name: str) -> None:
        """Remove an object, or a folder of objects, from the storage."""
        clean_up(storage, name)

    def now(self) -> float:
        """The node's clock, seconds since 1970."""
        return time.time()


def measure(with_gpus: bool = True) -> dict[str, Any]:
    """Versions, tools, limits and free space of this machine, as this process sees them.

    Args:
        with_gpus: import torch, which takes seconds, and list its GPUs.

    Returns:
        JSON values: `host`, `python`, `packages` (name -> version or None), `code` (a digest of orpo_ray's source, None
        where it is not installed), `auth`, `compiler`, `ninja` (paths or None), `extensions`, `locks`, `gpus` (see
        `_gpus`), `cpus`, `temp`, `temp_free`, `shm` (bytes), `files` (soft limit).
    """
    # As in a worker: without activation, a virtual environment's tools are not on PATH.
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "code": _code(),
        "auth": os.environ.get("RAY_AUTH_MODE", ""),
        "compiler": shutil.which(os.environ.get("CXX", "c++"), path=path) or shutil.which("g++", path=path),
        "ninja": shutil.which("ninja", path=path),
        "extensions": str(extensions),
        "locks": sorted(map(str, extensions.rglob("lock"))) if extensions.is_dir() else [],
        "gpus": _gpus() if with_gpus else None,
        "cpus": os.cpu_count(),
        "temp": tempfile.gettempdir(),
        "temp_free": shutil.disk_usage(tempfile.gettempdir()).free,
        "shm": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def mlflow_problem(uri: str) -> str | None:
    """Why this process cannot use MLflow at `uri`, or None if it can."""
    try:
        from orpo_ray.tracking.uri import probe
    except ImportError as error:
        return f"not checked, because orpo_ray cannot be imported: {error}"
    return probe(uri)


def storage_problem(storage: str, write: str | None = None, read: list[str] | None = None) -> str | None:
    """Why this process cannot use the storage, or None if it can.

    Args:
        storage: URI or absolute path.
        write: name of an object to write.
        read: names of objects that must exist.
    """
    try:
        from orpo_ray.storage.object_store import Storage, StorageError
    except ImportError as error:
        return f"not checked, because orpo_ray cannot be imported: {error}"
    place = Storage(storage, _PATIENCE_S)
    try:
        if write is not None:
            place.write(write, write.encode())
        missing = [name for name in read or [] if place.read(name) != name.encode()]
    except (StorageError, OSError, ValueError) as error:
        return str(error)
    writers = ", ".join(name.rpartition("/")[2] for name in missing)
    return f"objects written by {writers} are not visible" if missing else None


def clean_up(storage: str, name: str) -> None:
    """Remove an object, or everything below a folder.

    Errors are ignored: writing has then failed, too, and is a finding. At worst a few bytes stay.
    """
    from orpo_ray.storage.object_store import Storage, StorageError

    with suppress(StorageError, OSError, ValueError):
        Storage(storage, _PATIENCE_S).delete(name)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code() -> str | None:
    """Digest of orpo_ray's source: during development, installations of one version may hold different code."""
    spec = importlib.util.find_spec("orpo_ray")
    if spec is None or not spec.submodule_search_locations:
        return None
    digest = hashlib.sha256()
    root = Path(spec.submodule_search_locations[0])
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _gpus() -> dict[str, Any]:
    """`names` of the GPUs that torch can use, the `cuda` version of its build, and the `error` of importing it."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"names": [], "cuda": None, "error": f"{type(error).__name__}: {error}"}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "names": [torch.cuda.get_device_name(i) for i in range(count)],
        "cuda": torch.version.cuda or torch.version.hip,
        "error": None,
    }
