"""Files of a working directory that a job sends to a cluster, checked before anything is sent.

Ray zips the directory and unpacks it on every node that runs part of the job
(https://docs.ray.io/en/latest/ray-core/handling-dependencies.html). It follows symbolic links wherever they lead, and
reports an oversized package or a missing file only when the upload or the job fails.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orpo_ray.errors import UserError
from orpo_ray.formatting import mib

EXCLUDES = (
    *(".git", ".venv", "venv", "__pycache__", "node_modules", ".ipynb_checkpoints"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".import_linter_cache"),
    *("/runs", "/mlruns", "/mlartifacts", "mlflow.db*"),
    *("*.pt", "*.pth", "*.ckpt", "*.safetensors", "*.gguf"),
    *(".env", ".netrc", ".aws", ".ssh", "*.pem", "*.key"),
)
"""Patterns, in .gitignore's notation, that are never sent, in addition to those of .gitignore and .rayignore:
repositories, environments, caches, results, weights, and files that usually hold secrets (every user of the cluster can
read a job's files)."""

_FILE_SUFFIXES = frozenset({".json", ".jsonl", ".parquet", ".csv", ".gz", ".txt", ".gguf"})
_SHOWN = 5


class SubmitError(UserError, RuntimeError):
    """The sweep cannot be sent as it is, or the cluster refuses it; the message says why."""


def files_to_send(working_dir: Path, excludes: tuple[str, ...] = EXCLUDES) -> dict[str, int]:
    """Files that Ray would pack: path within `working_dir` -> bytes.

    Raises:
        SubmitError: a link leads out of the directory, or to a parent of itself.
    """
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
    from ray._private.thirdparty.pathspec import PathSpec

    root = working_dir.absolute()
    home = root.resolve()
    spec = PathSpec.from_lines("gitwildmatch", excludes)
    honours_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    files: dict[str, int] = {}
    astray: list[str] = []
    quiet = logging.Logger("ignore files")  # Ray would log each ignore file

    def walk(path: Path, matchers: list[Callable[[Path], bool]]) -> None:
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            matchers = matchers + get_excludes_from_ignore_files(path, honours_gitignore, quiet)
        if spec.match_file(name) or any(matches(path) for matches in matchers):
            return
        if path != root and path.is_symlink() and path.exists():
            target = path.resolve()
            if not target.is_relative_to(home) or path.parent.resolve().is_relative_to(target):
                astray.append(f"{name} -> {target}")
                return
        if path.is_dir():
            for entry in sorted(path.iterdir()):
                walk(entry, matchers)
        elif path.is_file():
            files[name] = path.stat().st_size

    walk(root, [])
    if astray:
        raise SubmitError(
            f"{working_dir}: links lead out of the working directory or back into themselves, and Ray would follow "
            f"them and send their targets: {_some(astray)}; name them in .rayignore, or replace them by copies"
        )
    return files


def package_bytes(files: dict[str, int]) -> int:
    """Bytes of the package that Ray makes of these files: a zip archive without compression."""
    return 22 + sum(size + 2 * len(name.encode()) + 76 for name, size in files.items())


def require_size(working_dir: Path, files: dict[str, int]) -> None:
    """Refuse a package that is too large.

    Raises:
        SubmitError: the package is larger than Ray's job server accepts.
    """
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    size = package_bytes(files)
    if size > DASHBOARD_CLIENT_MAX_SIZE:
        largest = sorted(files, key=lambda name: files[name], reverse=True)
        raise SubmitError(
            f"{working_dir} would be a package of {mib(size)}, but Ray's job server accepts at most "
            f"{mib(DASHBOARD_CLIENT_MAX_SIZE)}; the largest of {len(files)} files are "
            f"{_some([f'{name} ({mib(files[name])})' for name in largest])}. List files that the job does not need in "
            ".rayignore, and put data and weights where all nodes can read them (a shared file system, the hub)"
        )


def require_paths(tree: dict[str, Any], working_dir: Path, files: dict[str, int]) -> None:
    """Require that the job's files include the data and models that an experiment names by relative paths.

    Args:
        tree: the experiment file with overrides applied, in which relative paths are still relative.
        working_dir: the directory that is sent.
        files: from `files_to_send`.

    Raises:
        SubmitError: lists every path that the job would not find.
    """
    lines = []
    for setting, value in _named_paths(tree):
        path = Path(value)
        if "://" in value or value.startswith("~") or path.is_absolute():
            continue  # to be found on the cluster
        problem = _missing(value, working_dir, files)
        if problem:
            lines.append(f"{setting}: {value} {problem}")
    if lines:
        raise SubmitError(
            "\n".join([f"the job would not find what the experiment names ({len(lines)} problem(s)):", *lines])
            + "\nRelative paths are relative to the working directory that is sent (--working-dir). Put data and "
            "weights on a file system that all nodes share and give the absolute path, or use a hub name"
        )


def _missing(value: str, working_dir: Path, files: dict[str, int]) -> str | None:
    """Why a job would not find a relative path; None if it would, or if the value may be a name on the hub."""
    name = Path(os.path.normpath(value)).as_posix()
    if name == ".." or name.startswith("../"):
        return f"is outside the working directory {working_dir}"
    local = working_dir / name
    if local.is_dir():
        excluded = [
            (local / path).relative_to(working_dir).as_posix()
            for path in _visible_files(local)
            if (local / path).relative_to(working_dir).as_posix() not in files
        ]
        return (
            f"is not sent completely ({_some(excluded)}): .gitignore, .rayignore or the exclusion of weights"
            if excluded
            else None
        )
    if local.exists():
        return None if name in files else "is not sent: .gitignore, .rayignore or the exclusion of weights"
    if Path(name).exists():
        return f"exists in {Path.cwd()}, but not in the working directory {working_dir}"
    if value.startswith("./") or Path(name).suffix in _FILE_SUFFIXES:
        return f"does not exist in the working directory {working_dir}"
    return None


def _visible_files(folder: Path) -> Iterator[Path]:
    """Files below a folder, relative to it, without hidden files and caches, which no loader reads."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if path.is_file() and not any(part.startswith((".", "__")) for part in inner.parts):
            yield inner


def _named_paths(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(setting, value) of every setting that names a model or data, including values of bundles and axes."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _named_paths(value, f"{name}.")
        elif name.removesuffix(".values").rpartition(".")[2] in ("path", "eval_path"):
            yield from ((name, item) for item in (value if isinstance(value, list) else [value]) if item is not None)


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
