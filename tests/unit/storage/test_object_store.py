"""Objects in a store: an S3 server on loopback, and a folder that stands for one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orpo_ray.storage.object_store import Storage, StorageError
from tests.support.s3 import S3


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = S3(tmp_path_factory.mktemp("s3"))
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    yield server.uri
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    server.stop()


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "file":
        return Storage(f"file://{tmp_path}/store", patience_s=2)
    return Storage(f"{request.getfixturevalue('s3')}/{tmp_path.name}", patience_s=2)


def test_objects_are_written_read_listed_and_deleted(store: Storage, tmp_path: Path) -> None:
    assert (store.read("a/b.txt"), store.list(), store.list("a")) == (None, {}, {})
    store.write("a/b.txt", b"one")
    store.write("a/b.txt", b"three")
    file = tmp_path / "big.bin"
    file.write_bytes(os.urandom(20_000_000))
    store.upload(file, "a/c/big.bin")
    assert store.read("a/b.txt") == b"three"
    assert store.list() == {"a/b.txt": 5, "a/c/big.bin": 20_000_000}
    assert (store / "a").list("c") == {"c/big.bin": 20_000_000}
    store.download("a/c/big.bin", tmp_path / "new" / "back.bin")
    assert (tmp_path / "new" / "back.bin").read_bytes() == file.read_bytes()
    store.delete("a/c")
    store.delete("never/was")
    assert store.list() == {"a/b.txt": 5}


def test_what_is_not_there_is_not_made_up(store: Storage, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.download("gone", tmp_path / "gone")
    assert list(tmp_path.glob("gone*")) == []


def test_a_copy_is_whole_before_its_last_file_is_there(store: Storage) -> None:
    for name in ("x", "y", "manifest"):
        store.write(f"from/{name}", name.encode())
    store.copy("from", "to", last="manifest")
    assert {name: store.read(f"to/{name}") for name in ("x", "y", "manifest")} == {
        "x": b"x",
        "y": b"y",
        "manifest": b"manifest",
    }
    with pytest.raises(FileNotFoundError):
        store.copy("nothing", "to", last="manifest")


def test_a_store_that_works_passes_its_check_and_keeps_nothing(store: Storage) -> None:
    store.check()
    assert store.list() == {}


def test_a_bucket_that_is_not_there_is_said(s3: str) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/x: cannot write .*credentials"):
        Storage("s3://no-such-bucket/x", patience_s=1).write("a", b"")


def test_a_short_outage_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("in the way")  # writing below a file fails, as a disk that is full does
    store = Storage(f"file://{tmp_path}/store", patience_s=30)
    threading.Timer(1.0, (tmp_path / "store").unlink).start()
    store.write("a", b"late")
    assert store.read("a") == b"late"
