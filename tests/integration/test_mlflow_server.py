"""A real MLflow server on PostgreSQL: many trials at once, a server that dies in between, passwords."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orpo_ray.config import ExperimentConfig, parse
from orpo_ray.storage.results import summarize
from orpo_ray.tracking import delivery
from orpo_ray.tracking.sweep_tracker import SweepTracker
from orpo_ray.tracking.uri import TrackingError
from tests.support.events import as_event, as_state
from tests.support.real_sweeps import table_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

METRIC = "eval/preference_accuracy"
TRIALS, METRICS, STEPS = 64, 50, 10
PASSWORD = "correct-horse-battery-staple"  # of this test's own server
PROVENANCE = {
    "command": "orpo-ray sweep x.yaml",
    "packages": {"orpo-ray": "0.1.0"},
    "git": {"commit": "c" * 40, "dirty": False, "diff": "", "untracked": []},
}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def postgres_program(name: str) -> str:
    """Where distributions put it: on the path, or in a folder per version."""
    found = shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    if found is None:
        pytest.skip(f"needs PostgreSQL: no program {name}")
    return found


def unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URI of an empty PostgreSQL database of a server of its own."""
    initdb, postgres, user = postgres_program("initdb"), postgres_program("postgres"), unprivileged_user()
    # Not in pytest's folder, which nobody else may enter.
    folder = Path(tempfile.mkdtemp(prefix="orpo-ray-postgres-"))
    if user is not None:
        shutil.chown(folder, user)
    data, port = folder / "data", free_port()
    subprocess.run(
        [initdb, "--no-sync", "--auth=trust", "--username=mlflow", "--encoding=UTF8", "--pgdata", str(data)],
        check=True,
        user=user,
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder, "fsync": "off"}
    command = [postgres, "-D", str(data), *(f"--{name}={value}" for name, value in settings.items())]
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(command, user=user, cwd=folder, stdout=output, stderr=output)
    try:
        wait_for_port(port, process, folder / "log")
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # disconnects everybody and ends
        process.wait(30)
        shutil.rmtree(folder)


def wait_for_port(port: int, process: subprocess.Popen[bytes], output: Path) -> None:
    give_up = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < give_up, f"nothing listens on {port}: {output.read_text()}"
            time.sleep(0.1)


class Server:
    """`mlflow server` on one port, to be killed and started again. It stands for the machine that it runs on."""

    def __init__(self, database: str, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._arguments = ["--backend-store-uri", database, "--workers", "2"]
        self._arguments += ["--artifacts-destination", str(folder / "artifacts")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, wait: bool = True, **environment: str) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        # Its job runner is not needed, and takes most of the start.
        variables = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | environment
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, *self._arguments, *arguments],
                cwd=self.folder,
                env=variables,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        give_up = time.monotonic() + 90
        while wait:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                assert self._process.poll() is None, self.log.read_text()
                assert time.monotonic() < give_up, "the server did not come up in 90 s"
                time.sleep(0.1)

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def kill(self) -> None:
        """SIGKILL it and its workers: a session of its own, so no one else's process."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


@pytest.fixture
def server(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "")  # so that what `start` sets is undone
        monkeypatch.delenv(name)
    made = Server(database, tmp_path)
    yield made
    made.kill()


def sweep_config(folder: Path, uri: str, name: str) -> ExperimentConfig:
    return parse(
        {
            "name": name,
            "output_dir": str(folder / "runs"),
            "model": {"path": "tiny-llama-1m"},
            "data": {"path": "builtin://style-pairs"},
            "train": {"max_steps": STEPS, "eval_every": STEPS},
            "tracking": {"experiment": name, "uri": uri},
            "sweep": {"space": {"optim.lr": {"type": "loguniform", "low": 1.0e-5, "high": 1.0e-2}}},
        }
    )


def life(number: int) -> list[dict[str, Any]]:
    """A trial's events: METRICS values at each of STEPS steps, a different value for every run, key and step."""
    trial_id, time_ms = f"{number:05d}", 1_700_000_000_000
    facts = {"model/parameters": 1_000_000, "data/train_pairs": 8, "data/train_digest": "a" * 64}
    facts |= {"data/eval_pairs": 4, "data/eval_digest": "b" * 64}
    events: list[dict[str, Any]] = [
        {"event": "submitted", "params": {"optim.lr": 1.0e-5 * (number + 1)}, "bundle": ""},
        {"event": "started", "attempt": 0, "group": "g", "step": 0, "max_steps": STEPS, "facts": facts},
    ]
    for step in range(1, STEPS + 1):
        metrics = {f"train/metric_{m:02d}": value(number, m, step) for m in range(METRICS)}
        events.append({"event": "log", "step": step, "metrics": metrics})
    held_out = {METRIC: number / TRIALS}
    events.append({"event": "eval", "step": STEPS, "metrics": held_out, "checkpoint": f"/c/{number}", "seconds": 1.0})
    end = {"steps": STEPS, "metrics": held_out, "checkpoint": f"/c/{number}", "train_seconds": 1.0, "error": None}
    events.append({"event": "finished", "status": "finished", **end})
    return [e | {"trial_id": trial_id, "time": time_ms + index} for index, e in enumerate(events)]


def value(number: int, metric: int, step: int) -> float:
    return float(number * 10_000 + metric * 100 + step)


def stored_points(database: str, experiment_id: str) -> list[tuple[str, str, int, float]]:
    """(trial id, key, step, value) of every training point of an experiment: what the database really holds."""
    import psycopg2

    with psycopg2.connect(database.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT t.value, m.key, m.step, m.value FROM metrics m JOIN runs r ON r.run_uuid = m.run_uuid "
            "JOIN tags t ON t.run_uuid = m.run_uuid AND t.key = 'orpo_ray.trial_id' "
            "WHERE r.experiment_id = %s AND m.key LIKE 'train/%%'",
            (int(experiment_id),),
        )
        return [(trial, key, step, number) for trial, key, step, number in cursor.fetchall()]


@pytest.mark.alone
def test_64_trials_at_once_lose_and_double_nothing_though_the_server_is_killed(
    server: Server, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "LONGEST_BACKOFF_S", 1.0)
    server.start()
    config = sweep_config(tmp_path, server.uri, "many")
    folder = config.run_dir / "trials" / "00003"
    folder.mkdir(parents=True)
    row = {"step": STEPS, "pair_id": "p", "prompt": "Hi?", "chosen": "Hello.", "rejected": "No.", "generated": "Hey."}
    (folder / "generations.jsonl").write_text(json.dumps(row) + "\n")
    tracker = SweepTracker(config, "many-1", PROVENANCE)
    parent_id = tracker.start()
    lives = [life(number) for number in range(TRIALS)]
    slowest = [0.0] * TRIALS

    def report(number: int) -> None:
        """As a worker does, step by step over some seconds."""
        for event in lives[number]:
            began = time.monotonic()
            tracker.handle([as_event(event)])
            slowest[number] = max(slowest[number], time.monotonic() - began)
            time.sleep(0.15)

    threads = [threading.Thread(target=report, args=(number,)) for number in range(TRIALS)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    server.kill()  # in the middle of its writes
    for thread in threads:
        thread.join()
    assert max(slowest) < 1.5, "a trial waited for the server"
    assert tracker.flush(0.1) > 0
    server.start()
    back = time.monotonic()
    assert tracker.flush(120) == 0
    delivered_s = time.monotonic() - back
    assert caplog.text.count("MLflow cannot be reached") == caplog.text.count("MLflow is back") >= 1
    events = [event for one in lives for event in one]
    assert tracker.close(summarize("many", METRIC, "max", as_state(events), tracker.run_ids)) == 0
    print(f"{TRIALS * METRICS * STEPS} points: the last {delivered_s:.1f} s after the server was back")

    client = MlflowClient(server.uri)
    experiment_id = client.get_run(parent_id).info.experiment_id
    expected = [
        (f"{number:05d}", f"train/metric_{m:02d}", step, value(number, m, step))
        for number in range(TRIALS)
        for m in range(METRICS)
        for step in range(1, STEPS + 1)
    ]
    assert sorted(stored_points(database, experiment_id)) == expected
    runs = client.search_runs([experiment_id])
    assert len(runs) == TRIALS + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        contexts = {(i.dataset.digest[0], i.tags[0].value) for i in run.inputs.dataset_inputs}
        assert contexts == {("a", "training"), ("b", "evaluation")}
        assert len(run.inputs.dataset_inputs) == 2
    models = client.search_logged_models([experiment_id], max_results=200)
    assert sorted(m.tags["orpo_ray.checkpoint"] for m in models) == sorted(f"/c/{n}" for n in range(TRIALS))
    assert {m.source_run_id for m in models} == set(tracker.run_ids.values())
    assert table_of(client, tracker.run_ids["00003"], tmp_path) == {"columns": list(row), "data": [list(row.values())]}


def test_basic_auth_takes_the_right_password_names_the_wrong_one_and_shows_neither(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")
    (tmp_path / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\nadmin_username = owner\n"
        f"database_uri = sqlite:///{tmp_path}/auth.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    server.start(
        "--app-name",
        "basic-auth",
        MLFLOW_AUTH_CONFIG_PATH=str(tmp_path / "auth.ini"),
        MLFLOW_AUTH_ADMIN_PASSWORD=PASSWORD,
        MLFLOW_FLASK_SERVER_SECRET_KEY="of this test",
    )
    config = sweep_config(tmp_path, server.uri, "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "owner")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-" + PASSWORD)
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as refused:
        SweepTracker(config, "secret-1", PROVENANCE).start()
    assert time.monotonic() - began < 10  # another try would not help
    assert PASSWORD not in str(refused.value)

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    tracker = SweepTracker(config, "secret-1", PROVENANCE)
    parent_id = tracker.start()
    events = life(1)
    tracker.handle(map(as_event, events))
    tracker.handle_system({"system/node_0/cpu_utilization_percentage": 12.5})
    assert tracker.flush(60) == 0
    assert tracker.close(summarize("secret", METRIC, "max", as_state(events), tracker.run_ids)) == 0
    client = MlflowClient(server.uri)
    parent, child = client.get_run(parent_id), client.get_run(tracker.run_ids["00001"])
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.metrics["system/node_0/cpu_utilization_percentage"] == 12.5
    assert child.data.metrics["train/metric_49"] == value(1, 49, STEPS)

    said = [json.dumps(run.to_dictionary()) for run in (parent, child)] + [caplog.text, server.log.read_text()]
    said += [path.read_text() for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    said += [path.read_text() for path in config.run_dir.rglob("*") if path.is_file()]
    assert len(said) > 4
    assert not any(PASSWORD in text for text in said)
