"""Several hosts on this machine: network namespaces on a bridge, each with a name, an address and mounts of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest

_SET_UP = 'hostname "$0"; for d in $PRIVATE; do mount --bind "$d.$0" "$d"; done; exec "$@"'
"""Inside the new namespaces: the host's name, and folders that no other host sees."""


def require_namespaces() -> None:
    """Skip the test where hosts cannot be made, with the reason."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"network namespaces need `{tool}`")
    name = f"o{os.getpid()}try"
    for command in (["netns", "add", name], ["link", "add", name, "type", "bridge"]):
        done = subprocess.run(["ip", *command], capture_output=True, text=True)
        if done.returncode:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            pytest.skip(f"`ip {' '.join(command)}` is refused here: {done.stderr.strip()}")
    _ip("link", "del", name)
    _ip("netns", "del", name)


class Hosts:
    """`Hosts("a", "b")`: host a at 10.77.N.1, host b at 10.77.N.2. Use as a context manager.

    They share this machine's file system, except for the folders that `private` names, of which every host has one of
    its own. They reach this machine at `outside`, and it reaches them. `cut` and `heal` take a host off the network and
    back, silently, as when a switch fails: connections do not break, nothing arrives. Ends what it started and removes
    what it made.
    """

    def __init__(self, *names: str, subnet: int | None = None, private: dict[str, list[Path]] | None = None) -> None:
        """Make the hosts.

        Args:
            names: their host names, which they also know each other by.
            subnet: N in 10.77.N.0/24; by default from this process's id.
            private: host -> folders, which must exist, that are its own; this machine sees those of host a, empty at
                first, beside them as `FOLDER.a`.
        """
        require_namespaces()
        self._names, self._private = names, private or {}
        self._subnet = os.getpid() % 250 if subnet is None else subnet
        self._prefix = f"o{os.getpid() % 100000}"
        self._bridge = f"{self._prefix}br"
        self.outside = f"10.77.{self._subnet}.254"
        """This machine's address in the hosts' network."""
        self._processes: list[subprocess.Popen[str]] = []
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"{self.outside}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        table = "127.0.0.1 localhost\n" + "".join(f"{self.address(name)} {name}\n" for name in names)
        for number, name in enumerate(names):
            space, outside = self._space(name), self._link(name)
            inside = f"{self._prefix}i{number}"
            _ip("netns", "add", space)
            _ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", space)
            _ip("link", "set", outside, "master", self._bridge, "up")
            _ip("-n", space, "link", "set", inside, "name", "eth0")
            _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            etc = Path("/etc/netns") / space  # `ip netns exec` puts its files over those of /etc
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(table, encoding="utf-8")
            for folder in self._private.get(name, []):
                folder.with_name(f"{folder.name}.{name}").mkdir(exist_ok=True)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def address(self, name: str) -> str:
        """The host's IPv4 address."""
        return f"10.77.{self._subnet}.{self._names.index(name) + 1}"

    def set_hosts(self, name: str, table: str) -> None:
        """Replace a host's /etc/hosts, for processes started from now on."""
        (Path("/etc/netns") / self._space(name) / "hosts").write_text(table, encoding="utf-8")

    def start(self, name: str, *command: str, env: dict[str, str] | None = None, **options: Any) -> Any:
        """Start a command on a host, in a session of its own. `options` are Popen's. Returns the Popen."""
        private = " ".join(str(folder) for folder in self._private.get(name, []))
        wrapped = ["ip", "netns", "exec", self._space(name), "unshare", "--uts", "--mount", "sh", "-ec", _SET_UP, name]
        environment = dict(os.environ if env is None else env) | {"PRIVATE": private}
        process = subprocess.Popen([*wrapped, *command], env=environment, text=True, start_new_session=True, **options)
        self._processes.append(process)
        return process

    def run(self, name: str, *command: str, env: dict[str, str] | None = None, timeout_s: float = 60) -> str:
        """Run a command on a host to its end; its exit code must be 0. Returns what it printed."""
        process = self.start(name, *command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, output
        return str(output)

    def cut(self, name: str) -> None:
        """Nothing from or to this host arrives any more."""
        _ip("link", "set", self._link(name), "nomaster")

    def heal(self, name: str) -> None:
        """Undo `cut`."""
        _ip("link", "set", self._link(name), "master", self._bridge)

    def kill(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL a command that `start` started, and everything below it."""
        try:
            root = psutil.Process(process.pid)
            victims = [*root.children(recursive=True), root]
        except psutil.NoSuchProcess:
            victims = []
        for victim in victims:
            try:
                victim.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.wait(30)
        psutil.wait_procs(victims, timeout=30)

    def kill_host(self, name: str) -> None:
        """SIGKILL every process on a host, as a machine that loses power does."""
        for _ in range(20):
            pids = [int(pid) for pid in _ip("netns", "pids", self._space(name)).split()]
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if not pids:
                return
            time.sleep(0.1)

    def close(self) -> None:
        """End all processes on the hosts, and remove hosts and bridge."""
        for name in self._names:
            self.kill_host(name)
        for process in self._processes:
            process.wait(30)
        for name in self._names:
            _ip("link", "del", self._link(name))  # the namespace's end would take it along, but some time later
            _ip("netns", "del", self._space(name))
            shutil.rmtree(Path("/etc/netns") / self._space(name))
        _ip("link", "del", self._bridge)

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _link(self, name: str) -> str:
        return f"{self._prefix}o{self._names.index(name)}"


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
