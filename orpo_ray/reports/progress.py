"""A running sweep in the terminal: what is trained now, how far it is, how long it takes still."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orpo_ray.config.space import describe


@dataclass(slots=True)
class _Trial:
    params: dict[str, Any]
    status: str = "waiting"
    step: int = 0
    max_steps: int = 0
    value: float | None = None
    log_odds: float | None = None
    started: float | None = None
    error: str | None = None


@dataclass(slots=True)
class SweepProgress:
    """Follows the sweep's events. In a terminal it redraws a table, elsewhere it prints a line per ended trial,
    and one on the whole where none has ended for a minute."""

    console: Console
    metric: str
    num_trials: int
    _trials: dict[str, _Trial] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _seconds_of_ended: list[float] = field(default_factory=list)
    _live: Live | None = None
    _spoke: float = field(default_factory=time.monotonic)

    def __enter__(self) -> SweepProgress:
        if self.console.is_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=2, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def handle(self, events: list[dict[str, Any]]) -> None:
        """Take note of events, in order."""
        resumed = not self._trials and any(event["event"] == "started" for event in events)
        for event in events:
            self._take(event)
        if resumed:  # the first events are then the journal's: nobody trains yet
            for trial in self._trials.values():
                if trial.status not in _ENDED:
                    trial.status = "waiting"
        if self._live is None and time.monotonic() - self._spoke > _LINE_EVERY_S:
            self.log(self._summary())

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "submitted":
            self._trials[event["trial_id"]] = _Trial(event["params"])
            return
        trial = self._trials[event["trial_id"]]
        match event["event"]:
            case "started":
                trial.status, trial.step, trial.max_steps = "training", event["step"], event["max_steps"]
                trial.started = time.monotonic()
            case "log":
                trial.step = event["step"]
            case "eval":
                trial.step = event["step"]
                trial.value = event["metrics"].get(self.metric)
                trial.log_odds = event["metrics"].get("eval/log_odds")
            case "paused":
                trial.status = "paused"
            case "forked":
                trial.params, trial.step = event["params"], event["step"]
            case "preempted":
                trial.status = "waiting"
            case "warning":
                self.log(f"{describe(trial.params)}: {event['message']}")
            case "retry":
                trial.status = f"again ({event['attempt']})"
            case "finished":
                trial.status, trial.step, trial.error = event["status"], event["steps"], event["error"]
                if event["status"] == "finished":
                    self._seconds_of_ended.append(event["train_seconds"])
                if self._live is None:
                    value = "" if trial.value is None else f"  {self.metric} {trial.value:.4f}"
                    done = sum(t.status in _ENDED for t in self._trials.values())
                    reason = f"  {trial.error.splitlines()[0]}" if trial.error else ""
                    line = f"[{done}/{self.num_trials}] {describe(trial.params)}: {trial.status} at step {trial.step}"
                    self.log(line + value + reason)

    def log(self, line: str) -> None:
        """Print a line; a live table stays below it."""
        self._spoke = time.monotonic()
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _summary(self) -> str:
        trials = self._trials.values()
        ended = sum(trial.status in _ENDED for trial in trials)
        training = [f"{describe(t.params)} at {t.step}/{t.max_steps}" for t in trials if t.status == "training"]
        names = f": {', '.join(training[:4])}{', ...' if len(training) > 4 else ''}" if training else ""
        left = self.seconds_left()
        rest = f", at most {_clock(left)} left" if left is not None else ""
        so_far = _clock(time.monotonic() - self._began)
        return f"[{ended}/{self.num_trials}] {len(training)} in training{names}; {so_far} so far{rest}"

    def seconds_left(self) -> float | None:
        """At most: as if no further trial were stopped early. None until a trial has ended."""
        training = [t for t in self._trials.values() if t.status == "training"]
        if not self._seconds_of_ended or not training:
            return None
        mean = sum(self._seconds_of_ended) / len(self._seconds_of_ended)
        ended = sum(t.status in _ENDED for t in self._trials.values())
        now = time.monotonic()
        rest = sum(max(0.0, mean - (now - (t.started or now))) for t in training)
        return (rest + mean * (self.num_trials - ended - len(training))) / len(training)

    def __rich__(self) -> RenderableType:
        ended = sum(t.status in _ENDED for t in self._trials.values())
        header = Text()
        header.append(f"{ended}/{self.num_trials} trials", style="bold")
        header.append(f"   {_clock(time.monotonic() - self._began)} so far")
        left = self.seconds_left()
        header.append(f", at most {_clock(left)} left" if left is not None else ", time left unknown yet", style="dim")
        overall = Table.grid(padding=(0, 2))
        overall.add_row(ProgressBar(total=self.num_trials, completed=ended, width=40), header)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for title in ("trial", "", "step", self.metric, "eval/log_odds", "status"):
            table.add_column(title, justify="right" if title in ("step", self.metric, "eval/log_odds") else "left")
        for trial in self._shown():
            style = "" if trial.status == "training" else "red" if trial.status in ("failed", "diverged") else "dim"
            bar = ProgressBar(total=max(trial.max_steps, 1), completed=trial.step, width=20)
            steps = f"{trial.step}/{trial.max_steps}" if trial.max_steps else ""
            table.add_row(
                describe(trial.params),
                bar,
                steps,
                "" if trial.value is None else f"{trial.value:.4f}",
                "" if trial.log_odds is None else f"{trial.log_odds:+.3f}",
                trial.status.replace("_", " "),
                style=style,
            )
        return Group(overall, table) if self._trials else overall

    def _shown(self) -> list[_Trial]:
        """As many as the terminal has lines for: the last that ended, those in training, those that wait."""
        trials = self._trials.values()
        ended = [t for t in trials if t.status in _ENDED]
        training = [t for t in trials if t.status not in (*_ENDED, "waiting")]
        waiting = [t for t in trials if t.status == "waiting"]
        room = max(6, self.console.height - 4 - len(training))
        kept = max(room - len(waiting), room // 2)
        return [*ended[-kept:], *training, *waiting[: room - min(len(ended), kept)]]


_LINE_EVERY_S = 60.0
"""Without a terminal: how long nothing may be said while trials are in training."""
_ENDED = ("finished", "stopped_early", "diverged", "failed")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
