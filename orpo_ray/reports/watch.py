"""`orpo-ray watch`: a sweep as it runs, in the terminal, here or on a cluster.

What is shown comes from the sweep's journal, followed by offset; what the user asks for goes the other way, through
`control`. Nothing here holds a sweep up: it neither knows nor notices who looks at it.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from orpo_ray.config import ExperimentConfig
from orpo_ray.config.space import describe
from orpo_ray.errors import DamagedFileError, NoSuchRunError, UserError
from orpo_ray.files import read_json
from orpo_ray.provenance import without_password
from orpo_ray.reports.live_state import About, Board, Reading
from orpo_ray.reports.live_view import frame
from orpo_ray.storage import requests, results
from orpo_ray.storage.find import find_run_dir
from orpo_ray.storage.run_dir import EVENTS_FILE, LOCK_FILE, SWEEP_FILE
from orpo_ray.tracking.uri import resolve_uri, ui_command

_CHUNK = 1 << 22
"""Bytes of the journal that are read at once."""
_POLL_S = 0.5
_HEAD_NODE = {"node:__internal_head__": 1e-4}
_KEYS = {b"\x1b[A": "up", b"\x1bOA": "up", b"k": "up", b"\x1b[B": "down", b"\x1bOB": "down", b"j": "down"}
_HELP = """\
↑ ↓    select a trial (also k, j)
s      stop the selected trial: it ends at its next evaluation, keeps its checkpoint, and the search goes on
S, Q   stop the sweep: no new trials, those in training pause at their next evaluation; the same command continues it
q      leave this view; the sweep goes on (also Ctrl-C)
?      show this, or hide it"""


class WatchError(UserError, RuntimeError):
    """The sweep cannot be watched as asked for; the message says what to do."""


# ---- reading --------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """A run directory, here or elsewhere."""

    def read(self, sweep_id: str | None, offset: int) -> Reading:
        """What is new behind `offset`; from the beginning if the sweep is not the one of `sweep_id`."""

    def ask(self, what: requests.What, trial_id: str | None = None) -> None:
        """See `control.request`."""


class RunDir:
    """A run directory on this machine. On a cluster this class is an actor on the head node."""

    def __init__(self) -> None:
        """Nothing is looked at before `open`, whose errors a remote caller then gets as they are."""
        self._path = Path()
        self._about: About | None = None

    def open(self, name: str, output_dir: str) -> None:
        """Find the sweep.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        self._path = find_run_dir(name, output_dir)
        if not (self._path / SWEEP_FILE).is_file():
            raise NoSuchRunError(
                f"{self._path / SWEEP_FILE}: no such file, so this cannot be watched; see orpo-ray report"
            )

    def read(self, sweep_id: str | None, offset: int) -> Reading:
        """See `Source`.

        Raises:
            DamagedFileError: sweep.json or a line of the journal is damaged.
        """
        # In this order: when the process that ran the sweep is gone, nothing is written any more.
        is_running = _is_locked(self._path / LOCK_FILE)
        kept = read_json(self._path / SWEEP_FILE)
        if self._about is None or kept["sweep_id"] != self._about.sweep_id:
            self._about = _about(kept, self._path)
        if sweep_id != self._about.sweep_id:
            offset = 0
        events, end, size = _follow(self._path / EVENTS_FILE, offset)
        is_complete = not is_running and not results.is_open(self._path)
        if is_complete:
            is_complete = not results.load_results(self._path).get("interrupted", False)
        return Reading(
            self._about,
            events,
            end,
            end in (size, offset),
            is_running,
            is_complete,
            frozenset(r.trial_id for r in requests.asked_so_far(self._path) if r.trial_id is not None),
            int(time.time() * 1000),
        )

    def ask(self, what: requests.What, trial_id: str | None = None) -> None:
        """See `control.request`."""
        requests.request(self._path, what, trial_id)


class _Remote:
    """A `RunDir` on the head node of a cluster."""

    def __init__(self, address: str, name: str, output_dir: str) -> None:
        import ray

        self._address = address
        there = ray.remote(num_cpus=0, resources=_HEAD_NODE)(RunDir)
        self._actor = there.remote()
        self._call("open", name, output_dir)

    def read(self, sweep_id: str | None, offset: int) -> Reading:
        reading: Reading = self._call("read", sweep_id, offset)
        return reading

    def ask(self, what: requests.What, trial_id: str | None = None) -> None:
        self._call("ask", what, trial_id)

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=60)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
            raise WatchError(
                f"the head node of the Ray cluster at {self._address} does not answer ({error}). orpo_ray must be "
                "installed there; the sweep itself is not touched by this"
            ) from error


@contextmanager
def opened(name: str, output_dir: str, address: str | None) -> Iterator[Source]:
    """The sweep `name`, below `output_dir` on this machine or on the head node of the Ray cluster at `address`.

    Raises:
        FileNotFoundError: there is no such sweep.
        WatchError: no cluster answers, or a relative path is given for one.
    """
    if address is None:
        here = RunDir()
        here.open(name, output_dir)
        yield here
        return
    if not (Path(output_dir).is_absolute() or Path(name).is_absolute()):
        raise WatchError(
            f"--output-dir {output_dir} is relative, which means nothing on another machine: give the absolute path "
            "that it has on the head node"
        )
    import ray

    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise WatchError(
            f"no Ray cluster answers at {address} ({error}): give ray://HEAD:10001 or, on a machine of the cluster, "
            "auto or the head node's HOST:PORT"
        ) from error
    try:
        yield _Remote(address, name, output_dir)
    finally:
        ray.shutdown()


def _about(kept: dict[str, Any], run_dir: Path) -> About:
    config, sweep = ExperimentConfig.model_validate(kept["config"]).as_sweep()
    return About(
        sweep_id=kept["sweep_id"],
        name=config.name,
        run_dir=str(run_dir),
        metric=sweep.metric,
        mode=sweep.mode,
        num_trials=sweep.num_trials + sweep.num_confirmations,
        budget_hours=sweep.budget.device_hours if sweep.budget else None,
        mlflow=without_password(ui_command(resolve_uri(config.tracking.uri, run_dir.absolute().parent))),
    )


def _is_locked(path: Path) -> bool:
    """Whether another process holds the lock; tried with a shared one, let go at once."""
    if not path.exists():
        return False
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _follow(path: Path, offset: int) -> tuple[list[dict[str, Any]], int, int]:
    """Whole lines from `offset` on, the byte behind them, and the file's size. A half-written line is left."""
    if not path.exists():
        return [], 0, 0
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(_CHUNK)
        while len(data) >= _CHUNK and b"\n" not in data and (more := file.read(_CHUNK)):
            data += more
    whole = data[: data.rfind(b"\n") + 1]
    events = []
    for line in whole.splitlines():
        try:
            event = json.loads(line)
        except ValueError as error:
            raise DamagedFileError(
                f"{path}: damaged between bytes {offset} and {offset + len(whole)}: {error}"
            ) from None
        if event["event"] == "log":
            speed = event["metrics"].get("perf/pairs_per_second")
            event["metrics"] = {} if speed is None else {"perf/pairs_per_second": speed}
        events.append(event)
    return events, offset + len(whole), path.stat().st_size


# ---- the view -------------------------------------------------------------------------------------------------------


def current(source: Source) -> Board:
    """All that the journal tells now."""
    board = Board(reading := source.read(None, 0))
    while not reading.is_whole:
        board.take(reading := source.read(reading.about.sweep_id, reading.offset))
    return board


def once(source: Source, console: Console) -> None:
    """Print one frame, with all trials."""
    console.print(frame(current(source), console.width, None, None, None))


class View:
    """The live view and its keys, apart from the terminal."""

    def __init__(self, source: Source) -> None:
        """Read all that is there."""
        self._source = source
        self._offset, self._sweep_id = 0, ""
        self.refresh()

    board: Board
    is_left = False
    """The user wants to leave."""
    _selected: str | None = None
    _question: tuple[str, Callable[[], str]] | None = None
    _message = ""
    _shows_help = False

    def refresh(self) -> None:
        """Take note of what is new."""
        while True:
            reading = self._source.read(self._sweep_id, self._offset)
            if reading.about.sweep_id != self._sweep_id:  # at first, or a new sweep in the place of the old
                self.board, self._sweep_id, self._selected = Board(reading), reading.about.sweep_id, None
            else:
                self.board.take(reading)
            self._offset = reading.offset
            if reading.is_whole:
                return

    @property
    def selected(self) -> str | None:
        """The trial that `s` would stop: the best, until another is chosen."""
        if self._selected is not None:
            return self._selected
        return next((trial.trial_id for trial in self.board.ranked()), None)

    def press(self, key: str) -> None:
        """Do what a key means."""
        self._message = ""
        if self._question is not None:
            _, action = self._question
            self._question = None
            self._message = action() if key == "y" else "not stopped"
            return
        match key:
            case "up" | "down":
                ids = [trial.trial_id for trial in self.board.ranked()]
                if ids and self.selected is not None:
                    place = ids.index(self.selected) + (1 if key == "down" else -1)
                    self._selected = ids[min(max(place, 0), len(ids) - 1)]
            case "s":
                self._ask_to_stop_trial()
            case "S" | "Q":
                self._ask_to_stop_sweep()
            case "?":
                self._shows_help = not self._shows_help
            case "q":
                self.is_left = True

    def _ask_to_stop_trial(self) -> None:
        trial_id = self.selected
        if trial_id is None or self.board.history.trials[trial_id].status is not None:
            self._message = "no trial is selected that could be stopped"
            return

        def stop() -> str:
            self._source.ask("stop_trial", trial_id)
            return f"trial {trial_id} ends at its next evaluation"

        self._selected = trial_id
        self._question = f"stop trial {trial_id} ({describe(self.board.history.trials[trial_id].params)})?", stop

    def _ask_to_stop_sweep(self) -> None:
        def stop() -> str:
            self._source.ask("stop_sweep")
            return "the sweep stops once every trial in training has come to its next evaluation"

        self._question = "stop the whole sweep? Running it again continues it.", stop

    def draw(self, width: int, height: int) -> RenderableType:
        """A frame of exactly that size."""
        if self._shows_help:
            return Text(_HELP + "\n\n? back", overflow="fold")
        if self._question is not None:
            footer = Text(f"{self._question[0]} y/n", style="bold yellow")
        elif self._message:
            footer = Text(self._message, style="yellow")
        else:
            footer = Text("↑↓ select  s stop trial  S stop sweep  q leave  ? help", style="dim")
        return frame(self.board, width, height, self.selected, footer)


def live(source: Source, console: Console) -> None:
    """Show the sweep until it ends or the user leaves; a sweep that does not run is printed once.

    Raises:
        WatchError: there is no terminal.
    """
    if not (sys.stdin.isatty() and console.is_terminal):
        raise WatchError("no terminal to draw in: use --once for one frame, or --json")
    view = View(source)
    if view.board.state == "running":
        try:
            with _keyboard() as pressed, Live(console=console, screen=True, auto_refresh=False) as screen:
                looked = time.monotonic()
                while view.board.state == "running" and not view.is_left:
                    screen.update(view.draw(console.width, console.height), refresh=True)
                    for key in pressed(_POLL_S):
                        view.press(key)
                    if time.monotonic() - looked >= _POLL_S:
                        view.refresh()
                        looked = time.monotonic()
        except KeyboardInterrupt:
            view.is_left = True
    if view.is_left:
        console.print(f"the sweep goes on; orpo-ray watch {view.board.about.name} shows it again", markup=False)
        return
    console.print(frame(view.board, console.width, None, None, None))
    if view.board.state == "interrupted":
        console.print("interrupted; the command that started it continues where it stopped", style="yellow")


@contextmanager
def _keyboard() -> Iterator[Callable[[float], list[str]]]:
    """Keys as they are pressed, without echo. The terminal is as before at the end, also after an error or SIGTERM."""
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def leave(signum: int, stack: Any) -> None:
        raise SystemExit(128 + signum)

    def pressed(timeout_s: float) -> list[str]:
        if not select.select([stdin], [], [], timeout_s)[0]:
            return []
        data = os.read(stdin, 1024)
        if not data:  # the terminal is gone
            raise SystemExit(128 + signal.SIGHUP)
        keys, at = [], 0
        while at < len(data):
            size = 3 if data[at : at + 3] in _KEYS else 1
            keys.append(_KEYS.get(data[at : at + size], data[at : at + 1].decode("ascii", "replace")))
            at += size
        return keys

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        tty.setcbreak(stdin)
        silent = termios.tcgetattr(stdin)
        silent[6][termios.VSUSP] = b"\x00"  # a suspended view would leave the terminal in this state
        termios.tcsetattr(stdin, termios.TCSADRAIN, silent)
        yield pressed
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTERM, previous)
