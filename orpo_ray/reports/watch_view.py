"""The interactive view of `orpo-ray watch`: keys, confirmations and drawing."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from orpo_ray.config.space import describe
from orpo_ray.reports.live_state import LiveSweep
from orpo_ray.reports.live_view import frame
from orpo_ray.reports.watch import Source, WatchError

_POLL_S = 0.5
_KEYS = {b"\x1b[A": "up", b"\x1bOA": "up", b"k": "up", b"\x1b[B": "down", b"\x1bOB": "down", b"j": "down"}
_HELP = """\
↑ ↓    select a trial (also k, j)
s      stop the selected trial: it ends at its next evaluation, keeps its checkpoint, and the search goes on
S, Q   stop the sweep: no new trials, those in training pause at their next evaluation; the same command continues it
q      leave this view; the sweep goes on (also Ctrl-C)
?      show this, or hide it"""


def current(source: Source) -> LiveSweep:
    """The sweep's current state."""
    reading = source.read(None, 0)
    sweep = LiveSweep(reading.about)
    sweep.take(reading)
    while not reading.is_whole:
        sweep.take(reading := source.read(reading.about.sweep_id, reading.offset))
    return sweep


def once(source: Source, console: Console) -> None:
    """Print one frame, with all trials."""
    console.print(frame(current(source), console.width, None, None, None))


class View:
    """State and keys of the view, independent of a terminal."""

    def __init__(self, source: Source) -> None:
        """Read the whole journal."""
        self._source = source
        self._offset, self._sweep_id = 0, ""
        self.refresh()

    sweep: LiveSweep
    is_left = False
    """Whether the user wants to leave."""
    _selected: str | None = None
    _question: tuple[str, Callable[[], str]] | None = None
    _message = ""
    _shows_help = False

    def refresh(self) -> None:
        """Read new events."""
        while True:
            reading = self._source.read(self._sweep_id, self._offset)
            if reading.about.sweep_id != self._sweep_id:  # the first read, or a new sweep in the same directory
                self.sweep, self._sweep_id, self._selected = LiveSweep(reading.about), reading.about.sweep_id, None
            self.sweep.take(reading)
            self._offset = reading.offset
            if reading.is_whole:
                return

    @property
    def selected(self) -> str | None:
        """The trial that `s` would stop: the best one until another is selected."""
        if self._selected is not None:
            return self._selected
        return next((trial.trial_id for trial in self.sweep.ranked()), None)

    def press(self, key: str) -> None:
        """Handle a key."""
        self._message = ""
        if self._question is not None:
            _, action = self._question
            self._question = None
            self._message = action() if key == "y" else "not stopped"
            return
        match key:
            case "up" | "down":
                ids = [trial.trial_id for trial in self.sweep.ranked()]
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
        if trial_id is None or self.sweep.sweep.trials[trial_id].status.has_ended:
            self._message = "no trial is selected that could be stopped"
            return

        def stop() -> str:
            self._source.ask("stop_trial", trial_id)
            return f"trial {trial_id} ends at its next evaluation"

        self._selected = trial_id
        self._question = f"stop trial {trial_id} ({describe(self.sweep.sweep.trials[trial_id].params)})?", stop

    def _ask_to_stop_sweep(self) -> None:
        def stop() -> str:
            self._source.ask("stop_sweep")
            return "the sweep stops once every trial in training has come to its next evaluation"

        self._question = "stop the whole sweep? Running it again continues it.", stop

    def draw(self, width: int, height: int) -> RenderableType:
        """Draw a frame of exactly this size, in characters and lines."""
        if self._shows_help:
            return Text(_HELP + "\n\n? back", overflow="fold")
        if self._question is not None:
            footer = Text(f"{self._question[0]} y/n", style="bold yellow")
        elif self._message:
            footer = Text(self._message, style="yellow")
        else:
            footer = Text("↑↓ select  s stop trial  S stop sweep  q leave  ? help", style="dim")
        return frame(self.sweep, width, height, self.selected, footer)


def live(source: Source, console: Console) -> None:
    """Show the sweep until it ends or the user leaves; print it once if it does not run.

    Raises:
        WatchError: there is no terminal.
    """
    if not (sys.stdin.isatty() and console.is_terminal):
        raise WatchError("no terminal to draw in: use --once for one frame, or --json")
    view = View(source)
    if view.sweep.state == "running":
        try:
            with _keyboard() as pressed, Live(console=console, screen=True, auto_refresh=False) as screen:
                refreshed_at = time.monotonic()
                while view.sweep.state == "running" and not view.is_left:
                    screen.update(view.draw(console.width, console.height), refresh=True)
                    for key in pressed(_POLL_S):
                        view.press(key)
                    if time.monotonic() - refreshed_at >= _POLL_S:
                        view.refresh()
                        refreshed_at = time.monotonic()
        except KeyboardInterrupt:
            view.is_left = True
    if view.is_left:
        console.print(
            f"the sweep is still running; to view it again: orpo-ray watch {view.sweep.about.name}", markup=False
        )
        return
    console.print(frame(view.sweep, console.width, None, None, None))
    if view.sweep.state == "interrupted":
        console.print("interrupted; the command that started it continues where it stopped", style="yellow")


@contextmanager
def _keyboard() -> Iterator[Callable[[float], list[str]]]:
    """A function that reads pressed keys, without echo. The terminal is restored at the end, also after SIGTERM."""
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def leave(signum: int, stack: Any) -> None:
        raise SystemExit(128 + signum)

    def pressed(timeout_s: float) -> list[str]:
        if not select.select([stdin], [], [], timeout_s)[0]:
            return []
        data = os.read(stdin, 1024)
        if not data:  # the terminal was closed
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
