"""Every fault, as a sweep of two trials that it happens to and a comparison with the one it does not happen to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.faults.damage import Damage, Left, damage, left_by, without
from tests.faults.disturbed import RANKS, STEPS, SWEEP, Disturbed, Fault, Hung, fill, memory_group, small_disk
from tests.integration.test_mlflow_server import Server
from tests.support.s3 import S3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fault did."""

    damage: Damage
    commands: int = 1
    """How often the sweep's command had to be given: more than once where the fault ends the sweep itself."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What else was looked at, and must be true or is a number."""

    @property
    def is_good(self) -> bool:
        """Nothing lost, and what had to be true was."""
        return self.damage.is_none and all(value is not False for value in self.notes.values())


@dataclass(frozen=True, slots=True)
class Bench:
    """A folder for all scenarios, and how long those last that may last shorter."""

    folder: Path
    outage_s: float = 60.0

    def disturbed(self, name: str) -> Disturbed:
        """A new place for a sweep."""
        return Disturbed(self.folder / name)

    def whole(self) -> Left:
        """What the undisturbed sweep leaves; it is run at the first call."""
        sweeps = self.disturbed("whole")
        if not (sweeps.folder / "runs" / "whole" / "results.json").exists():
            file = sweeps.write("whole", SWEEP, **RANKS)
            status = sweeps.finish(sweeps.start("sweep", str(file)))
            assert status == 0, sweeps.tail()
        return left_by(sweeps, "whole")


@dataclass
class Run:
    """One disturbed sweep, by the name of its scenario. Use as a context manager."""

    bench: Bench
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    database: Path | None = None
    """Of an MLflow server."""
    when: list[float] = field(default_factory=list)
    commands: int = 0
    hung: int = 0

    def __enter__(self) -> Run:
        self.whole = self.bench.whole()
        return self

    def __exit__(self, *error: object) -> None:
        self.sweeps.close()

    @cached_property
    def sweeps(self) -> Disturbed:
        return self.bench.disturbed(self.name)

    def start(self) -> Any:
        """Give the sweep's command."""
        self.commands += 1
        file = self.sweeps.write(self.name, SWEEP, **RANKS | self.settings)
        return self.sweeps.start("sweep", str(file))

    def complete(self, process: Any, attempts: int = 2) -> None:
        """Wait for the sweep's end; where that is not a good one, give the same command again."""
        for last in [*[False] * attempts, True]:
            try:
                status = self.sweeps.finish(process)
            except Hung:
                self.hung += 1
                self.sweeps.kill(process)
                status = -1
            if status == 0:
                return
            assert not last, f"exit status {status} after {self.commands} commands\n{self.sweeps.tail()}"
            process = self.start()

    def outcome(self, *inside: str, clock_jumped: bool = False, **notes: Any) -> Outcome:
        """What it cost. `inside` are faults of the plan, each of which must have happened."""
        for name in inside:
            marks = self.sweeps.fired(name)
            assert marks, f"the fault {name} never happened"
            self.when += marks
        left = left_by(self.sweeps, self.name, self.database)
        if self.hung:
            notes["ended by itself"] = False
        return Outcome(damage(self.whole, left, self.when, clock_jumped), self.commands, notes)


def in_worker(bench: Bench, name: str, *faults: Fault) -> Outcome:
    """Faults inside of workers; the sweep is to get over them by itself."""
    with Run(bench, name) as run:
        run.sweeps.plan(*faults)
        run.complete(run.start())
        return run.outcome(*(fault.name for fault in faults))


def slow_from(step: int) -> list[Fault]:
    """Make every step from this one on take a second longer, so that there is time for something to happen."""
    return [Fault(f"slow-{number}", "forward", "wait", step=number) for number in range(step, STEPS + 1)]


def worker_in_forward(bench: Bench) -> Outcome:
    return in_worker(bench, "worker_in_forward", Fault("forward", "forward", "kill", step=6))


def worker_in_backward(bench: Bench) -> Outcome:
    return in_worker(bench, "worker_in_backward", Fault("backward", "backward", "kill", step=7, rank=0))


def worker_in_checkpoint(bench: Bench) -> Outcome:
    return in_worker(bench, "worker_in_checkpoint", Fault("checkpoint", "save", "kill", step=8))


def several_workers(bench: Bench) -> Outcome:
    """All three in one sweep, for who has little time."""
    return in_worker(
        bench,
        "several_workers",
        Fault("forward", "forward", "kill", step=3),
        Fault("backward", "backward", "kill", step=6, rank=0),
        Fault("checkpoint", "save", "kill", step=8, trial="00001"),
    )


def allocation_once(bench: Bench) -> Outcome:
    """A rank gets no memory when it asks for some; the other one does not know."""
    return in_worker(bench, "allocation_once", Fault("allocation", "forward", "allocate", step=6))


def allocation_always(bench: Bench) -> Outcome:
    """A trial never gets the memory that it asks for on both ranks. It fails; the other must not."""
    with Run(bench, "allocation_always") as run:
        ranks = [Fault(f"allocation-{r}", "forward", "allocate", step=6, rank=r, times=20) for r in (0, 1)]
        run.sweeps.plan(*ranks)
        assert run.sweeps.finish(run.start()) == 0, run.sweeps.tail()
        left = left_by(run.sweeps, run.name)
        ((key, trial),) = [(k, t) for k, t in left.trials.items() if t["trial_id"] == "00000"]
        is_told = trial["status"] == "failed" and "allocate" in (trial["error"] or "")
        return Outcome(
            damage(without(run.whole, key), without(left, key)), 1, {"its own trial failed, and says why": is_told}
        )


def killed_for_memory(bench: Bench) -> Outcome:
    """The kernel kills a rank that takes more than its control group may."""
    with memory_group(512) as group:
        return in_worker(bench, "killed_for_memory", Fault("memory", "forward", "swell", step=6, group=str(group)))


def from_outside(bench: Bench, name: str, title: str, step: int = 6) -> Outcome:
    """SIGKILL a process by what Ray calls it. The trial takes seconds from then on: it must not be over before the
    death is noticed."""
    with Run(bench, name) as run:
        run.sweeps.plan(*slow_from(step + 1))
        process = run.start()
        run.sweeps.reached(name, step)
        run.when.append(run.sweeps.kill_titled(process, title))
        run.complete(process)
        return run.outcome()


def driver(bench: Bench) -> Outcome:
    return from_outside(bench, "driver", "ray::TrialDriver")


def controller(bench: Bench) -> Outcome:
    return from_outside(bench, "controller", "ray::TrainController")


def broker(bench: Bench) -> Outcome:
    return from_outside(bench, "broker", "ray::Broker")


def raylet(bench: Bench) -> Outcome:
    return from_outside(bench, "raylet", "raylet")


def sweep_process(bench: Bench) -> Outcome:
    """Only the command itself; what it leaves behind must not disturb the next one."""
    with Run(bench, "sweep_process") as run:
        process = run.start()
        run.sweeps.reached(run.name, 6)
        run.when.append(time.time())
        process.kill()
        process.wait(30)
        run.complete(run.start())
        return run.outcome()


def machine(bench: Bench) -> Outcome:
    """Everything at once, as when the power fails, and the same command afterwards."""
    with Run(bench, "machine") as run:
        process = run.start()
        run.sweeps.reached(run.name, 6)
        run.when.append(time.time())
        run.sweeps.kill(process)
        run.complete(run.start())
        return run.outcome()


def damaged_checkpoint(bench: Bench, name: str, harm: Callable[[Path], None]) -> Outcome:
    """The machine dies, and the newest checkpoint has been changed when it is back: the one before must be used."""
    with Run(bench, name) as run:
        process = run.start()
        run.sweeps.reached(name, 10)
        run.when.append(time.time())
        run.sweeps.kill(process)
        newest = max((run.sweeps.folder / "runs" / name / "trials" / "00000").glob("step-????????"))
        harm(max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size))
        run.complete(run.start())
        outcome = run.outcome()
        return Outcome(outcome.damage, outcome.commands, {"used the one before": outcome.damage.continued_from == (4,)})


def truncated_checkpoint(bench: Bench) -> Outcome:
    return damaged_checkpoint(bench, "truncated_checkpoint", lambda file: os.truncate(file, file.stat().st_size // 2))


def flipped_bit(bench: Bench) -> Outcome:
    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)

    return damaged_checkpoint(bench, "flipped_bit", flip)


def mlflow_down(bench: Bench) -> Outcome:
    """The server is killed and comes back; training must not wait for it."""
    with Run(bench, "mlflow_down") as run:
        database = run.sweeps.folder / "server.db"
        server = Server(f"sqlite:///{database}", run.sweeps.folder)
        server.start()
        try:
            run.settings["tracking.uri"], run.database = server.uri, database
            process = run.start()
            run.sweeps.reached(run.name, 2)
            server.kill()
            run.when.append(time.time())
            time.sleep(bench.outage_s)
            steps = len(run.sweeps.events(run.name))
            server.start()
            run.complete(process)
            server.kill()
            before = len([e for e in run.sweeps.events(run.name) if e["time"] / 1000 < run.when[0]])
            return run.outcome(**{"training went on meanwhile": steps > before + 1})
        finally:
            server.kill()


def storage_refuses(bench: Bench) -> Outcome:
    """The object store takes nothing for a while: neither journal nor checkpoints can be kept."""
    with Run(bench, "storage_refuses") as run:
        refuse = run.sweeps.folder / "refuse"
        store = S3(run.sweeps.folder, refuse)
        try:
            run.settings["storage"], run.sweeps.environment = store.uri, store.environment
            run.sweeps.plan(*slow_from(6))
            process = run.start()
            run.sweeps.reached(run.name, 5)
            run.when.append(time.time())
            refuse.touch()
            time.sleep(min(bench.outage_s, 30.0))
            refuse.unlink()
            accepted = time.time()
            run.complete(process)
            logged = [e["time"] / 1000 for e in run.sweeps.events(run.name) if e["event"] == "log"]
            went_on = any(run.when[0] + 1 < moment < accepted for moment in logged)
            return run.outcome(**{"training went on meanwhile": went_on})
        finally:
            store.stop()


def disk_full(bench: Bench) -> Outcome:
    """Not a byte is left for journal, checkpoints and MLflow's file, and then there is again."""
    with Run(bench, "disk_full") as run, small_disk(run.sweeps.folder / "runs", 200) as disk:
        process = run.start()
        run.sweeps.reached(run.name, 5)
        run.when.append(time.time())
        filler = fill(disk)
        time.sleep(min(bench.outage_s, 20.0))
        filler.unlink()
        run.complete(process)
        return run.outcome()


def clock_jump(bench: Bench) -> Outcome:
    """The clock of every Python process goes an hour forward, then two back."""
    with Run(bench, "clock_jump") as run:
        clock = run.sweeps.folder / "clock"
        clock.write_text("0", encoding="utf-8")
        run.sweeps.environment = {"ORPO_RAY_TEST_CLOCK": str(clock)}
        run.sweeps.plan(*slow_from(4))
        process = run.start()
        run.sweeps.reached(run.name, 3)
        clock.write_text("3600", encoding="utf-8")
        run.sweeps.reached(run.name, 9)
        clock.write_text("-3600", encoding="utf-8")
        run.complete(process)
        times = [e["time"] for e in run.sweeps.events(run.name)]
        jumped = max(times) - min(times) > 3_000_000
        return run.outcome(clock_jumped=True, **{"the clock did jump": jumped})


def preempted(bench: Bench) -> Outcome:
    """SIGTERM to a worker: it writes a checkpoint of the step that it is at before it goes."""
    outcome = in_worker(bench, "preempted", Fault("notice", "forward", "terminate", step=7))
    return Outcome(outcome.damage, outcome.commands, {"no step trained again": outcome.damage.steps_again == 0})


SCENARIOS: Sequence[tuple[str, Callable[[Bench], Outcome]]] = (
    ("worker killed in forward", worker_in_forward),
    ("worker killed in backward", worker_in_backward),
    ("worker killed in the middle of a checkpoint write", worker_in_checkpoint),
    ("trial driver killed", driver),
    ("group's controller killed", controller),
    ("broker killed", broker),
    ("raylet killed", raylet),
    ("sweep process killed", sweep_process),
    ("machine: every process killed", machine),
    ("newest checkpoint truncated", truncated_checkpoint),
    ("newest checkpoint with a flipped bit", flipped_bit),
    ("MLflow server down", mlflow_down),
    ("object store refuses writes", storage_refuses),
    ("disk full", disk_full),
    ("no memory for one rank, once", allocation_once),
    ("no memory for one trial, ever", allocation_always),
    ("killed by the kernel for its memory", killed_for_memory),
    ("worker preempted (SIGTERM)", preempted),
    ("clock jumps", clock_jump),
)
"""What the table calls it, and how it is done. A scenario raises PermissionError where the machine does not let it."""
