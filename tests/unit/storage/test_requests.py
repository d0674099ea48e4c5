"""Requests to a running sweep."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from orpo_ray.storage import requests


def test_a_request_reaches_the_sweep_once(tmp_path: Path) -> None:
    inbox = requests.Inbox(tmp_path)
    assert inbox.new() == []
    first = requests.request(tmp_path, "stop_trial", "00001")
    second = requests.request(tmp_path, "stop_sweep")
    assert inbox.new() == [first, second]
    assert inbox.new() == []
    assert requests.asked_so_far(tmp_path) == [first, second]


def test_of_an_earlier_run_only_the_stopped_trials_are_heard(tmp_path: Path) -> None:
    trial = requests.request(tmp_path, "stop_trial", "00001")
    requests.request(tmp_path, "stop_sweep")
    inbox = requests.Inbox(tmp_path)
    later = requests.request(tmp_path, "stop_sweep")
    assert inbox.new() == [trial, later]


def test_what_is_no_request_is_logged_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inbox = requests.Inbox(tmp_path)
    (tmp_path / "requests.jsonl").write_text(
        '{"what": "dance", "time": 1}\nnonsense\n\n[1]\n{"what": "stop_sweep", "time": 1e99}\n'
        f'{{"what": "stop_sweep", "time": {10**18}}}\n{{"what": "stop_trial"',
        "utf-8",
    )
    with caplog.at_level(logging.WARNING):
        assert inbox.new() == []
    assert len(caplog.records) == 5
    assert "stop_trial or stop_sweep" in caplog.text
    asked = requests.request(tmp_path, "stop_trial", "00002")
    assert inbox.new() == [asked], "behind a line that its writer left half done"
    assert requests.asked_so_far(tmp_path) == [asked]


def test_a_line_being_written_is_waited_for(tmp_path: Path) -> None:
    inbox, file = requests.Inbox(tmp_path), tmp_path / "requests.jsonl"
    file.write_text('{"what": "stop_sweep", ', "utf-8")
    assert inbox.new() == []
    with file.open("a", encoding="utf-8") as out:
        out.write('"time": 5}\n')
    assert inbox.new() == [requests.Request("stop_sweep", None, 5)]


def test_the_reason_says_who_and_when() -> None:
    assert requests.Request("stop_trial", "a", 1_700_000_000_000).reason == (
        "stopped by the user at 2023-11-14 22:13:20 UTC"
    )


@pytest.mark.parametrize(("what", "trial_id"), [("stop_trial", None), ("stop_sweep", "00001")])
def test_a_request_that_makes_no_sense_is_refused(tmp_path: Path, what: requests.What, trial_id: str | None) -> None:
    with pytest.raises(ValueError, match="stop_trial names a trial, stop_sweep names none"):
        requests.request(tmp_path, what, trial_id)
    assert not (tmp_path / "requests.jsonl").exists()
