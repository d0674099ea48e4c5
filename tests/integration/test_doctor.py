"""`orpo-ray doctor` on a real cluster of two nodes on loopback, one of which lacks things."""

from __future__ import annotations

import http.server
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orpo_ray.storage import object_store
from tests.support.s3 import S3

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(300)]

TOKEN = "0123456789abcdef0123456789abcdef"
AHEAD = "import time\n_now = time.time\ntime.time = lambda: _now() + 5.0\n"
"""A node's clock that is 5 s fast, as its Python sees it."""


class Nodes:
    """Two nodes that were started by `ray start`, each in an environment of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_port()
        self.address = f"127.0.0.1:{self.port}"
        base = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))}
        base |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        self.environment = base
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, max_files: int | None = None, **environment: str) -> psutil.Process:
        """`ray start ARGUMENTS --block`. Returns its raylet."""

        def limit() -> None:
            if max_files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))

        options = ["--block", "--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
        log = (self.folder / f"node-{len(self.started)}.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, *options],
            env=self.environment | environment,
            stdout=log,
            stderr=log,
            preexec_fn=limit,
        )
        self.started.append(process)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            raylets = [child for child in children if child.name() == "raylet"]
            if raylets and b"This command will now block" in Path(log.name).read_bytes():
                return raylets[0]
            time.sleep(0.2)
        raise AssertionError(Path(log.name).read_text())

    def doctor(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "orpo_ray.cli", "doctor", "--address", self.address, *arguments],
            env=self.environment | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=200,
        )

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.send_signal(signal.SIGKILL)
            process.kill()
            process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Guarded(http.server.BaseHTTPRequestHandler):
    """Answers MLflow's client like a server with basic authentication."""

    def do_GET(self) -> None:
        allowed = "Authorization" in self.headers
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"experiments": []}' if allowed else b"You are not authenticated")

    do_POST = do_GET

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture(scope="module")
def stores(folder: Path) -> Iterator[list[S3]]:
    pair = [S3(folder), S3(folder)]
    yield pair
    for store in pair:
        store.stop()


@pytest.fixture(scope="module")
def mlflow_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def nodes(folder: Path, stores: list[S3]) -> Iterator[Nodes]:
    """The second node has no compiler on its PATH, a fast clock, other credentials, another store, a stale lock, fewer
    files to open, and GPUs that only Ray knows of."""
    cluster = Nodes(folder)
    home = folder / "home"
    (home / ".cache/torch_extensions/op").mkdir(parents=True)
    (home / ".cache/torch_extensions/op/lock").touch()
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(AHEAD)
    password = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "secret-password"}
    try:
        port = _free_port()
        cluster.start(
            "--head",
            f"--port={cluster.port}",
            "--include-dashboard=false",
            f"--ray-client-server-port={port}",
            **stores[0].environment,
            **password,
        )
        cluster.start(
            f"--address={cluster.address}",
            "--num-gpus=2",
            max_files=3000,
            HOME=str(home),
            PATH="/nowhere",
            PYTHONPATH=str(folder / "site"),
            **stores[1].environment,
        )
        cluster.environment |= stores[0].environment | password
        yield cluster
    finally:
        cluster.close()


def test_each_fault_is_found_on_the_node_that_has_it(nodes: Nodes, stores: list[S3], mlflow_server: str) -> None:
    place = ["--tracking-uri", mlflow_server, "--storage", stores[0].uri]
    run = nodes.doctor(*place, "--json")
    assert run.returncode == 1, run.stdout + run.stderr
    findings = json.loads(run.stdout)["findings"]
    names = list(dict.fromkeys(finding["node"] for finding in findings))
    assert len(names) == 3
    assert names[-1] == "this process"
    by_node = {name: {f["check"]: f for f in findings if f["node"] == name} for name in names}
    head, other, client = by_node.values()
    ill = {check for check, finding in other.items() if finding["status"] != "ok"}
    assert ill == {"C++ compiler", "clock", "compiled ops", "GPUs", "open files", "MLflow", "storage"}
    # The head's own objects are in its store, but not what the other node was to write there.
    assert {check for check, finding in head.items() if finding["status"] != "ok"} <= {"storage"}
    assert {check for check, finding in client.items() if finding["status"] != "ok"} <= {"storage"}
    skew = float(other["clock"]["detail"].split()[0])
    assert 4900 < skew < 5100
    assert other["GPUs"]["detail"] == "Ray offers 2, torch sees 0"
    assert str(nodes.folder / "home") in other["compiled ops"]["detail"]
    assert "authenticated" in other["MLflow"]["detail"]
    assert "are not visible" in other["storage"]["detail"]
    assert head["auth"]["detail"] == other["auth"]["detail"] == "RAY_AUTH_MODE=token"
    for secret in (TOKEN, "secret-password", "test-secret"):
        assert secret not in run.stdout + run.stderr

    with pytest.MonkeyPatch.context() as patch:
        for store in stores:
            for name, value in store.environment.items():
                patch.setenv(name, value)
            object_store._open.cache_clear()
            assert object_store.Storage(store.uri, patience_s=5.0).list() == {}, "something was left"
    object_store._open.cache_clear()


def test_the_wrong_token_and_no_cluster_are_told_without_a_traceback(nodes: Nodes) -> None:
    wrong = nodes.doctor(RAY_AUTH_TOKEN="f" * 32)
    assert wrong.returncode == 2
    assert "but Ray cannot connect to it. RAY_AUTH_MODE is token here, and a token is set" in wrong.stderr
    assert "Traceback" not in wrong.stdout + wrong.stderr
    assert TOKEN not in wrong.stdout + wrong.stderr
    nobody = nodes.doctor("--address", f"127.0.0.1:{_free_port()}")
    assert (nobody.returncode, nobody.stdout) == (2, "")
    assert "nothing answers at 127.0.0.1" in nobody.stderr


def test_a_node_that_hangs_is_a_finding(nodes: Nodes, folder: Path) -> None:
    raylet = next(
        child for child in psutil.Process(nodes.started[1].pid).children(recursive=True) if child.name() == "raylet"
    )
    code = (
        "from orpo_ray.cluster import doctor\nfrom orpo_ray.orchestration import ray_session\n"
        "with ray_session.connected():\n"
        f"    print(doctor.cluster('sqlite:///{folder}/mlflow.db', timeout_s=25).to_json())"
    )
    raylet.suspend()
    try:
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=nodes.environment | {"RAY_ADDRESS": nodes.address},
            capture_output=True,
            text=True,
            timeout=150,
        )
    finally:
        raylet.resume()
    assert run.returncode == 0, run.stderr
    findings = json.loads(run.stdout)["findings"]
    assert [f["detail"] for f in findings if f["check"] == "answers"] == ["yes", "no answer within 25 s"]
