"""What the broker decides from the sweep's state alone: no actor, no event loop that waits."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from orpo_ray.orchestration.trial_book import TrialBook
from orpo_ray.storage.events import Evaluated, Event, Forked, Status, Submitted
from orpo_ray.storage.journal import read_events
from orpo_ray.training.trial import TrialResult


def book_with(folder: Path, *trial_ids: str, max_failures: int = 1) -> TrialBook:
    """A book whose trials wait for a worker group."""
    book = TrialBook(folder, max_failures, None)
    for trial_id in trial_ids:
        book.record(Submitted(trial_id=trial_id, params={"optim.lr": 1e-3}, bundle=""))
        book.trials[trial_id].resource_class = "1cpu"
        book.enqueue(trial_id)
    return book


def hand_out(book: TrialBook, trial_id: str, group: str = "g") -> None:
    book.queues["1cpu"].remove(trial_id)
    book.trials[trial_id].group = group
    book.group(group).go_up("1cpu", ["host:1", "host:2"], ["node", "node"], now=0.0)
    book.group(group).trial_id = trial_id


def kinds(folder: Path) -> list[str]:
    return [event.kind for event in read_events(folder / "events.jsonl")]


def result(status: Status, steps: int = 10, **fields: object) -> TrialResult:
    return TrialResult(status, steps, {"eval/nll": 2.0}, f"c{steps}", 4.0, **fields)  # type: ignore[arg-type]


def test_a_crash_is_tried_again_and_then_given_up(tmp_path: Path) -> None:
    book = book_with(tmp_path, "a", max_failures=1)
    hand_out(book, "a")
    book.record(Evaluated(trial_id="a", step=10, metrics={"eval/nll": 2.0}, checkpoint="c10", seconds=4.0))
    book.interrupt("g", "a worker process died")
    state = book.trials["a"].state
    assert (state.attempt, state.failures, state.status, book.queues["1cpu"]) == (1, 1, Status.WAITING, ["a"])
    hand_out(book, "a")
    book.group("g").complaint = "out of memory"
    book.interrupt("g", "a worker process died")
    assert (state.status, state.attempt, state.step, state.checkpoint) == (Status.FAILED, 2, 10, "c10")
    assert state.error == "out of memory; given up after 2 attempts (sweep.max_failures 1)"
    assert kinds(tmp_path) == ["submitted", "eval", "retry", "finished"]


def test_a_preemption_is_no_failure(tmp_path: Path) -> None:
    book = book_with(tmp_path, "a", max_failures=0)
    for attempt in (1, 2):
        hand_out(book, "a")
        book.take_back(book.trials["a"], result(Status.PREEMPTED))
        state = book.trials["a"].state
        assert (state.attempt, state.failures, state.status, state.checkpoint) == (attempt, 0, Status.WAITING, "c10")
    assert book.queues["1cpu"] == ["a"]


@pytest.mark.parametrize(("asked", "queued", "status"), [("pause", [], Status.PAUSED), ("", ["a"], Status.PAUSED)])
def test_a_paused_trial_waits_to_be_submitted_unless_it_was_meanwhile(
    tmp_path: Path, asked: str, queued: list[str], status: Status
) -> None:
    book = book_with(tmp_path, "a")
    hand_out(book, "a")
    book.trials["a"].pause_requested = asked == "pause"
    book.take_back(book.trials["a"], result(Status.PAUSED))
    assert (book.queues["1cpu"], book.trials["a"].state.status) == (queued, status)
    assert book.trials["a"].is_parked == (asked == "pause")
    assert book.group("g").trial_id is None


def test_a_held_sweep_hands_nothing_out_and_lets_no_trial_go_on(tmp_path: Path) -> None:
    async def scenario() -> str:
        trial.pending_decision = asyncio.get_running_loop().create_future()
        pending = trial.pending_decision
        book.decide(trial, "continue")
        return await pending

    book = book_with(tmp_path, "a", "b")
    hand_out(book, "a")
    book.is_held, trial = True, book.trials["a"]
    assert asyncio.run(scenario()) == "pause"
    book.take_back(trial, result(Status.PAUSED))
    assert (book.queues["1cpu"], trial.is_parked) == (["b"], True)
    assert trial.state.status is Status.WAITING, "the next run continues it without choosing it again"


def test_a_failed_trial_keeps_what_the_journal_has_of_it(tmp_path: Path) -> None:
    book = book_with(tmp_path, "a")
    hand_out(book, "a")
    book.record(Evaluated(trial_id="a", step=10, metrics={"eval/nll": 2.0}, checkpoint="c10", seconds=4.0))
    book.take_back(book.trials["a"], TrialResult(Status.FAILED, 0, {}, None, 5.0, "IndexError: 7"))
    end = book.trials["a"].state.end
    assert end is not None
    assert (end.steps, end.metrics, end.checkpoint, end.train_seconds) == (10, {"eval/nll": 2.0}, "c10", 5.0)
    assert book.trials["a"].report is not None
    assert (book.trials["a"].report["status"], book.trials["a"].report["error"]) == ("failed", "IndexError: 7")


def test_the_next_book_continues_where_the_journal_ends(tmp_path: Path) -> None:
    first = book_with(tmp_path, "a", "b", "c")
    hand_out(first, "a")
    first.record(Evaluated(trial_id="a", step=10, metrics={"eval/nll": 2.0}, checkpoint="c10", seconds=4.0))
    first.interrupt("g", "died")
    hand_out(first, "b", "h")
    first.take_back(first.trials["b"], result(Status.FINISHED, 20))
    second = TrialBook(tmp_path, 1, None)
    a, b = second.trials["a"], second.trials["b"]
    assert (a.state.attempt, a.state.failures, a.state.evaluated_step, a.is_parked) == (1, 1, 10, True)
    assert (b.report or {})["status"] == "finished"
    assert [event.kind for event in second.replayed] == kinds(tmp_path)
    assert second.load().queued == {}, "each waits to be submitted by its driver"


def test_a_fork_goes_on_from_the_donors_numbers(tmp_path: Path) -> None:
    events: list[Event] = []
    book = book_with(tmp_path, "a", "b")
    for trial_id, nll in (("a", 3.0), ("b", 1.0)):
        events.append(Evaluated(trial_id=trial_id, step=10, metrics={"eval/nll": nll}, checkpoint="c", seconds=5.0))
    events.append(Forked(trial_id="a", donor="b", step=10, params={"optim.lr": 2e-3}))
    for event in events:
        book.record(event)
    report = book.trials["a"].last_report(devices=2)
    assert (report["step"], report["metrics"], report["devices"]) == (10, {"eval/nll": 1.0}, 2)
    assert (book.trials["a"].state.params, book.trials["a"].state.checkpoint) == ({"optim.lr": 2e-3}, None)
