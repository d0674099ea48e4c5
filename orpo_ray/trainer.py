"""Worker groups: each one long-lived Ray TorchTrainer that takes trial after trial from the broker."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from orpo_ray.broker import Load
from orpo_ray.config import ScalingConfig
from orpo_ray.worker import GroupSpec, run_group

_MAX_GROUP_RESTARTS = 10
"""Ray restarts a crashed group this often; then a new group is started, if trials still wait."""
_COLLECTIVE_TIMEOUT_S = 1800
"""A rank that never arrives fails the group after this."""
_MAX_FAILED_STARTS = 3
"""Groups of a lane that end without having taken a trial, one after another, before its trials are given up."""
_IDLE_GRACE_S = 3.0
"""A group without work is kept this long before it makes room for another lane's."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one group occupies. Trials that need the same share a lane: any group of it can run them."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: int

    @classmethod
    def of(cls, scaling: ScalingConfig, cluster_has_gpus: bool) -> Resources:
        """`use_gpu: auto` means: where the cluster has GPUs."""
        use_gpu = cluster_has_gpus if scaling.use_gpu == "auto" else scaling.use_gpu
        return cls(scaling.num_workers, scaling.cpus_per_worker, int(use_gpu))

    @property
    def lane(self) -> str:
        """Name of the lane."""
        return f"{self.num_workers}x{self.cpus_per_worker}cpu{self.gpus_per_worker}gpu"


class WorkerGroup:
    """A running group. `fit()` blocks, so it lives in a thread of the sweep process."""

    def __init__(self, spec: GroupSpec, resources: Resources, groups_dir: Path) -> None:
        """Start at once; processes come up in the background."""
        self.spec = spec
        self.resources = resources
        self.error: str | None = None
        self._trainer = TorchTrainer(
            run_group,
            train_loop_config=spec,
            torch_config=TorchConfig(
                backend="nccl" if resources.gpus_per_worker else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.num_workers,
                use_gpu=bool(resources.gpus_per_worker),
                resources_per_worker={"CPU": resources.cpus_per_worker}
                | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
            ),
            run_config=ray.train.RunConfig(
                name=spec.group,
                storage_path=str(groups_dir),
                failure_config=ray.train.FailureConfig(max_failures=_MAX_GROUP_RESTARTS, controller_failure_limit=3),
                worker_runtime_env={"env_vars": _worker_environment(resources)},
            ),
        )
        self._thread = threading.Thread(target=self._fit, name=spec.group, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether `fit()` has not returned yet."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait for `fit()` to return."""
        self._thread.join(timeout_s)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # whatever ended the group is its result, told by the manager
            self.error = f"{type(error).__name__}: {error}"


def _worker_environment(resources: Resources) -> dict[str, str]:
    environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(resources.cpus_per_worker)}
    return environment if resources.gpus_per_worker else environment | {"DS_ACCELERATOR": "cpu"}


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
        kinds: set[Resources],
        nodes: list[dict[str, float]],
        max_groups: int | None,
        max_group_trials: int,
    ) -> None:
        """Start one group of each kind, as far as there is room: every kind will be needed.

        Args:
            broker: the sweep's broker, under `broker_name` in `namespace`.
            run_dir: groups keep Ray Train's state in `groups/`, trials their checkpoints in `trials/`.
            kinds: what groups may occupy.
            nodes: each node's total resources.
            max_groups: groups running at once at most, i.e. trials training at once.
            max_group_trials: trials after which a group is replaced by a new one.
        """
        self._broker, self._broker_name, self._namespace = broker, broker_name, namespace
        self._run_dir = run_dir
        self._kinds = {kind.lane: kind for kind in kinds}
        self._nodes = nodes
        self._max_groups, self._max_group_trials = max_groups, max_group_trials
        self._groups: dict[str, WorkerGroup] = {}
        self._retiring: set[str] = set()
        self._started = 0
        self._failed_starts: dict[str, int] = {}
        # Names are never reused: Ray Train would take up the state of an earlier group of the same name.
        self._stamp = int(time.time())
        for kind in sorted(kinds, key=lambda k: (k.gpus_per_worker, k.num_workers, k.cpus_per_worker), reverse=True):
            if self._has_room_for(kind):
                self._start(kind)

    def tick(self) -> None:
        """Look once, act once. Call a few times a second."""
        load: Load = ray.get(self._broker.load.remote())
        self._reap(load)
        for group_id in self._groups:
            if group_id not in self._retiring and load.assigned.get(group_id, 0) >= self._max_group_trials:
                self._retire(group_id)  # it ends after its present trial, and is replaced where trials wait
        for lane, queued in load.queued.items():
            up = [g for g, group in self._groups.items() if group.spec.lane == lane and g not in self._retiring]
            waiting_for_work = [g for g in up if g not in load.busy]
            if queued <= len(waiting_for_work):
                continue
            if self._has_room_for(self._kinds[lane]):
                self._start(self._kinds[lane])
            elif (idle := self._idle_group(load)) is not None:
                self._retire(idle)

    def shutdown(self, timeout_s: float) -> None:
        """Let every group end by itself, so that nothing is left for Ray to clean up."""
        for group_id in self._groups:
            ray.get(self._broker.retire.remote(group_id))
        deadline = time.monotonic() + timeout_s
        for group in self._groups.values():
            group.join(max(0.0, deadline - time.monotonic()))

    def _reap(self, load: Load) -> None:
        for group_id, group in list(self._groups.items()):
            if group_id in load.busy:
                self._failed_starts[group.spec.lane] = 0
            if group.running:
                continue
            del self._groups[group_id]
            if group_id in self._retiring:
                self._retiring.discard(group_id)
                if group.error is None:
                    continue
            lane, reason = group.spec.lane, group.error or "the worker group ended by itself"
            ray.get(self._broker.lost.remote(group_id, reason))
            self._failed_starts[lane] = self._failed_starts.get(lane, 0) + 1
            if self._failed_starts[lane] >= _MAX_FAILED_STARTS:
                ray.get(self._broker.fail_lane.remote(lane, f"no worker group could be kept running: {reason}"))

    def _retire(self, group_id: str) -> None:
        self._retiring.add(group_id)
        ray.get(self._broker.retire.remote(group_id))

    def _has_room_for(self, request: Resources) -> bool:
        if self._max_groups is not None and len(self._groups) >= self._max_groups:
            return False
        return fits([group.resources for group in self._groups.values()] + [request], self._nodes)

    def _idle_group(self, load: Load) -> str | None:
        """A group whose lane has nothing waiting and that has had nothing to do for a while."""
        if self._retiring:
            return None  # room is being made already
        for group_id, idle_seconds in load.idle_seconds.items():
            group = self._groups.get(group_id)
            if group is not None and group.spec.lane not in load.queued and idle_seconds > _IDLE_GRACE_S:
                return group_id
        return None

    def _start(self, resources: Resources) -> None:
        self._started += 1
        spec = GroupSpec(
            group=f"group-{self._stamp}-{self._started:03d}",
            lane=resources.lane,
            broker=self._broker_name,
            namespace=self._namespace,
            trials_dir=str(self._run_dir / "trials"),
            threads=resources.cpus_per_worker,
        )
        self._groups[spec.group] = WorkerGroup(spec, resources, self._run_dir / "groups")


def fits(requests: list[Resources], nodes: list[dict[str, float]]) -> bool:
    """Whether all workers of all groups find room at once, placed first-fit, the largest first.

    Args:
        requests: what each group occupies.
        nodes: each node's total resources, e.g. `{"CPU": 16, "GPU": 1}`.
    """
    free = [dict(node) for node in nodes]
    for request in sorted(requests, key=lambda r: (r.gpus_per_worker, r.cpus_per_worker), reverse=True):
        need = {"CPU": float(request.cpus_per_worker), "GPU": float(request.gpus_per_worker)}
        for _ in range(request.num_workers):
            node = next((n for n in free if all(n.get(key, 0.0) >= amount for key, amount in need.items())), None)
            if node is None:
                return False
            for key, amount in need.items():
                node[key] = node.get(key, 0.0) - amount
    return True


def most_groups(resources: list[Resources], nodes: list[dict[str, float]]) -> int:
    """How many groups the cluster holds at once, when they are of the smallest kind."""
    smallest = min(resources, key=lambda r: (r.gpus_per_worker * r.num_workers, r.cpus_per_worker * r.num_workers))
    count = 0
    while fits([smallest] * (count + 1), nodes):
        count += 1
    return count
