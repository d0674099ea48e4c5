"""The journal: what is safe, what is not, and what the next process finds."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from orpo_ray.storage import journal
from orpo_ray.storage.events import Logged
from orpo_ray.storage.journal import Journal, fetch
from orpo_ray.storage.object_store import Storage, StorageError


def events(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def numbered(n: int) -> Logged:
    return Logged(trial_id="a", step=n, metrics={})


def taken(kept: Journal) -> list[int]:
    return [event.step for event in kept.take() if isinstance(event, Logged)]


def append(kept: Journal, *numbers: int) -> list[int]:
    """Append, wait until it is safe, take."""
    for n in numbers:
        kept.append(numbered(n))
    asyncio.run(kept.flushed())
    return taken(kept)


@pytest.fixture
def remote(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/store")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_REMOTE_CYCLE_S", 0.01)


def test_events_are_handed_out_once_and_in_order(tmp_path: Path) -> None:
    kept = Journal(tmp_path / "events.jsonl", None)
    assert append(kept, 1, 2, 3) == [1, 2, 3]
    assert append(kept) == []
    assert append(kept, 4) == [4]
    assert events(tmp_path / "events.jsonl") == [1, 2, 3, 4]


def test_another_machine_finds_what_was_safe_and_goes_on(tmp_path: Path, remote: Storage) -> None:
    append(Journal(tmp_path / "a.jsonl", remote), 1, 2)
    assert fetch(tmp_path / "b.jsonl", remote)
    append(Journal(tmp_path / "b.jsonl", remote), 3)
    assert fetch(tmp_path / "c.jsonl", remote)
    assert events(tmp_path / "c.jsonl") == [1, 2, 3]


def test_nothing_is_handed_out_while_the_store_is_away(
    tmp_path: Path, remote: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Journal(tmp_path / "a.jsonl", remote)
    append(kept, 1)
    works = Storage.write

    def refuse(self: Storage, name: str, content: bytes) -> None:
        raise StorageError("away")

    monkeypatch.setattr(Storage, "write", refuse)
    kept.append(numbered(2))
    time.sleep(0.3)
    assert taken(kept) == []
    assert fetch(tmp_path / "b.jsonl", remote)
    assert events(tmp_path / "b.jsonl") == [1]
    monkeypatch.setattr(Storage, "write", works)
    asyncio.run(kept.flushed())
    assert taken(kept) == [2]


def test_many_segments_become_one(tmp_path: Path, remote: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_MERGED", 5)
    kept = Journal(tmp_path / "a.jsonl", remote)
    for n in range(14):
        append(kept, n)
    assert len(remote.list("journal")) <= 6
    assert fetch(tmp_path / "b.jsonl", remote)
    assert events(tmp_path / "b.jsonl") == list(range(14))


def test_a_crash_while_merging_doubles_nothing(tmp_path: Path, remote: Storage) -> None:
    kept = Journal(tmp_path / "a.jsonl", remote)
    for n in range(3):
        append(kept, n)
    whole = (tmp_path / "a.jsonl").read_bytes()
    remote.write("journal/0000000000-0000000002.jsonl", whole)  # and the three it covers are still there
    assert fetch(tmp_path / "b.jsonl", remote)
    assert events(tmp_path / "b.jsonl") == [0, 1, 2]
    append(Journal(tmp_path / "b.jsonl", remote), 3)
    assert fetch(tmp_path / "c.jsonl", remote)
    assert events(tmp_path / "c.jsonl") == [0, 1, 2, 3]


def test_a_store_without_a_journal_leaves_none(tmp_path: Path, remote: Storage) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 9}\n')
    assert not fetch(tmp_path / "a.jsonl", remote)
    assert not (tmp_path / "a.jsonl").exists()
