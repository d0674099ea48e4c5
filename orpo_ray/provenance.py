"""Provenance of results: code version, packages, hardware and command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("orpo-ray", "ray", "torch", "transformers", "datasets", "deepspeed", "mlflow", "peft", "optuna")
"""Distributions whose versions can change a result."""

MAX_DIFF_BYTES = 1_000_000
"""Maximum size of a recorded diff; longer ones are cut, as neither MLflow nor readers cope with them."""

_MAX_UNTRACKED = 100


def collect() -> dict[str, Any]:
    """Describe this process: `collected_at`, `command`, `git`, `packages`, `python`, `platform`, `hostname`, `cpu`,
    `cpu_count`, `memory_gib`, `gpus`.

    `git` describes the repository of the current directory (commit, dirty, diff, untracked files), and is None outside
    a repository; a package that is not installed has version None. All values can be written as JSON. Takes
    milliseconds and does not import torch."""
    return {
        "collected_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_password(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "git": _git(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": platform.node(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
    }


def without_password(text: str) -> str:
    """The text without the user names and passwords in its URLs (`user:password@`)."""
    return re.sub(r"(?<=://)[^/\s\"']+@", "", text)


def _run(*command: str) -> str | None:
    """Standard output of a command, or None if the program is missing, fails or takes over 10 s."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, timeout=10)
    except subprocess.TimeoutExpired:
        return None
    return result.stdout.decode("utf-8", errors="replace") if result.returncode == 0 else None


def _git() -> dict[str, Any] | None:
    # --no-optional-locks: do not race with a commit that the user makes meanwhile.
    status = _run("git", "--no-optional-locks", "status", "--porcelain", "-z", "--untracked-files=all")
    if status is None:
        return None
    commit = _run("git", "rev-parse", "--verify", "--quiet", "HEAD")  # None before the first commit
    # The user's settings (external diff tools, colours) must not change what is recorded.
    diff = _run("git", "--no-optional-locks", "diff", "--no-ext-diff", "--no-color", "HEAD") if commit else ""
    untracked = [entry[3:] for entry in status.split("\0") if entry.startswith("?? ")]
    return {
        "commit": commit.strip() if commit else None,
        "dirty": bool(status),
        "diff": _bounded(diff or ""),
        "untracked": untracked[:_MAX_UNTRACKED],
    }


def _bounded(diff: str) -> str:
    encoded = diff.encode()
    if len(encoded) <= MAX_DIFF_BYTES:
        return diff
    kept = encoded[:MAX_DIFF_BYTES].decode("utf-8", errors="ignore")
    return f"{kept}\n[cut: the diff has {len(encoded)} bytes, the first {MAX_DIFF_BYTES} are kept]\n"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """One line per NVIDIA GPU: name, memory, driver."""
    listing = _run("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return [line.strip() for line in (listing or "").splitlines() if line.strip()]
