"""Random faults to small sweeps, one after another, for hours: `python -m tests.faults.soak`, into docs/reliability.md.

Each sweep goes on, or is started again by its command, until it is done; its final table must be the undisturbed one's.
"""

from __future__ import annotations

import argparse
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import Progress

from benchmarks.rounds import described, save
from tests.faults.__main__ import names
from tests.faults.damage import Damage, Left, damage, left_by
from tests.faults.disturbed import RANKS, SWEEP, Disturbed, Fault
from tests.faults.page import SOAK, write_page

STEPS = 16
SETTINGS = RANKS | {"train.max_steps": STEPS}
TABLE = SWEEP | {
    "max_failures": 100_000,
    "space": {
        "optim.lr": {"type": "grid", "values": [1.0e-3, 3.0e-3]},
        "loss.orpo_lambda": {"type": "grid", "values": [0.0, 0.5]},
    },
}
KINDS: dict[str, tuple[int, str, signal.Signals]] = {
    "worker killed": (6, "ray::RayTrainWorker", signal.SIGKILL),
    "worker preempted (SIGTERM)": (3, "ray::RayTrainWorker", signal.SIGTERM),
    "trial driver killed": (2, "ray::TrialDriver", signal.SIGKILL),
    "group's controller killed": (2, "ray::TrainController", signal.SIGKILL),
    "broker killed": (1, "ray::Broker", signal.SIGKILL),
    "raylet killed": (1, "raylet", signal.SIGKILL),
    "sweep process killed": (1, "", signal.SIGKILL),
    "machine: every process killed": (1, "*", signal.SIGKILL),
}
"""How often of 17, which processes, which signal."""
_SLOW = [
    Fault(f"slow-{trial}-{step}", "forward", "wait", step=step, trial=f"{trial:05d}", times=1_000_000)
    for trial in range(4)
    for step in range(1, STEPS + 1)
]
"""Every step takes a second longer, or most faults would meet processes that only start."""
_SILENT_S = 240.0
"""A sweep whose journal has not grown for so long, without a fault, hangs."""


@dataclass
class Soak:
    """What has happened so far."""

    sweeps: Disturbed
    rng: random.Random
    mean_gap_s: float
    faults: Counter[str] = field(default_factory=Counter)
    commands: int = 0
    hung: int = 0

    def round(self, name: str, most_faults: int, deadline: float, told: Any) -> None:
        """Run one sweep to its end, with faults at random moments until there have been so many in all."""
        file = self.sweeps.write(name, TABLE, **SETTINGS)
        process = self._start(file)
        while True:
            disturbs = self.faults.total() < most_faults and time.monotonic() < deadline
            gap = self.rng.expovariate(1 / self.mean_gap_s) if disturbs else _SILENT_S
            status = self._wait(process, name, gap)
            if status == 0:
                return
            if status is not None:
                process = self._start(file)
            elif disturbs:
                if (kind := self._fault(process)) is not None:
                    self.faults[kind] += 1
                    told(kind)
            else:
                self.hung += 1
                self.sweeps.kill(process)
                process = self._start(file)

    def _start(self, file: Path) -> Any:
        self.commands += 1
        return self.sweeps.start("sweep", str(file))

    def _wait(self, process: Any, name: str, seconds: float) -> int | None:
        """The exit status, or None after so long; where nothing disturbs it, after so long without an event."""
        size, since = -1, time.monotonic()
        while time.monotonic() - since < seconds:
            if (status := process.poll()) is not None:
                return int(status)
            journal = self.sweeps.folder / "runs" / name / "events.jsonl"
            if seconds >= _SILENT_S and journal.exists() and (now := journal.stat().st_size) != size:
                size, since = now, time.monotonic()
            time.sleep(0.05)
        return None

    def _fault(self, process: Any) -> str | None:
        kinds = list(KINDS)
        (kind,) = self.rng.choices(kinds, [KINDS[k][0] for k in kinds])
        _, title, number = KINDS[kind]
        try:
            if title == "*":
                self.sweeps.kill(process)
            elif not title:
                process.send_signal(number)
            else:
                victims = self.sweeps.titled(process, title)
                if not victims:
                    return None  # nothing of that kind is up just now
                self.rng.choice(victims).send_signal(number)
        except psutil.NoSuchProcess:
            return None
        return kind


def main() -> int:
    """Returns 1 where something was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200, help="how many (200)")
    parser.add_argument("--seconds", type=float, default=7200.0, help="no more faults after so long (7200)")
    parser.add_argument("--mean-gap", type=float, default=12.0, help="seconds between two, on average (12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep everything here (default: a temporary folder)")
    arguments = parser.parse_args()
    console = Console()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="orpo-soak-", ignore_cleanup_errors=True) as temporary:
        folder = arguments.folder or Path(temporary)
        sweeps = Disturbed(folder)
        try:
            file = sweeps.write("whole", TABLE, **SETTINGS)
            assert sweeps.finish(sweeps.start("sweep", str(file))) == 0, sweeps.tail()
            whole = left_by(sweeps, "whole")
            sweeps.plan(*_SLOW)
            soak = Soak(sweeps, random.Random(arguments.seed), arguments.mean_gap)
            damages, differing = [], 0
            began = time.monotonic()
            with Progress(console=console) as progress:
                bar = progress.add_task("faults", total=arguments.faults)
                while soak.faults.total() < arguments.faults and time.monotonic() - began < arguments.seconds:
                    name = f"soak-{len(damages)}"
                    soak.round(name, arguments.faults, began + arguments.seconds, lambda _: progress.advance(bar))
                    left = left_by(sweeps, name)
                    damages.append(damage(whole, left))
                    differing += _best(left) != _best(whole) or not damages[-1].is_none
                    console.print(f"{name}: {soak.faults.total()} faults, {damages[-1]}", markup=False, highlight=False)
        finally:
            sweeps.close()
    result = {
        "made": described(shlex.join(["python", "-m", "tests.faults.soak", *sys.argv[1:]])),
        "seconds": round(time.monotonic() - began, 1),
        "faults": dict(soak.faults),
        "rounds": len(damages),
        "trials": len(whole.trials),
        "steps": STEPS,
        "commands": soak.commands,
        "hung": soak.hung,
        "damage": _summed(damages),
        "tables_that_differ": differing,
    }
    save(SOAK, "soak", result)
    write_page(names())
    return 0 if not differing and not soak.hung else 1


def _best(left: Left) -> str:
    return min(left.trials, key=lambda key: left.trials[key]["metrics"]["eval/nll"])


def _summed(damages: list[Damage]) -> dict[str, Any]:
    counts = ("trials_lost", "points_missing", "points_twice", "statuses_wrong", "steps_lost", "steps_again")
    return {key: sum(getattr(d, key) for d in damages) for key in counts} | {
        "loss_difference": max((d.loss_difference for d in damages), default=0.0)
    }


if __name__ == "__main__":
    raise SystemExit(main())
