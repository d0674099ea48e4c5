"""Show a sweep's progress in its own process: the view of `orpo-ray watch`, or lines without a terminal."""

from __future__ import annotations

import time

from rich.console import Console, RenderableType
from rich.live import Live

from orpo_ray.config.space import describe
from orpo_ray.formatting import clock
from orpo_ray.reports.live_state import About, LiveSweep
from orpo_ray.reports.live_view import frame
from orpo_ray.storage.events import Event, Finished, Started, Status, Warned
from orpo_ray.storage.sweep_state import TrialState

_LINE_EVERY_S = 60.0
"""Without a terminal: longest time between lines while trials train."""
_LINES_BESIDE_TRIALS = 20
"""Lines of the live view besides its table of trials: headline, curves, worker groups."""


class SweepProgress:
    """Shows the sweep's events.

    In a terminal it redraws the live view. Otherwise it prints a line for each trial that ends, and a summary of the
    sweep if there was no line for a minute.
    """

    def __init__(self, console: Console, about: About) -> None:
        """Prepare; nothing is drawn before the context is entered."""
        self.console = console
        self._sweep = LiveSweep(about)
        self._live: Live | None = None
        self._printed_at = time.monotonic()

    def __enter__(self) -> SweepProgress:
        if self.console.is_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=2, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def handle(self, events: list[Event]) -> None:
        """Apply events in order. A continued sweep first passes the events of its journal."""
        state = self._sweep.sweep
        is_resumed = not state.trials and any(isinstance(event, Started) for event in events)
        for event in events:
            trial = state.apply(event)
            if isinstance(event, Warned):
                self.log(f"{describe(trial.params)}: {event.message}")
            elif isinstance(event, Finished) and self._live is None:
                self.log(self._line(trial))
        if is_resumed:
            state.restart()
        if self._live is None and time.monotonic() - self._printed_at > _LINE_EVERY_S:
            self.log(self._summary())

    def log(self, line: str) -> None:
        """Print a line; the live view stays below it."""
        self._printed_at = time.monotonic()
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _line(self, trial: TrialState) -> str:
        metric, state = self._sweep.about.metric, self._sweep.sweep
        done = f"[{state.num_ended}/{self._sweep.about.num_trials}]"
        value = trial.last_metrics.get(metric)
        shown = "" if value is None else f"  {metric} {value:.4f}"
        reason = f"  {trial.error.splitlines()[0]}" if trial.error else ""
        return f"{done} {describe(trial.params)}: {trial.status} at step {trial.step}{shown}{reason}"

    def _summary(self) -> str:
        about, state = self._sweep.about, self._sweep.sweep
        trials = [trial for trial in state.trials.values() if trial.status is Status.TRAINING]
        training = [f"{describe(trial.params)} at {trial.step}/{trial.max_steps}" for trial in trials]
        names = f": {', '.join(training[:4])}{', ...' if len(training) > 4 else ''}" if training else ""
        left = self._sweep.left()
        rest = f", at most {clock(left.seconds)} left" if left is not None and left.seconds is not None else ""
        so_far = clock(self._sweep.seconds)
        return f"[{state.num_ended}/{about.num_trials}] {len(training)} in training{names}; {so_far} so far{rest}"

    def __rich__(self) -> RenderableType:
        rows = len(self._sweep.sweep.trials) + _LINES_BESIDE_TRIALS
        return frame(self._sweep, self.console.width, min(self.console.height - 1, rows), None, None)
