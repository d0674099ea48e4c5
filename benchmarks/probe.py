"""Time and memory of a training process, seen from inside."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

GIB = 2**30


@dataclass(slots=True)
class Probe:
    """Marks of one process: `start` before the first step, `step_done` after each."""

    device: str
    seconds: list[float] = field(default_factory=list)
    """Of each step, the warm-up step first."""
    resident_gib: list[float] = field(default_factory=list)
    """Resident memory before the first step and after each."""
    _at: float = 0.0

    def start(self) -> None:
        """Weights are there; the first step follows."""
        self.resident_gib.append(psutil.Process().memory_info().rss / GIB)
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._at = time.perf_counter()

    def step_done(self) -> None:
        """An optimizer step has ended; the clock goes on, so what lies between steps counts too."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._at)
        self.resident_gib.append(psutil.Process().memory_info().rss / GIB)
        self._at = now

    def peaks(self) -> dict[str, float | None]:
        """Peak resident memory of the whole process, and of the device's allocator since `start`, in GiB."""
        return {
            "peak_gib": _peak_resident() / GIB,
            "peak_device_gib": torch.cuda.max_memory_allocated() / GIB if self.device == "cuda" else None,
        }


def _peak_resident() -> int:
    """Of this process, in bytes. Linux hands `ru_maxrss` on from the process that started this one (getrusage(2)), so
    that of a child of a big process would be the parent's."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
