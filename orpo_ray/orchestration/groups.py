"""Worker groups: each one long-lived Ray TorchTrainer that takes trial after trial from the broker."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train

from orpo_ray.orchestration.broker_state import Load
from orpo_ray.orchestration.capacity import Capacity, Resources, give_back_abandoned, place, snapshot
from orpo_ray.orchestration.worker import GroupSpec
from orpo_ray.orchestration.worker_group import WorkerGroup
from orpo_ray.storage.object_store import Storage

_MAX_FAILED_STARTS = 3
"""Groups of a resource class that end without having taken a trial, in a row, before its trials are given up."""
_IDLE_GRACE_S = 3.0
"""A group without work is kept this long before it makes room for another resource class's."""
_LOOK_S = 2.0
"""How often the cluster is looked at: nodes come and go."""
_AFTERMATH_S = 30.0
"""For so long after a group has ended with an error, what its controller had reserved is looked for."""
_END_S = 10.0
"""How long the end of a group's controller takes at most to get here."""


class GroupManager:
    """Starts groups where trials wait and ends those that have none, within what the cluster holds.

    Not thread-safe: `tick` is called by one thread.
    """

    def __init__(
        self,
        broker: Any,
        broker_name: str,
        namespace: str,
        run_dir: Path,
        remote: Storage | None,
        proof: Path | None,
        kinds: set[Resources],
        capacity: Capacity,
        notify: Callable[[str], None],
        max_groups: int | None,
        max_group_trials: int,
    ) -> None:
        """Start one group of each kind, as far as there is room: every kind will be needed.

        Args:
            broker: the sweep's broker, under `broker_name` in `namespace`.
            run_dir: groups keep Ray Train's state in `groups/`, trials their checkpoints in `trials/`,
            remote: or in folders of that name in an object store.
            proof: a file that every node must see before it trains; None where nodes need not share files.
            kinds: what groups may occupy.
            capacity: the cluster now.
            notify: tells the user when trials wait for nodes.
            max_groups: groups running at once at most, i.e. trials training at once.
            max_group_trials: trials after which a group is replaced by a new one.
        """
        self._broker, self._broker_name, self._namespace = broker, broker_name, namespace
        self._run_dir, self._remote, self._proof, self._notify_user = run_dir, remote, proof, notify
        self._kinds = {kind.resource_class: kind for kind in kinds}
        self.capacity = capacity
        """As last looked at."""
        self._looked_at = time.monotonic()
        self._max_groups, self._max_group_trials = max_groups, max_group_trials
        self._groups: dict[str, WorkerGroup] = {}
        self._retiring: set[str] = set()
        self._waiting: set[str] = set()
        """Groups that need nodes which are not there."""
        self._announced: tuple[str, ...] = ()
        self._broken_at = float("-inf")
        """When a group last ended with an error."""
        self._started = 0
        self._failed_starts: dict[str, int] = {}
        # Names are never reused: Ray Train would take up the state of an earlier group of the same name.
        self._stamp = int(time.time())
        free = self._settle({})
        for kind in sorted(kinds, key=lambda k: (k.gpus_per_worker, k.num_workers, k.cpus_per_worker), reverse=True):
            if self._may_start(kind, free):
                self._start(kind)
                free = self._settle({})

    @property
    def slots(self) -> int:
        """Trials that can train at once, or wait for nodes that may come."""
        most = self.capacity.slots(list(self._kinds.values()))
        return most if self._max_groups is None else min(most, self._max_groups)

    def tick(self) -> None:
        """Look once, act once. Call a few times a second."""
        load: Load = ray.get(self._broker.load.remote())
        if time.monotonic() - self._looked_at > _LOOK_S:
            self.capacity, self._looked_at = snapshot(), time.monotonic()
            if self._looked_at - self._broken_at < _AFTERMATH_S:
                give_back_abandoned()
            if any(self._left_without(group_id, load.nodes) for group_id in list(self._groups)):
                load = ray.get(self._broker.load.remote())
        self._reap(load)
        for group_id in self._groups:
            if group_id not in self._retiring and load.assigned.get(group_id, 0) >= self._max_group_trials:
                self._retire(group_id)  # it ends after its present trial, and is replaced where trials wait
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
        """Let every group end by itself, so that nothing is left for Ray to clean up."""
        for group_id in self._groups:
            ray.get(self._broker.retire.remote(group_id))
        deadline = time.monotonic() + timeout_s
        for group_id, group in self._groups.items():
            if group_id not in self._waiting:  # such a one hears nothing before there are nodes for it
                group.join(max(0.0, deadline - time.monotonic()))
        # A thread that is still in `fit()` when Ray is shut down takes the whole process with it (ray 2.60).
        for group_id, group in self._groups.items():
            controller = ray.get(self._broker.controller.remote(group_id)) if group.running else None
            if controller is not None:
                ray.kill(controller)
                group.join(_END_S)

    def _left_without(self, group_id: str, nodes: dict[str, list[str]]) -> bool:
        """Whether a node of the group has died. Then its trial may be taken by another group at once: Ray Train starts
        the group again, but not before there is room for it."""
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
                continue  # it has waited for nodes as long as Ray Train does; the next one goes on waiting
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
        """Find out which groups wait for nodes. Returns what the others leave free of each node.

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
                left = free.get(node, {})  # a node that came since the last snapshot does not count yet
                for kind, need in group.resources.per_worker.items():
                    left[kind] = left.get(kind, 0.0) - need
        self._waiting = {g for g in coming if not place(self._groups[g].resources, list(free.values()))}
        return list(free.values())

    def _may_start(self, request: Resources, free: list[dict[str, float]]) -> bool:
        """Whether there is room for another group, or it should be what makes the autoscaler add nodes: at most as
        many wait for nodes as have some."""
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
        """A group whose resource class has nothing waiting and that has had nothing to do for a while."""
        if self._retiring:
            return None  # room is being made already
        for group_id, idle_seconds in load.idle_seconds.items():
            group = self._groups.get(group_id)
            if group is not None and group.spec.resource_class not in load.queued and idle_seconds > _IDLE_GRACE_S:
                return group_id
        return None

    def _announce_waiting(self, load: Load) -> None:
        """Tell the user once which trials wait for nodes."""
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
            broker=self._broker_name,
            namespace=self._namespace,
            trials_dir=str(self._run_dir / "trials") if self._remote is None else None,
            remote=self._remote,
            proof=None if self._proof is None else str(self._proof),
            threads=resources.cpus_per_worker,
        )
        self._groups[spec.group] = WorkerGroup(spec, resources, self._run_dir / "groups", self._broker)
