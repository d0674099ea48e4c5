"""`orpo-ray watch` in a real terminal beside a real sweep, and through a Ray cluster."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from orpo_ray.storage import requests
from tests.support.journals import write_journal
from tests.support.real_sweeps import Sweeps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_STEPS = 60


class Terminal:
    """`orpo-ray watch` in a pseudo-terminal of 80 × 24."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.theirs = theirs  # kept open, so that its settings can be looked at when the view has gone
        self.before = termios.tcgetattr(theirs)
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orpo_ray.cli", "watch", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment | {"TERM": "xterm-256color", "NO_COLOR": "1"},
            start_new_session=True,
        )
        self.text = ""

    def read(self, until: str, timeout_s: float = 60) -> re.Match[str]:
        """Wait for text that matches, behind what was read before; escape sequences are left out."""
        shown, deadline = "", time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if select.select([self._ours], [], [], 0.2)[0]:
                new = os.read(self._ours, 65536).decode("utf-8", "replace")
                self.text += new
                shown += new
                if found := re.search(until, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)):
                    return found
        raise AssertionError(f"no {until!r} within {timeout_s} s; shown: {shown[-3000:]}")

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait(self, timeout_s: float = 60) -> int:
        """Its exit code; reads on meanwhile, else the view would wait for us."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self._ours], [], [], 0.2)[0]:
                self.text += os.read(self._ours, 65536).decode("utf-8", "replace")
        while select.select([self._ours], [], [], 0.2)[0]:
            self.text += os.read(self._ours, 65536).decode("utf-8", "replace")
        return self.process.wait(1)

    def is_restored(self) -> bool:
        """Whether line editing and echo, the cursor and the normal screen are back."""
        sequences = [s for s in re.findall(r"\x1b\[\?(\d+[hl])", self.text) if s[:-1] in ("25", "1049")]
        return termios.tcgetattr(self.theirs) == self.before and {"25h", "1049l"} == set(sequences[-2:])

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)
        os.close(self.theirs)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    started: list[Terminal] = []
    yield started
    for terminal in started:
        terminal.close()


def test_a_trial_and_then_the_sweep_are_stopped_by_key_and_the_sweep_is_continued(
    sweeps: Sweeps, terminals: list[Terminal]
) -> None:
    file = sweeps.write(
        "watched",
        {"metric": "eval/nll", "space": {"optim.lr": {"type": "grid", "values": [1.0e-3, 2.0e-3, 3.0e-3, 4.0e-3]}}},
        **{"train.max_steps": NUM_STEPS, "train.eval_every": 4},
    )
    sweep = sweeps.start("sweep", str(file), "--num-cpus", "2")
    sweeps.wait_for("watched", "started")
    terminal = Terminal("watched", "--output-dir", str(sweeps.folder / "runs"))
    terminals.append(terminal)

    terminal.read(r"training \d")
    terminal.press("s")
    stopped = terminal.read(r"stop trial (\d+) \(.*?\)\? y/n")[1]
    terminal.press("n")
    terminal.read("not stopped")
    terminal.press("sy")
    terminal.read(f"trial {stopped} ends at its next evaluation")
    end = sweeps.wait_for("watched", "finished", trial_id=stopped)
    assert end["status"] == "stopped_early"
    assert end["steps"] < NUM_STEPS
    assert re.fullmatch(r"stopped by the user at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", end["error"])
    assert Path(end["checkpoint"]).is_dir()
    following = sweeps.wait_for("watched", "started", trial_id="00002")
    assert following["time"] >= end["time"], "the search goes on with the place that became free"

    terminal.press("S")
    terminal.read(r"stop the whole sweep\?.* y/n")
    terminal.press("y")
    output, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, output
    assert "the same command continues" in output
    assert terminal.wait() == 0
    assert terminal.is_restored()
    assert "interrupted; the command that started it" in terminal.text

    events = sweeps.events("watched")
    asked = next(r for r in requests.asked_so_far(sweeps.folder / "runs" / "watched") if r.what == "stop_sweep").time
    paused = {e["trial_id"]: e["step"] for e in events if e["event"] == "paused" and e["time"] >= asked}
    assert paused, "what trains pauses, and does not end"
    begun = {e["trial_id"] for e in events if e["event"] == "started" and e["time"] > asked + 1000}
    assert begun <= paused.keys(), "only what a group had taken already may still begin, and pauses too"
    assert sweeps.results("watched")["interrupted"]
    parent, children = sweeps.mlflow_runs("watched")
    assert {parent.info.status, children[stopped].info.status} == {"KILLED"}
    assert children[stopped].data.tags["orpo_ray.error"] == end["error"]

    sweeps.run("sweep", str(file), "--num-cpus", "2")
    later = sweeps.events("watched")[len(events) :]
    resumed = {e["trial_id"]: e["step"] for e in later if e["event"] == "started"}
    assert {t: resumed[t] for t in paused} == paused, "from where they paused, not from an older checkpoint"
    assert stopped not in resumed
    results = sweeps.results("watched")
    statuses = {t["trial_id"]: (t["status"], t["steps"]) for t in results["trials"]}
    assert statuses.pop(stopped) == ("stopped_early", end["steps"])
    assert statuses == dict.fromkeys({"00000", "00001", "00002", "00003"} - {stopped}, ("finished", NUM_STEPS))
    assert not results["interrupted"]
    parent, children = sweeps.mlflow_runs("watched")
    assert parent.info.status == "FINISHED"
    assert {r.info.status for t, r in children.items() if t != stopped} == {"FINISHED"}
    after = Terminal("watched", "--output-dir", str(sweeps.folder / "runs"))
    terminals.append(after)
    assert after.wait() == 0, "the final state of a sweep that has ended, and no view"
    assert "watched  ended" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", after.text)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Path]:
    """A run directory that looks as if a process ran the sweep."""
    run_dir = write_journal(tmp_path / "runs" / "shown")
    with (run_dir / "sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield run_dir


@pytest.mark.parametrize("how", ["q", "SIGTERM"])
def test_the_terminal_is_as_before_however_the_view_is_left(running: Path, terminals: list[Terminal], how: str) -> None:
    terminal = Terminal(str(running))
    terminals.append(terminal)
    terminal.read(r"q leave")
    assert termios.tcgetattr(terminal.theirs) != terminal.before
    fcntl.ioctl(terminal.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 140, 0, 0))
    terminal.read(r"trend +3\.0000")  # drawn anew, with the curves at the right
    match how:
        case "q":
            terminal.press("q")
        case "Ctrl-C":
            terminal.process.send_signal(signal.SIGINT)
        case "SIGTERM":
            terminal.process.terminate()
    assert terminal.wait() == (143 if how == "SIGTERM" else 0)
    assert terminal.is_restored()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield started
    started.shutdown()


def test_a_sweep_on_a_cluster_is_watched_through_its_head_node(
    cluster: Cluster, running: Path, terminals: list[Terminal]
) -> None:
    place = ["shown", "--output-dir", str(running.parent), "--address", cluster.address]
    command = [sys.executable, "-m", "orpo_ray.cli", "watch"]
    printed = subprocess.run([*command, *place, "--json"], capture_output=True, check=True).stdout
    seen: dict[str, Any] = json.loads(printed)
    assert (seen["state"], len(seen["trials"])) == ("running", 3)
    terminal = Terminal(*place)
    terminals.append(terminal)
    terminal.read("q leave")
    terminal.press("Sy")
    terminal.read("the sweep stops once")
    assert [r.what for r in requests.asked_so_far(running)] == ["stop_sweep"]
    terminal.press("q")
    assert terminal.wait() == 0
    missing = subprocess.run([*command, "none", *place[1:], "--once"], capture_output=True, text=True)
    assert (missing.returncode, "no sweep 'none'" in missing.stderr) == (2, True)
