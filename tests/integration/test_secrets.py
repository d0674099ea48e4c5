"""What a sweep lets others see: where it listens, and that the secrets of its environment stay there."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.support.real_sweeps import Sweeps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SECRETS = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "RAY_AUTH_TOKEN",
)
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@dataclass
class Seen:
    """Of all processes below a sweep, while it ran."""

    command_lines: set[str] = field(default_factory=set)
    listening: set[tuple[str, int, int]] = field(default_factory=set)
    """Address, port, process."""
    titles: dict[int, set[str]] = field(default_factory=dict)
    """Process -> what it called itself while it was seen; a Ray worker's title changes with each call."""

    def look(self, process: psutil.Process) -> None:
        try:
            line = " ".join(process.cmdline())
            self.command_lines.add(line)
            self.titles.setdefault(process.pid, set()).add(line.split(".")[0].strip())
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    self.listening.add((connection.laddr.ip, connection.laddr.port, process.pid))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return

    @property
    def ray_sessions(self) -> list[Path]:
        return [Path(found) for found in set(re.findall(r"[\w/.-]+/session_[\w-]+", " ".join(self.command_lines)))]


def test_a_sweep_listens_on_loopback_and_keeps_its_secrets(sweeps: Sweeps) -> None:
    values = {name: f"sentinel{secrets.token_hex(16)}" for name in SECRETS}
    settings = {"train.max_steps": 4, "train.eval_every": 4, "scaling.num_workers": 2}
    file = sweeps.write("quiet", {"space": {}}, **settings)
    process = sweeps.start("sweep", str(file), "--num-cpus", "2", env={"RAY_AUTH_MODE": "token"} | values)
    seen = Seen()
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        try:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for one in tree:
            seen.look(one)
        time.sleep(0.3)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert len({port for _, port, _ in seen.listening}) > 5, "nothing was seen"

    # torch's TCPStore, where the ranks of a group meet, cannot be told an address: one port per group (security.md).
    beyond = {(port, pid) for address, port, pid in seen.listening if address not in LOOPBACK}
    assert all("ray::RayTrainWorker" in seen.titles[pid] for _, pid in beyond), seen.titles
    assert len({port for port, _ in beyond}) <= 1

    assert seen.ray_sessions, seen.command_lines
    left = [path for folder in (sweeps.folder, *seen.ray_sessions) for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in left}
    assert {"mlflow.db", "results.json", "sweep.json", "report.html", "raylet.out"} <= names
    leaks = [(name, "terminal") for name, value in values.items() if value in output]
    leaks += [(name, line) for name, value in values.items() for line in seen.command_lines if value in line]
    for path in left:
        content = path.read_bytes()
        leaks += [(name, str(path)) for name, value in values.items() if value.encode() in content]
    assert leaks == []
