"""Find a run directory by name or path."""

from __future__ import annotations

import difflib
from pathlib import Path

from orpo_ray.errors import NoSuchRunError
from orpo_ray.storage import sync
from orpo_ray.storage.run_dir import EVENTS_FILE, RESULTS_FILE, SWEEP_FILE


def find_run_dir(name_or_path: str | Path, output_dir: str | Path = "runs") -> Path:
    """The run directory of a sweep, given by its path, its name, or its address in an object store.

    Args:
        name_or_path: a run directory; the `name` of a sweep whose directory is `<output_dir>/<name>`; or `storage` of a
            sweep's config and its name, `s3://bucket/sweeps/NAME`: then its files, without checkpoints, are downloaded
            to `<output_dir>/<name>`.
        output_dir: where sweeps were run.

    Raises:
        NoSuchRunError: there is no such sweep; lists those with the most similar names.
        StorageError: the object store cannot be read.
    """
    if "://" in str(name_or_path):
        return sync.fetch_run_dir(str(name_or_path), Path(output_dir))
    for candidate in (Path(name_or_path), Path(output_dir) / name_or_path):
        if _is_run_dir(candidate):
            return candidate
    raise NoSuchRunError(
        f"no sweep {str(name_or_path)!r}: neither a run directory nor a name in {Path(output_dir)}/ "
        f"({suggest(name_or_path, output_dir)}); give the run directory, `<output_dir>/<name>`, or run the sweep first"
    )


def _is_run_dir(path: Path) -> bool:
    return any((path / file).is_file() for file in (SWEEP_FILE, RESULTS_FILE, EVENTS_FILE))


def suggest(name: str | Path, output_dir: str | Path) -> str:
    """Sweeps in `output_dir` with names similar to `name`, as text for an error message."""
    known = sorted(path.name for path in Path(output_dir).glob("*") if _is_run_dir(path))
    return nearest(str(name), known, "there is no sweep there")


def nearest(name: str, known: list[str], none: str) -> str:
    """Known names similar to `name`, as text for an error message; `none` if there are none."""
    near = difflib.get_close_matches(Path(name).name, known, n=3, cutoff=0.4) or known[:5]
    return f"the nearest names there: {', '.join(near)}" if near else none
