"""What `orpo-ray watch` knows and shows of a sweep, and what its keys ask for."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_ray.reports import live_view, watch, watch_view
from orpo_ray.reports.live_state import LiveSweep
from orpo_ray.storage import requests
from orpo_ray.storage.run_dir import EVENTS_FILE, RESULTS_FILE, write_results
from tests.support.journals import (
    BEGAN,
    UNDER_WAY,
    append,
    evaluated,
    event,
    finished,
    started,
    submitted,
    write_journal,
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """Of a sweep that seems to run."""
    written = write_journal(tmp_path / "runs" / "shown")
    with (written / "sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield written


def source(run_dir: Path) -> watch.RunDir:
    opened = watch.RunDir()
    opened.open(run_dir.name, str(run_dir.parent))
    return opened


def board(run_dir: Path) -> LiveSweep:
    return watch_view.current(source(run_dir))


def status(run_dir: Path, trial_id: str) -> str:
    seen = board(run_dir)
    return seen.status(seen.sweep.trials[trial_id])


def drawn(view: watch_view.View, width: int = 80, height: int = 24) -> list[str]:
    console = Console(width=width, height=height, color_system=None, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.capture() as captured:
        console.print(view.draw(width, height))
    return captured.get().splitlines()


def test_the_board_knows_who_trains_and_ranks_by_the_metric(run_dir: Path) -> None:
    seen = board(run_dir)
    assert seen.state == "running"
    assert [trial.trial_id for trial in seen.ranked()] == ["00000", "00001", "00002"], "smaller NLL first"
    assert seen.counts() == {"training": 2, "waiting": 1}
    assert seen.curve(seen.sweep.trials["00000"]) == [(4, 3.0), (8, 2.5)]
    assert seen.groups() == [("group-9-001", "00000", ["host:1"]), ("group-9-002", "00001", ["host:1"])]
    assert seen.sweep.device_hours == pytest.approx(12 / 3600)


def test_what_is_left_is_counted_by_what_a_step_took(run_dir: Path) -> None:
    left = board(run_dir).left()
    assert left is not None
    # A second a step; 8 steps of the first trial, 12 of the second, 16 of the third, 16 of one not yet proposed.
    assert left.device_hours == pytest.approx(52 / 3600)
    assert left.seconds == pytest.approx(26), "two train at once"


def test_a_budget_bounds_what_is_left(tmp_path: Path) -> None:
    space = {"optim.lr": {"type": "loguniform", "low": 1e-4, "high": 1e-2}}
    written = write_journal(tmp_path / "runs" / "b", budget={"device_hours": 20 / 3600}, num_samples=4, space=space)
    left = board(written).left()
    assert left is not None
    assert left.device_hours == pytest.approx(8 / 3600)


def test_a_lost_trial_is_last_however_good_it_was(run_dir: Path) -> None:
    append(run_dir, [finished("00000", 12, "diverged", 9, 0.1, 9.0)])
    assert [trial.trial_id for trial in board(run_dir).ranked()] == ["00001", "00002", "00000"]


def test_the_journal_is_followed_line_by_line(run_dir: Path) -> None:
    following = source(run_dir)
    first = following.read(None, 0)
    assert [e.kind for e in first.events] == [e["event"] for e in UNDER_WAY]
    assert first.is_whole
    with (run_dir / EVENTS_FILE).open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(evaluated("00001", 12, 8, 2.0, 8.0))[:30])
    torn = following.read("abc", first.offset)
    assert (torn.events, torn.offset, torn.is_whole) == ([], first.offset, True)
    with (run_dir / EVENTS_FILE).open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(evaluated("00001", 12, 8, 2.0, 8.0))[30:] + "\n")
    assert [e.step for e in following.read("abc", first.offset).events] == [8]
    assert len(following.read("of another sweep", first.offset).events) == len(UNDER_WAY) + 1


def test_a_long_journal_comes_in_pieces(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = board(run_dir).to_json()
    monkeypatch.setattr(watch, "_CHUNK", 150)  # shorter than some lines
    assert not source(run_dir).read(None, 0).is_whole
    in_pieces, at_once = (json.loads(text) | {"seconds": 0} for text in (board(run_dir).to_json(), whole))
    assert in_pieces == at_once


def test_a_damaged_line_is_told(run_dir: Path) -> None:
    with (run_dir / EVENTS_FILE).open("a", encoding="utf-8") as journal:
        journal.write("{nonsense}\n")
    with pytest.raises(ValueError, match=r"events\.jsonl: damaged between bytes"):
        source(run_dir).read(None, 0)


def test_without_its_process_a_sweep_is_interrupted_until_it_has_ended(tmp_path: Path) -> None:
    written = write_journal(tmp_path / "runs" / "gone")
    (written / "sweep.lock").touch()
    gone = board(written)
    assert (gone.state, status(written, "00000"), gone.groups()) == ("interrupted", "interrupted", [])
    assert gone.seconds == 11
    for interrupted, state in ((True, "interrupted"), (False, "ended")):
        write_results(written / RESULTS_FILE, {"interrupted": interrupted})
        assert board(written).state == state


def test_trials_of_an_earlier_start_wait_until_they_are_started_again(run_dir: Path) -> None:
    append(run_dir, [started("00001", 100, "group-77-001", step=4)])
    assert board(run_dir).counts() == {"training": 1, "waiting": 2}


def test_a_trial_that_is_asked_to_stop_is_stopping_until_it_has_ended(run_dir: Path) -> None:
    requests.request(run_dir, "stop_trial", "00001")
    assert status(run_dir, "00001") == "stopping"
    append(run_dir, [finished("00001", 12, "stopped_early", 4, 2.75, 4.0)])
    assert status(run_dir, "00001") == "stopped_early"


def test_json_is_one_object_without_what_json_lacks(run_dir: Path) -> None:
    append(run_dir, [evaluated("00001", 12, 8, float("nan"), 8.0)])
    seen = json.loads(board(run_dir).to_json())
    assert (seen["name"], seen["state"], seen["num_trials"]) == ("shown", "running", 4)
    assert [t["value"] for t in seen["trials"]] == [2.5, 2.75, None]
    assert seen["trials"][0]["curve"] == [[4, 3.0], [8, 2.5]]
    assert seen["mlflow"].endswith("runs/mlflow.db")


def test_a_frame_fills_80_by_24_and_shows_everything(run_dir: Path) -> None:
    lines = drawn(watch_view.View(source(run_dir)))
    assert len(lines) == 24
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "shown  running  eval/nll best 2.5000 (min)" in text
    assert "0/4 trials" in text
    assert "left ≤ 0:26, 0.014 device-h" in text
    assert "waiting 1  training 2  ended 0" in text
    assert re.search(r"1 lr=1\.0e-03 +training +8/16 +2\.5000 █▁", text)
    assert re.search(r"lr=3\.0e-03 +waiting", text)
    assert re.search(r"group 002  host:1  12\.5 pairs/s  lr=2\.0e-03", text)
    assert re.search(r"step 4 +8$", text, re.MULTILINE), "the curves' axis"
    assert "mlflow ui --backend-store-uri" in text
    assert lines[-1].startswith("↑↓ select")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 40), (60, 15), (200, 12)])
def test_many_trials_scroll_with_the_selected_one_in_sight(tmp_path: Path, width: int, height: int) -> None:
    events: list[dict[str, Any]] = []
    for i in range(60):
        name = f"{i:05d}"
        events += [submitted(name, i, 1e-3 * (i + 1)), started(name, i, "group-1-001")]
        events += [evaluated(name, i, 4, 2.0 + i / 100, 4.0), finished(name, i, "finished", 16, 2.0 + i / 100, 16.0)]
    view = watch_view.View(source(write_journal(tmp_path / "runs" / "many", events)))
    for _ in range(57):
        view.press("down")
    lines = drawn(view, width, height)
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert sum("2.5700" in line for line in lines) >= 1
    assert not any("lr=1.0e-03 " in line for line in lines), "scrolled out at the top"


def test_the_selection_stays_with_its_trial_when_the_order_changes(run_dir: Path) -> None:
    view = watch_view.View(source(run_dir))
    view.press("down")
    assert view.selected == "00001"
    append(run_dir, [evaluated("00001", 12, 8, 1.0, 8.0)])
    view.refresh()
    assert view.sweep.ranked()[0].trial_id == view.selected == "00001"
    view.press("up")
    assert view.selected == "00001", "there is none above"


def test_stopping_takes_a_yes(run_dir: Path) -> None:
    view = watch_view.View(source(run_dir))
    for keys in ("sn", "s\x1b", "Sq", "Qn"):
        for key in keys:
            view.press(key)
    assert requests.asked_so_far(run_dir) == []
    assert not view.is_left, "q was the answer to a question"
    view.press("down")
    view.press("s")
    assert drawn(view)[-1] == "stop trial 00001 (lr=2.0e-03)? y/n"
    view.press("y")
    view.press("Q")
    view.press("y")
    asked = [(r.what, r.trial_id) for r in requests.asked_so_far(run_dir)]
    assert asked == [("stop_trial", "00001"), ("stop_sweep", None)]


def test_a_trial_that_has_ended_is_not_stopped(run_dir: Path) -> None:
    append(run_dir, [finished("00000", 20, "finished", 16, 2.0, 16.0)])
    view = watch_view.View(source(run_dir))
    view.press("s")
    view.press("y")
    assert requests.asked_so_far(run_dir) == []


def test_help_is_shown_and_hidden(run_dir: Path) -> None:
    view = watch_view.View(source(run_dir))
    view.press("?")
    assert "stop the selected trial" in "\n".join(drawn(view))
    view.press("?")
    assert "stop the selected trial" not in "\n".join(drawn(view))


def test_a_new_sweep_in_the_place_of_the_old_is_shown_from_its_beginning(run_dir: Path) -> None:
    view = watch_view.View(source(run_dir))
    kept = json.loads((run_dir / "sweep.json").read_text("utf-8"))
    (run_dir / "sweep.json").write_text(json.dumps(kept | {"sweep_id": "new"}), "utf-8")
    (run_dir / "events.jsonl").unlink()
    append(run_dir, [submitted("00000", 500, 7e-3)])
    view.refresh()
    assert [t.params for t in view.sweep.ranked()] == [{"optim.lr": 7e-3}]


def test_a_sweep_without_trials_yet_is_shown(tmp_path: Path) -> None:
    view = watch_view.View(source(write_journal(tmp_path / "runs" / "new", [])))
    assert view.selected is None
    view.press("s")
    view.press("down")
    assert "no trial yet" in "\n".join(drawn(view))


def test_a_sweep_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sweep 'none'"), watch.opened("none", str(tmp_path), None):
        pass


def test_a_relative_place_on_a_cluster_is_refused() -> None:
    with (
        pytest.raises(watch.WatchError, match="the absolute path that it has on the head node"),
        watch.opened("quickstart", "runs", "ray://head:10001"),
    ):
        pass


def test_curves_begin_and_end_where_their_points_are() -> None:
    lines = [line.plain for line in live_view.plot([[(0, 1.0), (100, 3.0)], [(50, 2.0)]], width=40, height=9)]
    assert len(lines) == 9
    assert {len(line) for line in lines} == {40}
    assert lines[0].startswith("   3.0000 ")
    assert lines[0].endswith("1"), "the first ends at the top right"
    assert lines[7].startswith("   1.0000 ⢀") or lines[7][10] in "⡀⣀⢀⠠⡠"
    assert "2" in lines[4] or "2" in lines[3]
    assert lines[8] == " " * 10 + "step 0" + "100".rjust(24)
    assert live_view.plot([], 80, 10) == []


def test_a_sparkline_spans_the_values_it_shows() -> None:
    assert live_view.sparkline([9.0, 0.0, 1.0, 2.0], width=3) == "▁▅█"
    assert live_view.sparkline([5.0]) == "▁"
    assert live_view.sparkline([]) == ""


def test_time_is_counted_where_the_sweep_runs(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo_ray.reports.watch.time.time", lambda: BEGAN / 1000 + 90)
    assert board(run_dir).seconds == 90
    append(run_dir, [event("retry", "00000", 95, attempt=1, failures=1, error="a worker process died")])
    assert status(run_dir, "00000") == "waiting"
