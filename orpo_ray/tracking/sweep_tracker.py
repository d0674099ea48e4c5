"""Record a sweep in MLflow from its journal: one parent run per sweep, one child run per trial."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orpo_ray.config import ExperimentConfig
from orpo_ray.provenance import without_password
from orpo_ray.storage.events import Event
from orpo_ray.tracking.child_runs import ChildRuns
from orpo_ray.tracking.delivery import Delivery, Unreachable, backoffs, is_temporary
from orpo_ray.tracking.parent_run import ParentRun
from orpo_ray.tracking.uri import TrackingError, bound_requests, resolve_uri

log = logging.getLogger(__name__)

_SENDERS = 8
"""Parallel requests to a server, each for a different run; a SQLite file gets one writer."""

_SYSTEM = "system metrics"
"""Delivery key of system metrics: they belong to the parent run but need not wait for its end."""


@dataclass(frozen=True, slots=True)
class _SystemSample:
    metrics: dict[str, float]
    step: int
    time_ms: int


@dataclass(frozen=True, slots=True)
class _Attachment:
    path: Path


@dataclass(frozen=True, slots=True)
class _End:
    results: dict[str, Any]
    interrupted: bool


class SweepTracker:
    """Delivers a sweep's events to MLflow from background threads; an unreachable server delays nothing else.

    A trial's events are sent in order, in batches; with a server, several trials in parallel. While the server cannot
    be reached, events wait in memory, and the journal keeps them on disk: pass the whole journal again after a restart
    of the sweep. Nothing is written twice, because a point's step, time and value come from the event, and points
    below a run's last step are not sent.
    """

    def __init__(self, config: ExperimentConfig, sweep_id: str, provenance: dict[str, Any]) -> None:
        """Nothing is contacted before `start`.

        Args:
            config: the experiment, with its sweep if it has one.
            sweep_id: identifies the parent run, also after a restart.
            provenance: from `provenance.collect`.

        Raises:
            TrackingError: the tracking URI is a relative path.
        """
        self.uri = resolve_uri(config.tracking.uri, config.run_dir.parent)
        self._config, self._sweep_id, self._provenance = config, sweep_id, provenance
        self._last_time = 0
        self._lock = threading.Lock()
        self._delivery = Delivery("MLflow", self._send, 1 if self.uri.startswith("sqlite") else _SENDERS)

    @property
    def run_ids(self) -> dict[str, str]:
        """Trial id -> MLflow run id, for trials delivered so far; complete after `flush`."""
        return self._children.run_ids

    @property
    def parent_id(self) -> str:
        """Run id of the parent, after `start`."""
        return self._parent.run_id

    def start(self, timeout_s: float = 30.0) -> str:
        """Find or create the experiment and the sweep's parent run, and begin to deliver.

        Args:
            timeout_s: how long a server that does not answer is waited for.

        Returns:
            Run id of the parent.

        Raises:
            TrackingError: no answer in time, or the server refuses (experiment deleted, no permission).
        """
        bound_requests()
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # else two lines for every trial
        if self.uri.startswith("sqlite"):
            Path(self.uri.partition(":///")[2]).parent.mkdir(parents=True, exist_ok=True)
        give_up = time.monotonic() + timeout_s
        for wait in backoffs():
            try:
                client = MlflowClient(self.uri)
                self._parent = ParentRun(client, self.uri, self._config, self._sweep_id, self._provenance)
                self._children = ChildRuns(client, self._config, self._provenance, self._parent)
                break
            except (MlflowException, OSError) as error:
                refuses_us = isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403)
                if refuses_us or not is_temporary(error) or time.monotonic() + wait > give_up:
                    remedy = (
                        "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a user who may write there"
                        if refuses_us
                        else "Start the server, correct tracking.uri (or MLFLOW_TRACKING_URI), or leave both unset for "
                        "a SQLite file in output_dir"
                    )
                    raise TrackingError(
                        f"MLflow at {without_password(self.uri)} cannot be used: {without_password(str(error))}\n"
                        f"{remedy}"
                    ) from error
                log.warning("MLflow does not answer yet: %s", without_password(str(error)))
                time.sleep(wait)
        self._delivery.start()
        return self.parent_id

    def handle(self, events: Iterable[Event]) -> None:
        """Queue events of the journal, in order; returns at once. Repeated events have no effect."""
        events = list(events)
        with self._lock:
            self._last_time = max([self._last_time, *(event.time for event in events)])
        self._delivery.put((event.trial_id, event) for event in events)

    def handle_system(self, metrics: dict[str, float]) -> None:
        """Queue a sample of all nodes for the parent run, as the next point of each chart; returns at once.

        Args:
            metrics: `system/node_<i>/<metric>` -> value; see `node_metrics`.
        """
        with self._lock:
            step, self._parent.next_system_step = self._parent.next_system_step, self._parent.next_system_step + 1
        self._delivery.put([(_SYSTEM, _SystemSample(metrics, step, int(time.time() * 1000)))])

    def attach(self, paths: Iterable[Path]) -> None:
        """Queue files as artifacts of the parent run; they are read on delivery, at the latest in `close`."""
        self._delivery.put((None, _Attachment(path)) for path in paths)

    def flush(self, timeout_s: float = 60.0) -> int:
        """Wait at most `timeout_s` for the delivery of all queued events. Returns the number not delivered."""
        return self._delivery.flush(timeout_s)

    def close(self, results: dict[str, Any], *, interrupted: bool = False, timeout_s: float = 60.0) -> int:
        """Deliver remaining events and end the parent run, waiting at most `timeout_s`.

        The parent run ends FINISHED if a trial finished, else FAILED; KILLED if interrupted. Runs of unfinished
        trials are ended too, KILLED or FAILED, and are reopened if the sweep continues later.

        Args:
            results: from `results.summarize`.
            interrupted: the sweep was stopped from outside before its end.

        Returns:
            Number of events that could not be delivered, normally 0. They are in the journal: run the sweep again.
        """
        self._delivery.put([(None, _End(results, interrupted))])
        undelivered = self._delivery.close(timeout_s)
        if undelivered:
            log.warning(
                "%d events did not reach MLflow at %s; they are in the journal: run the same command again to deliver",
                undelivered,
                without_password(self.uri),
            )
        return undelivered

    # ---- called in the delivery's threads: one trial's events in order, different trials in parallel

    def _send(self, key: str | None, items: list[Any]) -> None:
        """Write events of a trial (the key is its id), samples of the nodes (`_SYSTEM`), or the sweep's end (None).

        Raises:
            Unreachable: the server cannot be reached now.
        """
        try:
            if key is None:
                self._finish(items)
            elif key == _SYSTEM:
                for sample in items:
                    self._parent.log_system(sample.metrics, sample.time_ms, sample.step)
            else:
                self._children.deliver(key, items)
        except (MlflowException, OSError) as error:
            if not is_temporary(error):
                raise
            if key is not None and key != _SYSTEM:
                self._children.doubt(key)
            raise Unreachable(without_password(str(error))) from error

    def _finish(self, items: list[_Attachment | _End]) -> None:
        for item in items:
            if isinstance(item, _Attachment):
                self._parent.attach(item.path)
                continue
            # The journal's time, not the clock's: closing the same sweep again writes the same points.
            at = self._last_time or int(time.time() * 1000)
            self._children.end_unfinished("KILLED" if item.interrupted else "FAILED", at)
            self._parent.end(item.results, item.interrupted, self.run_ids, at)
