"""The MLflow tracking URI: resolve it, check it, and show how to open its UI."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orpo_ray.errors import UserError
from orpo_ray.provenance import without_password


class TrackingError(UserError, RuntimeError):
    """MLflow cannot be used at the tracking URI; the message says why and what to do."""


def resolve_uri(uri: str | None, output_dir: Path) -> str:
    """The MLflow tracking URI: `uri`, else MLFLOW_TRACKING_URI, else a SQLite file in `output_dir` (absolute).

    Raises:
        TrackingError: a relative path. Ray starts its processes in other directories, where it names another file.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{output_dir / 'mlflow.db'}"
    scheme, separator, rest = uri.partition("://")
    if scheme.startswith("sqlite"):
        # sqlite:///name is relative, sqlite:////name absolute, sqlite:// in memory.
        relative = not rest.startswith("//")
    elif scheme == "file":
        relative = not rest.startswith("/")
    else:
        relative = not separator and not uri.startswith("databricks") and not Path(uri).is_absolute()
    if relative:
        raise TrackingError(
            f"tracking URI {uri!r} must be absolute: a relative path means another file in every directory that a "
            f"process happens to start in. Use e.g. sqlite:///{Path('mlflow.db').absolute()}, or the address of a "
            "server (http://host:5000)"
        )
    return uri


def ui_command(uri: str) -> str:
    """The command that opens the UI for `uri`; for a server, its address."""
    return uri if uri.startswith(("http://", "https://")) else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def probe(uri: str) -> str | None:
    """Why MLflow cannot be used at `uri`, or None if it can. Creates nothing.

    Args:
        uri: as `resolve_uri` gives it.
    """
    if uri.startswith("sqlite"):
        file = Path(uri.partition(":///")[2])
        place = file if file.exists() else next(parent for parent in file.parents if parent.exists())
        if not os.access(place, os.W_OK):
            return f"{place} is not writable"
        if not file.exists():
            return None
    bound_requests()
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        return without_password(str(error))
    return None


def bound_requests() -> None:
    """Limit a request to a server to 10 s without retries, unless the environment sets other values.

    A request that hangs for minutes would delay everything behind it. Retries are done here, not in MLflow's client.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
