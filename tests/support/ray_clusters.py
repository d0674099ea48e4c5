"""A Ray cluster as `ray start` makes it: dashboard, job server, several nodes, authentication; on loopback, or on hosts
in network namespaces."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from tests.support.hosts import Hosts

_MARK = "ORPO_RAY_TEST_CLUSTER"
"""Variable that every process of a cluster inherits, by which it is found again; the value names the cluster."""


class RayCluster:
    """A head node and any number of further nodes, each started by `ray start` on free ports. Ends what it started.

    Nothing of it touches the environment of this process: give `environment` to whatever is to use the cluster.
    """

    def __init__(
        self,
        folder: Path,
        auth: bool,
        nodes: int = 1,
        num_cpus: int = 2,
        hosts: Hosts | None = None,
        head: str = "head",
        **environment: str,
    ) -> None:
        """Start it, and wait until the job server answers and all nodes are there.

        Args:
            folder: what the nodes' `ray start` prints goes to `ray-N.log` in it.
            auth: whether it asks for a token, a new one.
            nodes: how many, the head included.
            num_cpus: of each node.
            hosts: where nodes are; by default all on loopback.
            head: the head's host among them.
            environment: further variables of the cluster's processes, e.g. credentials that only the nodes have.
        """
        self.folder = folder
        self.token = secrets.token_hex(32) if auth else None
        self._hosts, self._head = hosts, head
        self._mark = secrets.token_hex(8)
        # Sockets lie below, and their names may have 107 bytes: not in pytest's folder.
        self.temp_dir = Path(tempfile.mkdtemp(prefix="ray-"))
        self._logs = 0
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        self._environment = inherited | {
            "PATH": path,
            "RAY_AUTH_MODE": "token" if auth else "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            _MARK: self._mark,
            **({"RAY_AUTH_TOKEN": self.token} if self.token else {}),
            **environment,
        }
        place = "127.0.0.1" if hosts is None else hosts.address(head)
        self.address = f"{place}:{_free_port()}"
        """Of the GCS, what `RAY_ADDRESS` and `ray.init(address=...)` take."""
        self.dashboard_url = f"http://{place}:{_free_port()}"
        """Of the dashboard and job server."""
        self.nodes: list[subprocess.Popen[Any]] = []
        try:
            self._start(
                num_cpus,
                "--head",
                f"--port={self.address.rpartition(':')[2]}",
                "--include-dashboard=true",
                f"--dashboard-host={place}",
                f"--dashboard-port={self.dashboard_url.rpartition(':')[2]}",
                f"--ray-client-server-port={_free_port()}",
                temp_dir="head",
                host=head,
            )
            self._wait_for_nodes(1)
            for _ in range(nodes - 1):
                self.add_node(num_cpus)
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """What a client's process needs in its environment, its token included; no address."""
        return {
            "RAY_AUTH_MODE": self._environment["RAY_AUTH_MODE"],
            **({"RAY_AUTH_TOKEN": self.token} if self.token else {}),
        }

    def add_node(
        self,
        num_cpus: int = 2,
        resources: dict[str, float] | None = None,
        labels: dict[str, str] | None = None,
        host: str = "",
    ) -> subprocess.Popen[Any]:
        """Start one more node, with a folder for its sessions of its own, and wait until the cluster has it.

        `host` is where, among the cluster's hosts. Returns its `ray start --block`; `kill_node` ends it.
        """
        known = len(self.alive_nodes())
        options = [f"--address={self.address}"]
        if resources:
            options.append(f"--resources={json.dumps(resources)}")
        if labels:
            options.append(f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}")
        process = self._start(num_cpus, *options, temp_dir=f"node{len(self.nodes)}", host=host)
        self._wait_for_nodes(known + 1)
        return process

    def kill_node(self, process: subprocess.Popen[Any]) -> None:
        """SIGKILL a node and everything on it, as a machine that goes away does."""
        _end([process.pid, *_descendants(process.pid)])
        process.wait(30)

    def alive_nodes(self) -> list[str]:
        """Ids of the nodes that the job server's side of the cluster sees alive."""
        reply = self.get("/nodes?view=summary")
        return [node["raylet"]["nodeId"] for node in reply["data"]["summary"] if node["raylet"]["state"] == "ALIVE"]

    def get(self, path: str) -> dict:
        """The JSON that the dashboard answers a path with."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with urllib.request.urlopen(
            urllib.request.Request(self.dashboard_url + path, headers=headers), timeout=10
        ) as got:
            return dict(json.load(got))

    def logs(self) -> str:
        """What the nodes' `ray start` printed."""
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("ray-*.log")))

    def close(self) -> None:
        """End every process of the cluster, jobs included, and remove its sessions."""
        deadline = time.monotonic() + 30
        while (left := _marked(self._mark)) and time.monotonic() < deadline:
            _end(left)
        for process in self.nodes:
            process.wait(30)
        shutil.rmtree(self.temp_dir, ignore_errors=True)

    def _start(self, num_cpus: int, *options: str, temp_dir: str, host: str) -> subprocess.Popen[Any]:
        ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            f"--node-ip-address={'127.0.0.1' if self._hosts is None else self._hosts.address(host)}",
            *(f"--num-cpus={num_cpus}", "--num-gpus=0"),
            f"--object-store-memory={150 * 2**20}",
            f"--temp-dir={self.temp_dir / temp_dir}",
            *(f"--{name}={_free_port()}" for name in ports),
            *options,
        ]
        self._logs += 1
        with (self.folder / f"ray-{self._logs}.log").open("wb") as log:
            how: dict[str, Any] = {"cwd": self.folder, "stdin": subprocess.DEVNULL, "stdout": log}
            how |= {"env": self._environment, "stderr": subprocess.STDOUT}
            if self._hosts is None:
                process: subprocess.Popen[Any] = subprocess.Popen(command, start_new_session=True, **how)
            else:
                process = self._hosts.start(host, *command, **how)
        self.nodes.append(process)
        return process

    def _wait_for_nodes(self, number: int, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        problem: object = None
        while time.monotonic() < deadline:
            if self.nodes[-1].poll() is not None:
                raise AssertionError(f"ray start ended with {self.nodes[-1].returncode}:\n{self.logs()}")
            try:
                alive = self.alive_nodes()
                # The job server needs the head's agent as well, which comes up last.
                if len(alive) >= number and self.get("/api/version"):
                    return
                problem = f"{len(alive)} of {number} nodes"
            except (OSError, KeyError, ValueError) as error:
                problem = error
            time.sleep(0.2)
        raise AssertionError(f"no cluster of {number} nodes within {timeout_s} s: {problem}\n{self.logs()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _marked(mark: str) -> list[int]:
    """Processes that carry the mark of a cluster in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark:
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _descendants(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _end(pids: list[int]) -> None:
    processes = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            process.send_signal(signal.SIGKILL)
            processes.append(process)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)
