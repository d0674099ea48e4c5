"""Move events from the broker to MLflow, Prometheus and the terminal, and handle user requests, while a sweep runs."""

from __future__ import annotations

import _thread
import threading
from typing import Any

import ray

from orpo_ray.config import ExperimentConfig
from orpo_ray.orchestration.broker_state import Load
from orpo_ray.orchestration.capacity import SharedFolder
from orpo_ray.orchestration.checks import require_shared_folders
from orpo_ray.orchestration.groups import GroupManager
from orpo_ray.reports.progress import SweepProgress
from orpo_ray.search.scheduler import SweepScheduler
from orpo_ray.storage import requests
from orpo_ray.tracking.node_metrics import ClusterMonitor
from orpo_ray.tracking.prometheus import SweepMetrics
from orpo_ray.tracking.sweep_tracker import SweepTracker

_TICK_S = 0.2


class EventPump(threading.Thread):
    """Thread that forwards events and node metrics, drives the group manager, and handles the user's requests."""

    def __init__(
        self,
        config: ExperimentConfig,
        handle: Any,
        manager: GroupManager,
        shared: SharedFolder | None,
        tracker: SweepTracker,
        progress: SweepProgress,
    ) -> None:
        super().__init__(name="event pump", daemon=True)
        self._config, self._shared = config, shared
        self._monitor = ClusterMonitor() if config.tracking.system_metrics else None
        self._broker, self._manager, self._tracker, self._progress = handle, manager, tracker, progress
        assert config.sweep is not None
        self._metrics = SweepMetrics(config.name, config.sweep.metric, config.sweep.mode)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._inbox: requests.Inbox | None = None
        self._scheduler: SweepScheduler | None = None
        self.asked_to_stop = False
        """Whether the user has asked to interrupt the sweep."""
        self._is_interrupted = False

    def listen(self, inbox: requests.Inbox, scheduler: SweepScheduler) -> None:
        """Handle the user's requests from now on."""
        self._scheduler, self._inbox = scheduler, inbox

    def run(self) -> None:
        try:
            while not self._stopping.wait(_TICK_S):
                self._manager.tick()
                if self._shared is not None:
                    require_shared_folders(self._config, self._shared.nodes_without_access(self._manager.capacity))
                if self._scheduler is not None:
                    self._scheduler.resize(self._manager.slots)
                self._move_events()
                if self._monitor is not None and (sample := self._monitor.tick()):
                    self._tracker.handle_system(sample)
                if self._inbox is not None and self._scheduler is not None:
                    self._handle_requests(self._inbox, self._scheduler)
        except BaseException as error:
            self._error = error
            # Else Tune would wait forever for groups that are not started. `stop` raises the error.
            _thread.interrupt_main()

    def _handle_requests(self, inbox: requests.Inbox, scheduler: SweepScheduler) -> None:
        for request in inbox.new():
            if request.trial_id is None:
                self.asked_to_stop = True
                ray.get(self._broker.hold.remote())
            else:
                ray.get(self._broker.stop.remote(request.trial_id, request.reason))
                scheduler.stopped_by_user.add(request.trial_id)
        # Tune does not catch the interrupt before its loop has begun.
        if self.asked_to_stop and scheduler.is_running and not self._is_interrupted:
            load: Load = ray.get(self._broker.load.remote())
            if not load.busy:
                self._is_interrupted = True
                _thread.interrupt_main()

    def stop(self, timeout_s: float) -> None:
        """Stop the thread, end the groups within `timeout_s`, and move the remaining events.

        Raises:
            Exception: the error that ended the thread.
        """
        self._stopping.set()
        self.join()
        self._manager.shutdown(timeout_s)
        ray.get(self._broker.flushed.remote())
        self._move_events()
        if self._error is not None:
            raise self._error

    def _move_events(self) -> None:
        events = ray.get(self._broker.drain.remote())
        if events:
            self._tracker.handle(events)
            self._progress.handle(events)
            self._metrics.handle(events)
        if self._metrics.is_due:
            load: Load = ray.get(self._broker.load.remote())
            queued, backlog = sum(load.queued.values()), self._tracker.flush(timeout_s=0)
            self._metrics.refresh(len(load.busy), len(load.idle_seconds), queued, backlog)
