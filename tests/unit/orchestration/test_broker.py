"""The broker's rules, on the class itself; test_sweep.py has it as an actor among real processes."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from orpo_ray.orchestration.broker import Broker
from orpo_ray.orchestration.broker_state import Assignment
from orpo_ray.storage.events import Forked, Logged, Paused, Status
from orpo_ray.storage.journal import read_events
from orpo_ray.storage.sweep_state import SweepState
from orpo_ray.training.trial import TrialResult

LANE = "1x1cpu0gpu"


async def submit(broker: Broker, *trial_ids: str, bundle: str = "") -> None:
    for trial_id in trial_ids:
        await broker.submit(trial_id, {"optim.lr": 1e-3}, bundle, LANE, f"config of {trial_id}", "search")


async def group(broker: Broker, name: str = "g", resource_class: str = LANE) -> str:
    await broker.join(name, resource_class, ["host:1"], ["node"])
    return name


async def take(broker: Broker, name: str) -> Assignment:
    taken = await broker.take(name, timeout_s=1)
    assert isinstance(taken, Assignment), taken
    return taken


def end(steps: int, **metrics: float) -> TrialResult:
    return TrialResult(Status.FINISHED, steps, metrics, "checkpoint", 1.5)


def events(folder: Path) -> list[tuple[str, str]]:
    return [(event.kind, event.trial_id) for event in read_events(folder / "events.jsonl")]


def test_a_trial_goes_to_a_group_and_its_evaluations_to_the_driver(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        await submit(broker, "a")
        worker = await group(broker)
        assert await take(broker, worker) == Assignment("a", 0, "config of a")
        evaluated = asyncio.create_task(broker.evaluated("a", 0, 10, {"eval/nll": 2.0}, "c10", 1.0))
        assert await broker.next_result("a", "driver") == {
            "step": 10,
            "metrics": {"eval/nll": 2.0},
            "seconds": 1.0,
            "max_steps": None,
            "devices": 1,
            "status": None,
            "error": None,
        }
        await asyncio.sleep(0)
        assert not evaluated.done(), "the worker must wait for the driver's decision"
        following = asyncio.create_task(broker.next_result("a", "driver"))
        assert await evaluated == "continue"
        await broker.finished("a", 0, end(20, nll=1.0))
        assert (await following)["status"] == "finished"
        assert (await broker.next_result("a", "driver"))["status"] == "finished", "asked again, it says so again"
        load = await broker.load()
        assert (load.queued, load.busy, list(load.idle_seconds)) == ({}, {}, ["g"])

    asyncio.run(scenario())
    assert events(tmp_path) == [("submitted", "a"), ("eval", "a"), ("finished", "a")]


def test_a_stop_reaches_a_waiting_a_running_and_a_queued_trial(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        await submit(broker, "a", "b", "c")
        first, second = await group(broker, "g1"), await group(broker, "g2")
        await take(broker, first)
        await take(broker, second)
        waiting = asyncio.create_task(broker.evaluated("a", 0, 10, {}, None, 1.0))
        await asyncio.sleep(0)
        for trial_id in ("a", "b", "c"):
            await broker.stop(trial_id)
        assert await waiting == "stop"
        assert await broker.evaluated("b", 0, 10, {}, None, 1.0) == "stop"
        queued = await broker.next_result("c", "driver")
        assert (queued["status"], queued["step"]) == ("stopped_early", 0)
        assert await broker.take(await group(broker, "g3"), 0.01) == "wait"

    asyncio.run(scenario())


def test_an_interrupted_trial_is_handed_out_again_until_it_failed_too_often(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = Broker(str(tmp_path), max_failures=1)
        await submit(broker, "a", "b")
        worker = await group(broker)
        await take(broker, worker)
        await broker.log("a", 0, 5, {"train/loss": 3.0})
        await broker.join(worker, LANE, ["host:2"], ["node"])  # the group's processes are new
        again = await take(broker, worker)
        assert (again.trial_id, again.attempt) == ("a", 1), "before b, which came later"
        await broker.log("a", 0, 10, {"train/loss": 2.0})  # a message of the dead process
        await broker.log("a", 1, 5, {"train/loss": 3.0})  # the step that was reported before
        await broker.log("a", 1, 10, {"train/loss": 2.5})
        assert await broker.evaluated("a", 0, 10, {}, None, 1.0) == "stop", "a zombie of the earlier attempt"
        await broker.lost(worker, "node gone")
        failed = await broker.next_result("a", "driver")
        assert failed["status"] == "failed"
        assert "node gone; given up after 2 attempts (sweep.max_failures 1)" in failed["error"]

    asyncio.run(scenario())
    logged = [e.metrics["train/loss"] for e in read_events(tmp_path / "events.jsonl") if isinstance(e, Logged)]
    assert logged == [3.0, 2.5]


def test_the_next_broker_goes_on_from_the_journal(tmp_path: Path) -> None:
    async def before() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        await submit(broker, "a", "b", "c", "d")
        worker = await group(broker)
        await take(broker, worker)
        await broker.finished("a", 0, end(20))
        await take(broker, worker)
        await broker.log("b", 0, 15, {"train/loss": 1.0})
        asyncio.create_task(broker.evaluated("b", 0, 10, {"eval/nll": 2.0}, "c10", 1.0))  # noqa: RUF006
        await take(broker, await group(broker, "other"))
        asyncio.create_task(broker.evaluated("c", 0, 10, {"eval/nll": 3.0}, "c10", 1.0))  # noqa: RUF006
        await asyncio.sleep(0)

    async def after() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        await submit(broker, "a", "b")
        assert (await broker.next_result("a", "driver"))["status"] == "finished"
        worker = await group(broker)
        assert (await take(broker, worker)).trial_id == "b", "a is not run again"
        await broker.log("b", 0, 15, {"train/loss": 1.0})
        assert await broker.evaluated("b", 0, 10, {"eval/nll": 2.0}, "c10", 1.0) == "continue"
        await broker.finished("b", 0, end(20))
        await broker.stop("c")  # it is not to go on
        assert (await broker.next_result("c", "driver"))["status"] == "stopped_early"
        await broker.flushed()
        drained = await broker.drain()
        assert [e.kind for e in drained if e.trial_id == "b"] == ["submitted", "log", "eval", "finished"]

    asyncio.run(before())
    with (tmp_path / "events.jsonl").open("a") as journal:
        journal.write('{"event": "log", "tri')  # the machine died here
    asyncio.run(after())
    assert events(tmp_path).count(("log", "b")) == 1
    assert events(tmp_path).count(("eval", "b")) == 1


def test_a_group_prefers_trials_whose_weights_it_holds(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        worker = await group(broker)
        await submit(broker, "1", "3", bundle="small")
        await submit(broker, "2", bundle="large")
        order = []
        for _ in range(3):
            order.append((await take(broker, worker)).trial_id)
            await broker.finished(order[-1], 0, end(1))
        assert order == ["1", "3", "2"]

    asyncio.run(scenario())


def test_groups_take_from_their_own_lane_and_end_when_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        await submit(broker, "a")
        other = await group(broker, "other", resource_class="2x1cpu0gpu")
        assert await broker.take(other, 0.01) == "wait"
        waiting = asyncio.create_task(broker.take(other, 5))
        await asyncio.sleep(0)
        await broker.retire(other)
        assert await waiting == "end"
        await broker.fail_resource_class(LANE, "no GPU driver")
        assert (await broker.next_result("a", "driver"))["error"] == "no GPU driver"

    asyncio.run(scenario())


def test_a_paused_trial_frees_its_group_and_goes_on_when_submitted_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        await submit(broker, "a", "b")
        worker = await group(broker)
        await take(broker, worker)
        evaluated = asyncio.create_task(broker.evaluated("a", 0, 10, {"eval/nll": 2.0}, "c10", 1.0))
        assert (await broker.next_result("a", "driver"))["step"] == 10
        await broker.pause("a")
        assert await evaluated == "pause"
        await broker.finished("a", 0, TrialResult(Status.PAUSED, 10, {}, "c10", 1.0))
        assert (await take(broker, worker)).trial_id == "b"
        await broker.finished("b", 0, end(20))
        assert await broker.take(worker, 0.01) == "wait", "paused, it is nobody's"
        await submit(broker, "a")
        assert await take(broker, worker) == Assignment("a", 0, "config of a")
        waiting = asyncio.create_task(broker.next_result("a", "another driver"))
        await broker.finished("a", 0, end(20))
        assert (await waiting)["status"] == "finished"

    asyncio.run(scenario())
    assert events(tmp_path)[2:] == [("eval", "a"), ("paused", "a"), ("finished", "b"), ("finished", "a")]


def test_pause_meets_every_state(tmp_path: Path) -> None:
    """Resumed before its worker let go; paused in the queue; stopped while paused."""

    async def scenario() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        await submit(broker, "a", "b")
        worker = await group(broker)
        await take(broker, worker)
        evaluated = asyncio.create_task(broker.evaluated("a", 0, 10, {}, "c10", 1.0))
        await asyncio.sleep(0)
        await broker.pause("a")
        await broker.pause("b")
        assert await evaluated == "pause"
        await submit(broker, "a")
        await broker.finished("a", 0, TrialResult(Status.PAUSED, 10, {}, "c10", 1.0))
        assert (await take(broker, worker)).trial_id == "a", "b was paused before its turn"
        await broker.stop("b")
        assert (await broker.next_result("b", "driver"))["status"] == "stopped_early"

    asyncio.run(scenario())


def test_a_driver_that_is_replaced_takes_nothing_along(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        await submit(broker, "a")
        await take(broker, await group(broker))
        dead = asyncio.create_task(broker.next_result("a", "dead"))
        await asyncio.sleep(0)
        alive = asyncio.create_task(broker.next_result("a", "alive"))
        await asyncio.sleep(0)
        evaluated = asyncio.create_task(broker.evaluated("a", 0, 10, {}, None, 1.0))
        assert (await alive)["step"] == 10
        assert await dead is None
        again = await broker.next_result("a", "third")
        assert again["step"] == 10, "alive had it, and is gone: it is offered again, and nothing is decided"
        assert not evaluated.done()
        following = asyncio.create_task(broker.next_result("a", "third"))
        assert await evaluated == "continue"
        following.cancel()

    asyncio.run(scenario())


def checkpoint(folder: Path, trial_id: str, step: int, text: str) -> str:
    path = folder / "trials" / trial_id / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "weights").write_text(text)
    return str(path)


async def forked(folder: Path) -> Broker:
    """Trial a goes on from b's state of step 20."""
    broker = Broker(str(folder), max_failures=2)
    await submit(broker, "a", "b")
    for trial_id, step in (("a", 10), ("b", 20)):
        worker = await group(broker, f"g{trial_id}")
        await take(broker, worker)
        path = checkpoint(folder, trial_id, step, trial_id)
        asyncio.create_task(broker.evaluated(trial_id, 0, step, {"eval/nll": float(step)}, path, 1.0))  # noqa: RUF006
    await asyncio.sleep(0)
    fork = asyncio.create_task(broker.fork("a", "b", {"optim.lr": 2e-3}))
    await asyncio.sleep(0.01)
    assert not fork.done(), "their workers still have them"
    for trial_id, step in (("a", 10), ("b", 20)):
        path = str(folder / "trials" / trial_id / f"step-{step:08d}")
        await broker.finished(trial_id, 0, TrialResult(Status.PAUSED, step, {}, path, 1.0))
    assert await fork == 20
    return broker


def test_a_fork_copies_the_donors_state(tmp_path: Path) -> None:
    asyncio.run(forked(tmp_path))
    assert (tmp_path / "trials" / "a" / "step-00000020" / "weights").read_text() == "b"
    assert [path.name for path in (tmp_path / "trials" / "a").iterdir()] == ["step-00000020"]
    assert (tmp_path / "trials" / "b" / "step-00000020" / "weights").read_text() == "b"
    (fork,) = [e for e in read_events(tmp_path / "events.jsonl") if isinstance(e, Forked)]
    assert (fork.trial_id, fork.donor, fork.step, fork.params) == ("a", "b", 20, {"optim.lr": 2e-3})


def test_a_fork_that_a_crash_cut_in_two_is_finished_by_the_next_broker(tmp_path: Path) -> None:
    asyncio.run(forked(tmp_path))
    shutil.rmtree(tmp_path / "trials" / "a")
    checkpoint(tmp_path, "a", 10, "a")

    async def after() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        await submit(broker, "a")
        await take(broker, await group(broker))
        assert await broker.evaluated("a", 0, 20, {}, None, 1.0) == "continue", "known from the donor"

    asyncio.run(after())
    assert (tmp_path / "trials" / "a" / "step-00000020" / "weights").read_text() == "b"
    assert not (tmp_path / "trials" / "a" / "step-00000010").exists()


def test_a_known_result_is_adopted_without_training(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        for _ in range(2):  # a restart asks again
            await broker.adopt("a", {"optim.lr": 1e-3}, "", 80, {"eval/nll": 2.0}, "run-1")
        assert (await broker.next_result("a", "driver"))["status"] == "finished"
        assert await broker.take(await group(broker), 0.01) == "wait"

    asyncio.run(scenario())
    assert events(tmp_path) == [("submitted", "a"), ("eval", "a"), ("finished", "a")]
    assert read_events(tmp_path / "events.jsonl")[-1].reused_from == "run-1"


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_the_first_end_counts(tmp_path: Path, status: str) -> None:
    async def scenario() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        await submit(broker, "a")
        await take(broker, await group(broker))
        await broker.finished("a", 0, TrialResult(Status(status), 3, {}, None, 1.0, "why"))
        await broker.finished("a", 0, end(9))
        assert (await broker.next_result("a", "driver"))["status"] == status

    asyncio.run(scenario())
    assert events(tmp_path).count(("finished", "a")) == 1


def test_a_held_sweep_lets_the_scheduler_decide_and_pauses_what_would_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = Broker(str(tmp_path), max_failures=2)
        await submit(broker, "a", "b", "c")
        first, second = await group(broker, "g1"), await group(broker, "g2")
        await take(broker, first)
        await take(broker, second)
        await broker.hold()
        assert await broker.take(await group(broker, "g3"), 0.01) == "wait", "c is not handed out"
        evaluations = [asyncio.create_task(broker.evaluated(t, 0, 10, {}, "c10", 1.0)) for t in "ab"]
        await asyncio.sleep(0)
        await broker.next_result("a", "driver a")
        going_on = asyncio.create_task(broker.next_result("a", "driver a"))
        await broker.pause("b")  # at a rung
        assert await asyncio.gather(*evaluations) == ["pause", "pause"]
        for trial_id in "ab":
            await broker.finished(trial_id, 0, TrialResult(Status.PAUSED, 10, {}, "c10", 1.0))
        load = await broker.load()
        assert (load.queued, load.busy) == ({}, {}), "nothing is left to do"
        await broker.stop("c", "stopped by the user")
        assert (await broker.next_result("c", "driver c"))["error"] == "stopped by the user"
        going_on.cancel()

    asyncio.run(scenario())
    paused = {e.trial_id: e.held for e in read_events(tmp_path / "events.jsonl") if isinstance(e, Paused)}
    assert paused == {"a": True, "b": False}
    history = SweepState(read_events(tmp_path / "events.jsonl"))
    assert {t.trial_id: t.paused for t in history.trials.values()} == {"a": False, "b": True, "c": False}
