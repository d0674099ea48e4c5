"""What a machine has that training needs, measured where this runs: here, or in an actor on a node of a cluster.

Travels to nodes by value (`ray.cloudpickle.register_pickle_by_value`), since a node that lacks orpo_ray is one of the
things to be found out. So it imports only the standard library at its head, and gives back plain JSON values.
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
"""A storage that refuses for so long is a problem."""


class NodeProbe:
    """The actor's class. Methods answer for the process they run in; each may take long, none raises for a fault."""

    def facts(self) -> dict[str, Any]:
        """`measure()` of the node."""
        return measure()

    def mlflow(self, uri: str) -> str | None:
        """Why MLflow cannot be used from here, or None."""
        return mlflow_problem(uri)

    def write(self, storage: str, name: str) -> str | None:
        """Leave a small object of that name in the storage. Returns why that failed, or None."""
        return storage_problem(storage, write=name)

    def read(self, storage: str, names: list[str]) -> str | None:
        """Look for the objects that the others have left. Returns what is missing, or None."""
        return storage_problem(storage, read=names)

    def clean_up(self, storage: str, name: str) -> None:
        """Remove what was left there."""
        clean_up(storage, name)

    def now(self) -> float:
        """The node's clock, seconds since 1970."""
        return time.time()


def measure(with_gpus: bool = True) -> dict[str, Any]:
    """Versions, tools, limits and room of this machine, as this process sees them.

    Args:
        with_gpus: import torch, which takes seconds, and ask it for GPUs.

    Returns:
        JSON values: `host`, `python`, `packages` (name -> version or None), `code` (a digest of orpo_ray's source, None
        where it is not installed), `auth`, `compiler`, `ninja` (paths or None), `extensions`, `locks`, `gpus` (see
        `_gpus`), `temp`, `temp_free`, `shm` (bytes), `files` (soft limit).
    """
    # As in a worker: a virtual environment that is not activated has its tools off PATH.
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
    """Why MLflow cannot be used at `uri` from here, or None if it can."""
    try:
        from orpo_ray.tracking.uri import probe
    except ImportError as error:
        return f"not checked, since orpo_ray cannot be imported: {error}"
    return probe(uri)


def storage_problem(storage: str, write: str | None = None, read: list[str] | None = None) -> str | None:
    """Why the storage cannot be used from here, or None if it can.

    Args:
        storage: URI or absolute path.
        write: name of an object to leave there.
        read: names of objects that must be found there.
    """
    try:
        from orpo_ray.storage.object_store import Storage, StorageError
    except ImportError as error:
        return f"not checked, since orpo_ray cannot be imported: {error}"
    place = Storage(storage, _PATIENCE_S)
    try:
        if write is not None:
            place.write(write, write.encode())
        missing = [name for name in read or [] if place.read(name) != name.encode()]
    except (StorageError, OSError, ValueError) as error:
        return str(error)
    writers = ", ".join(name.rpartition("/")[2] for name in missing)
    return f"what {writers} wrote into it is not seen" if missing else None


def clean_up(storage: str, name: str) -> None:
    """Remove an object, or all below a folder.

    Where that fails, writing has failed too, which is a finding; a few bytes are left at worst.
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
    """Two installations of the same version may hold different code, while it is being worked on."""
    spec = importlib.util.find_spec("orpo_ray")
    if spec is None or not spec.submodule_search_locations:
        return None
    digest = hashlib.sha256()
    root = Path(spec.submodule_search_locations[0])
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _gpus() -> dict[str, Any]:
    """`names` of the GPUs that torch can use, `cuda` it was built for, `error` where it cannot be imported."""
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
