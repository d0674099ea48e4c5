"""Sweeps that faults are done to: start them, wait for the right moment, reach their processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from tests.support.real_sweeps import Sweeps

INJECT = Path(__file__).resolve().parent / "inject"
STEPS, EVAL_EVERY = 12, 4

RANKS = {
    "train.max_steps": STEPS,
    "train.eval_every": EVAL_EVERY,
    "train.log_every": 1,
    "scaling.num_workers": 2,
    "deepspeed.zero_stage": 2,
    "tracking.system_metrics": False,
    "generation.prompts": 0,
}
"""Two ranks that hold a half of the optimizer's state each."""

SWEEP: dict[str, Any] = {
    "metric": "eval/nll",
    "max_failures": 10,
    "space": {"optim.lr": {"type": "grid", "values": [1.0e-3, 3.0e-3]}},
}


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens inside a worker process; see `inject/sitecustomize.py`."""

    name: str
    point: Literal["forward", "backward", "save"]
    action: Literal["kill", "terminate", "wait", "allocate", "swell"]
    """`wait` takes a second, `allocate` asks for more than its limit of address space, `swell` takes more than its
    control group may have."""
    step: int
    rank: int = 1
    trial: str = "00000"
    times: int = 1
    group: str = ""
    """Control group that `swell` happens in."""


class Hung(AssertionError):
    """A sweep neither goes on nor ends."""


class Disturbed(Sweeps):
    """Starts sweeps whose processes do what they are told, and can be found by what Ray calls them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.environment: dict[str, str] = {}
        """Added to that of the next start."""
        self.plan()

    def plan(self, *faults: Fault) -> None:
        """What processes of the next start will do to themselves. Marks of earlier ones stay."""
        folder = self.folder / "faults"
        folder.mkdir(exist_ok=True)
        (folder / "plan.json").write_text(json.dumps([asdict(fault) for fault in faults]), encoding="utf-8")

    def fired(self, name: str) -> list[float]:
        """When a fault of that name happened: seconds since the epoch."""
        return sorted(float(mark.read_text()) for mark in (self.folder / "faults").glob(f"{name}.*"))

    def write(self, name: str, sweep: dict[str, Any], **settings: Any) -> Path:
        """An experiment file; settings without a dot are of the file's first level."""
        file = super().write(name, sweep, **{path: value for path, value in settings.items() if "." in path})
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        tree |= {key: value for key, value in settings.items() if "." not in key}
        file.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return file

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`orpo-ray ARGUMENTS` in a session of its own; what it prints is kept in `output.log`."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        environment |= {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
        path = [str(INJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(path), "ORPO_RAY_TEST_FAULTS": str(self.folder / "faults")}
        with (self.folder / "output.log").open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "orpo_ray.cli", *arguments],
                cwd=self.folder,
                env=environment | self.environment,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def finish(self, process: subprocess.Popen[str], silent_s: float = 150) -> int:
        """Wait for the end of a sweep; returns its exit status.

        Raises:
            Hung: its journal has not grown for `silent_s`.
        """
        size, since = -1, time.monotonic()
        while process.poll() is None:
            now = sum(file.stat().st_size for file in (self.folder / "runs").glob("*/events.jsonl"))
            if now != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > silent_s:
                raise Hung(f"nothing has happened for {silent_s:g} s\n{self.tail()}")
            time.sleep(0.1)
        return int(process.returncode)

    def tail(self) -> str:
        """The end of what the sweeps here have printed."""
        return (self.folder / "output.log").read_text(encoding="utf-8", errors="replace")[-3000:]

    def wait_until(self, true: Callable[[], Any], what: str, timeout_s: float = 120) -> Any:
        """Wait for a condition; returns its value."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := true():
                return value
            time.sleep(0.05)
        raise AssertionError(f"not within {timeout_s:g} s: {what}\n{self.tail()}")

    def reached(self, name: str, step: int, trial: str = "00000") -> None:
        """Wait until the journal has the training metrics of a step."""
        self.wait_until(
            lambda: any(
                e["event"] == "log" and e["trial_id"] == trial and e["step"] >= step for e in self.events(name)
            ),
            f"step {step} of trial {trial}",
        )

    def titled(self, process: subprocess.Popen[str], title: str) -> list[psutil.Process]:
        """Processes below a sweep whose command line begins with `title` or whose program is called so."""
        found = []
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                words = child.cmdline()
                if words and (words[0].startswith(title) or child.name() == title):
                    found.append(child)
            except psutil.Error:
                continue
        return found

    def kill_titled(self, process: subprocess.Popen[str], title: str) -> float:
        """SIGKILL the process of that title; returns when: seconds since the epoch."""
        (victim, *_) = self.wait_until(lambda: self.titled(process, title), f"a process called {title}")
        when = time.time()
        victim.send_signal(signal.SIGKILL)
        return when


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A file system of its own of so many MiB, mounted on `folder`. Needs root.

    Raises:
        PermissionError: it cannot be mounted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write a file that takes all that is left of a disk; returns it."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(b"x" * 2**16):
            pass
    return file


@contextmanager
def memory_group(mib: int) -> Iterator[Path]:
    """A control group whose processes may take so many MiB together; the kernel kills one that takes more.

    Raises:
        PermissionError: there are none, or none may be made here.
    """
    first = Path("/sys/fs/cgroup/memory")  # version 1; version 2 has one tree for everything
    folder = (first if first.is_dir() else first.parent) / f"orpo-ray-faults-{os.getpid()}"
    limit = "memory.limit_in_bytes" if first.is_dir() else "memory.max"
    try:
        folder.mkdir()
    except OSError as error:
        raise PermissionError(f"needs the right to make a control group: {error}") from None
    try:
        try:
            (folder / limit).write_text(str(mib * 2**20))
        except OSError as error:
            raise PermissionError(f"needs control groups that limit memory: {error}") from None
        yield folder
    finally:
        folder.rmdir()
