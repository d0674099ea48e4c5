"""Reading a file in a process of its own that may add little memory: `python -m tests.support.hostile.bounded FILE`."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from orpo_ray.config import DataConfig
from orpo_ray.data.rows import BadRow, DataError, parse_row
from orpo_ray.data.sources import choose_splits
from tests.support.hostile.case import ROOT, Feed, Make

_MOST_MIB = 256
"""Memory that reading may add."""


def within_memory(name: str, write: Callable[[Path], object]) -> Make:
    """A file that is read in a process of its own, which must not need much memory for it."""

    def make(folder: Path) -> Feed:
        write(folder / name)

        def feed() -> str:
            command = [sys.executable, "-m", __name__, str(folder / name)]
            ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
            assert ran.returncode == 0, ran.stderr[-2000:]
            told = json.loads(ran.stdout.splitlines()[-1])
            assert told["mib"] < _MOST_MIB, f"reading added {told['mib']} MiB"
            if told["error"] is not None:
                raise DataError(told["error"])
            return str(told["rows"])

        return feed

    return make


def tell_about(path: Path) -> None:
    """Tell what reading a file gives, and how many MiB more than before this process held at most."""
    before = _peak_mib()
    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    error, good, bad = None, 0, 0
    try:
        for _, row in choose_splits(DataConfig(path=str(path)))[0].read():
            try:
                parse_row(row)
                good += 1
            except BadRow:
                bad += 1
    except DataError as found:
        error = str(found)
    print(json.dumps({"error": error, "rows": f"{good} good, {bad} bad", "mib": _peak_mib() - before}))


def _peak_mib() -> int:
    """Of this program; `getrusage` counts what the process was before its exec as well."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) >> 10


if __name__ == "__main__":
    tell_about(Path(sys.argv[1]))
