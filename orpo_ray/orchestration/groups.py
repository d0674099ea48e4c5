"""Start and end worker groups, each a long-lived Ray TorchTrainer that trains one trial after another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train

from orpo_ray.config import SweepConfig
from orpo_ray.orchestration.broker_address import BrokerAddress
from orpo_ray.orchestration.broker_state import Load
from orpo_ray.orchestration.capacity import Capacity, Resources, give_back_abandoned, place, snapshot
from orpo_ray.orchestration.worker import GroupSpec
from orpo_ray.orchestration.worker_group import WorkerGroup
from orpo_ray.storage.run_dir import SweepFolder

_MAX_FAILED_STARTS = 3
"""A resource class's trials fail after this many of its groups in a row have ended without taking a trial."""
_IDLE_GRACE_S = 3.0
"""An idle group is kept this long before it makes room for a group of another resource class."""
_SNAPSHOT_EVERY_S = 2.0
"""Interval between snapshots of the cluster: nodes come and go."""
_AFTERMATH_S = 30.0
"""Time after a group's error in which resources that its controller left reserved are given back."""
_KILL_TIMEOUT_S = 10.0
"""Time allowed for `fit()` to return after its controller was killed."""


class GroupManager:
    """Starts groups for waiting trials and ends idle groups, within the cluster's capacity.

    Not thread-safe: `tick` is called by one thread.
    """

    def __init__(
        self,
        broker: Any,
        address: BrokerAddress,
        folder: SweepFolder,
        sweep: SweepConfig,
        kinds: set[Resources],
        capacity: Capacity,
        notify: Callable[[str], None],
    ) -> None:
        """Start one group of each kind, as far as there is room: every kind will be needed.

        Args:
            broker: actor handle of the sweep's broker.
            address: of the broker, for the workers.
            folder: the sweep's. Groups keep Ray Train's state in `groups/`, trials their checkpoints in `trials/`.
            sweep: limits the groups that run at once (`max_concurrent`) and the trials of a group (`max_group_trials`).
            kinds: resources that a group may need.
            capacity: the cluster now.
            notify: tells the user when trials wait for nodes.
        """
        self._broker, self._address, self._folder, self._notify_user = broker, address, folder, notify
        self._kinds = {kind.resource_class: kind for kind in kinds}
        self.capacity = capacity
        """The cluster at the last snapshot."""
        self._snapshot_at = time.monotonic()
        self._max_groups, self._max_group_trials = sweep.max_concurrent, sweep.max_group_trials
        self._groups: dict[str, WorkerGroup] = {}
        self._retiring: set[str] = set()
        self._waiting: set[str] = set()
        """Groups for which the cluster has no room yet."""
        self._announced: tuple[str, ...] = ()
        self._broken_at = float("-inf")
        """When a group last ended with an error."""
        self._started = 0
        self._failed_starts: dict[str, int] = {}
        # Names are never reused: Ray Train would restore the state of an earlier group of the same name.
        self._stamp = int(time.time())
        free = self._settle({})
        for kind in sorted(kinds, key=lambda k: (k.gpus_per_worker, k.num_workers, k.cpus_per_worker), reverse=True):
            if self._may_start(kind, free):
                self._start(kind)
                free = self._settle({})

    @property
    def slots(self) -> int:
        """Number of trials that can train at once, or wait for nodes that may be added."""
        most = self.capacity.slots(list(self._kinds.values()))
        return most if self._max_groups is None else min(most, self._max_groups)

    def tick(self) -> None:
        """Start and end groups as the load requires. Call a few times a second."""
        load: Load = ray.get(self._broker.load.remote())
        if time.monotonic() - self._snapshot_at > _SNAPSHOT_EVERY_S:
            self.capacity, self._snapshot_at = snapshot(), time.monotonic()
            if self._snapshot_at - self._broken_at < _AFTERMATH_S:
                give_back_abandoned()
            if any(self._requeue_if_node_died(group_id, load.nodes) for group_id in list(self._groups)):
                load = ray.get(self._broker.load.remote())
        self._reap(load)
        for group_id in self._groups:
            if group_id not in self._retiring and load.assigned.get(group_id, 0) >= self._max_group_trials:
                self._retire(group_id)  # it ends after its current trial, and is replaced if trials wait
        free = self._settle(load.nodes)
        for resource_class, queued in load.queued.items():
            up = [
                g
                for g, group in self._groups.items()
                if group.spec.resource_class == resource_class and g not in self._retiring
            ]
            without_work = [g for g in up if g not in load.busy]
            if queued <= sum(g not in self._waiting for g in without_work):
                continue
            if queued > len(without_work) and self._may_start(self._kinds[resource_class], free):
                self._start(self._kinds[resource_class])
                free = self._settle(load.nodes)
            elif (idle := self._idle_group(load)) is not None:
                self._retire(idle)
        self._announce_waiting(load)

    def shutdown(self, timeout_s: float) -> None:
        """Let every group end by itself, so that Ray has nothing to clean up; kill those that take longer.

        Args:
            timeout_s: time for all groups together.
        """
        for group_id in self._groups:
            ray.get(self._broker.retire.remote(group_id))
        deadline = time.monotonic() + timeout_s
        for group_id, group in self._groups.items():
            if group_id not in self._waiting:  # a group without nodes does not hear that it is retired
                group.join(max(0.0, deadline - time.monotonic()))
        # A thread that is still in `fit()` when Ray is shut down ends the whole process (ray 2.60).
        for group_id, group in self._groups.items():
            controller = ray.get(self._broker.controller.remote(group_id)) if group.running else None
            if controller is not None:
                ray.kill(controller)
                group.join(_KILL_TIMEOUT_S)

    def _requeue_if_node_died(self, group_id: str, nodes: dict[str, list[str]]) -> bool:
        """Requeue the group's trial if one of its nodes has died. Returns whether one has.

        Ray Train restarts the group only once there is room for it; another group can take the trial at once.
        """
        dead = set(nodes.get(group_id, ())) - self.capacity.nodes.keys()
        if dead:
            ray.get(self._broker.lost.remote(group_id, f"node {min(dead)} has died"))
        return bool(dead)

    def _reap(self, load: Load) -> None:
        for group_id, group in list(self._groups.items()):
            if group_id in load.busy:
                self._failed_starts[group.spec.resource_class] = 0
            if group.running:
                continue
            del self._groups[group_id]
            if group_id in self._retiring:
                self._retiring.discard(group_id)
                if group.error is None:
                    continue
            if group.error is not None:
                self._broken_at = time.monotonic()
            resource_class, reason = group.spec.resource_class, group.error or "the worker group ended by itself"
            ray.get(self._broker.lost.remote(group_id, reason))
            if group_id in self._waiting:
                continue  # Ray Train gave up waiting for nodes; the next group waits again
            self._failed_starts[resource_class] = self._failed_starts.get(resource_class, 0) + 1
            if self._failed_starts[resource_class] >= _MAX_FAILED_STARTS:
                ray.get(
                    self._broker.fail_resource_class.remote(
                        resource_class, f"no worker group could be kept running: {reason}"
                    )
                )

    def _retire(self, group_id: str) -> None:
        self._retiring.add(group_id)
        ray.get(self._broker.retire.remote(group_id))

    def _settle(self, nodes: dict[str, list[str]]) -> list[dict[str, float]]:
        """Determine which groups wait for nodes. Returns the free resources of each node, other groups deducted.

        Args:
            nodes: group -> node of each rank, for groups whose processes are up.
        """
        free = {node: dict(resources) for node, resources in self.capacity.nodes.items()}
        coming = []
        for group_id, group in self._groups.items():
            if group_id not in nodes:
                coming.append(group_id)
                continue
            for node in nodes[group_id]:
                left = free.get(node, {})  # a node added since the last snapshot does not count yet
                for kind, need in group.resources.per_worker.items():
                    left[kind] = left.get(kind, 0.0) - need
        self._waiting = {g for g in coming if not place(self._groups[g].resources, list(free.values()))}
        return list(free.values())

    def _may_start(self, request: Resources, free: list[dict[str, float]]) -> bool:
        """Whether there is room for another group, or its request should make the autoscaler add nodes.

        At most as many groups wait for nodes as have nodes, and at least one may.
        """
        if self._max_groups is not None and len(self._groups) >= self._max_groups:
            return False
        if place(request, [dict(node) for node in free]):
            return True
        all_groups = [group.resources for group in self._groups.values()]
        return (
            self.capacity.is_elastic
            and len(self._waiting) < max(1, len(self._groups) - len(self._waiting))
            and self.capacity.could_hold([*all_groups, request])
        )

    def _idle_group(self, load: Load) -> str | None:
        """A group that has been idle for a while and whose resource class has no waiting trials."""
        if self._retiring:
            return None  # another group is ending already, which makes room
        for group_id, idle_seconds in load.idle_seconds.items():
            group = self._groups.get(group_id)
            if group is not None and group.spec.resource_class not in load.queued and idle_seconds > _IDLE_GRACE_S:
                return group_id
        return None

    def _announce_waiting(self, load: Load) -> None:
        """Tell the user once which resources waiting trials need."""
        unmet = tuple(sorted(wanted for wanted in load.queued if not self._holds_one_of(wanted)))
        if unmet != self._announced:
            self._announced = unmet
            if unmet:
                needs = " and ".join(self._kinds[wanted].describe() for wanted in unmet)
                self._notify_user(f"Trials wait for nodes: each needs {needs}, and {self.capacity.describe()}.")

    def _holds_one_of(self, resource_class: str) -> bool:
        live = [dict(node) for node in self.capacity.nodes.values()]
        return place(self._kinds[resource_class], live)

    def _start(self, resources: Resources) -> None:
        self._started += 1
        spec = GroupSpec(
            group=f"group-{self._stamp}-{self._started:03d}",
            resource_class=resources.resource_class,
            broker=self._address,
            folder=self._folder,
            threads=resources.cpus_per_worker,
        )
        self._groups[spec.group] = WorkerGroup(spec, resources, self._broker)
