"""A sweep in an object store: what another machine takes up, and that one process at a time runs it."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from orpo_ray.storage import lease as lease_module
from orpo_ray.storage import sync
from orpo_ray.storage.lease import Lease, LeaseError
from orpo_ray.storage.object_store import Storage, StorageError


@pytest.fixture
def remote(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/store/kept")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_BEAT_S", 0.2)
    monkeypatch.setattr(lease_module, "_DEAD_AFTER_S", 1.0)


def lease(remote: Storage, lost: list[str] | None = None, said: list[str] | None = None) -> Lease:
    return Lease(
        remote,
        (lost if lost is not None else []).append,
        (said if said is not None else []).append,
    )


def test_taking_up_drops_what_nobody_acted_on(tmp_path: Path, remote: Storage) -> None:
    run_dir = tmp_path / "runs" / "kept"
    run_dir.mkdir(parents=True)
    (run_dir / "events.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    remote.write("sweep.json", b'{"sweep_id": "x"}')
    remote.write("journal/0000000000-0000000000.jsonl", b'{"n": 1}\n')
    sync.restore(run_dir, remote)
    assert (run_dir / "events.jsonl").read_text() == '{"n": 1}\n'
    assert json.loads((run_dir / "sweep.json").read_text()) == {"sweep_id": "x"}


def test_reports_are_brought_and_checkpoints_are_not(tmp_path: Path, remote: Storage) -> None:
    for name in ("sweep.json", "results.json", "trials/a/pairs.npz", "trials/a/step-00000004/manifest.json"):
        remote.write(name, name.encode())
    remote.write("journal/0000000000-0000000000.jsonl", b"{}\n")
    run_dir = sync.fetch_run_dir(remote.uri, tmp_path / "here")
    assert run_dir == tmp_path / "here" / "kept"
    found = sorted(str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file())
    assert found == ["events.jsonl", "results.json", "sweep.json", "trials/a/pairs.npz"]


def test_a_store_without_that_sweep_is_said(tmp_path: Path, remote: Storage) -> None:
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        sync.fetch_run_dir(remote.uri, tmp_path)
    assert not (tmp_path / "kept").exists()


def test_a_name_that_leaves_the_run_directory_is_refused(
    tmp_path: Path, remote: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "list", lambda self, folder="": {"trials/../../../x": 1})
    with pytest.raises(StorageError, match="outside"):
        sync.pull(tmp_path, remote)


def test_one_process_at_a_time(remote: Storage) -> None:
    owner = json.dumps({"host": "elsewhere", "pid": 1, "id": "other", "beats": 1})
    remote.write("owner.json", owner.encode())

    stop = threading.Event()

    def beat() -> None:
        for beats in itertools.count(2):
            if stop.wait(0.1):
                return
            remote.write("owner.json", json.dumps(json.loads(owner) | {"beats": beats}).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LeaseError, match="process 1 on elsewhere runs this sweep now"):
            lease(remote)
    finally:
        stop.set()
        thread.join()


def test_a_silent_owner_is_followed_after_a_while(remote: Storage) -> None:
    remote.write("owner.json", json.dumps({"host": "elsewhere", "pid": 1, "id": "other"}).encode())
    said: list[str] = []
    began = time.monotonic()
    mine = lease(remote, said=said)
    assert time.monotonic() - began >= 1.0
    assert "process 1 on elsewhere" in said[0]
    mine.release()
    assert remote.read("owner.json") is None


def test_an_owner_that_died_on_this_machine_is_followed_at_once(remote: Storage) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    remote.write("owner.json", json.dumps({"host": socket.gethostname(), "pid": dead.pid, "id": "other"}).encode())
    said: list[str] = []
    lease(remote, said=said).release()
    assert said == []


def test_who_has_been_replaced_hears_of_it(remote: Storage) -> None:
    lost: list[str] = []
    mine = lease(remote, lost)
    time.sleep(0.5)
    assert (lost, json.loads(remote.read("owner.json") or b"")["pid"]) == ([], os.getpid())
    remote.write("owner.json", json.dumps({"host": "elsewhere", "pid": 7, "id": "other"}).encode())
    time.sleep(0.6)
    assert len(lost) == 1
    assert "process 7 on elsewhere has taken this sweep over" in lost[0]
    mine.release()
    assert remote.read("owner.json") is not None, "the new owner's is left alone"
