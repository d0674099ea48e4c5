"""Move events from the broker to MLflow, Prometheus and the terminal while a sweep runs."""

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
    """Moves events from the broker, and how busy the nodes are, to MLflow, Prometheus and the terminal; lets the group
    manager look around."""

    def __init__(
        self,
        config: ExperimentConfig,
        handle: Any,
        manager: GroupManager,
        shared: SharedFolder | None,
        tracker: SweepTracker,
        progress: SweepProgress,
        monitor: ClusterMonitor | None,
    ) -> None:
        super().__init__(name="follower", daemon=True)
        self._config, self._shared, self._monitor = config, shared, monitor
        self._broker, self._manager, self._tracker, self._progress = handle, manager, tracker, progress
        assert config.sweep is not None
        self._metrics = SweepMetrics(config.name, config.sweep.metric, config.sweep.mode)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._inbox: requests.Inbox | None = None
        self._conductor: SweepScheduler | None = None
        self.asked_to_stop = False
        """The user wants the sweep interrupted."""
        self._is_interrupted = False

    def listen(self, inbox: requests.Inbox, conductor: SweepScheduler) -> None:
        """From now on, do what the user asks for."""
        self._conductor, self._inbox = conductor, inbox

    def run(self) -> None:
        try:
            while not self._stopping.wait(_TICK_S):
                self._manager.tick()
                if self._shared is not None:
                    require_shared_folders(self._config, self._shared.nodes_without_access(self._manager.capacity))
                if self._conductor is not None:
                    self._conductor.resize(self._manager.slots)
                self._move_events()
                if self._monitor is not None and (sample := self._monitor.tick()):
                    self._tracker.handle_system(sample)
                if self._inbox is not None and self._conductor is not None:
                    self._handle_requests(self._inbox, self._conductor)
        except BaseException as error:
            self._error = error
            _thread.interrupt_main()  # else Tune would wait for ever for groups that nobody starts; `stop` tells why

    def _handle_requests(self, inbox: requests.Inbox, conductor: SweepScheduler) -> None:
        for request in inbox.new():
            if request.trial_id is None:
                self.asked_to_stop = True
                ray.get(self._broker.hold.remote())
            else:
                ray.get(self._broker.stop.remote(request.trial_id, request.reason))
                conductor.unwanted.add(request.trial_id)
        # Before its loop has begun, Tune would not catch the interrupt.
        if self.asked_to_stop and conductor.is_running and not self._is_interrupted:
            load: Load = ray.get(self._broker.load.remote())
            if not load.busy:
                self._is_interrupted = True
                _thread.interrupt_main()

    def stop(self, timeout_s: float) -> None:
        """Give the groups so long to end, move what is left.

        Raises:
            Exception: the thread had failed.
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
