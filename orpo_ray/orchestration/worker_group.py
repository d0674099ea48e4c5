"""One worker group: a Ray TorchTrainer whose processes train one trial after another."""

from __future__ import annotations

import threading
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback

from orpo_ray.orchestration.capacity import Resources
from orpo_ray.orchestration.preemption import NoticingTorchConfig
from orpo_ray.orchestration.worker import GroupSpec, run_group

_MAX_GROUP_RESTARTS = 10
"""Ray restarts a crashed group at most this often; after that a new group is started if trials still wait."""
_COLLECTIVE_TIMEOUT_S = 1800
"""A rank that does not reach a collective fails the group after this time."""
_GROUPS_DIR = "groups"
"""Folder of Ray Train's own state in the sweep's folder."""


class ControllerRegistration(ControllerCallback):
    """Registers a group's Ray Train controller with the broker.

    Ray Train does not expose the controller, and killing it is the only way to end a group that waits for nodes.
    """

    def __init__(self, broker: Any, group: str) -> None:
        self._broker, self._group = broker, group

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called by Ray Train in the controller's process."""
        me = ray.get_runtime_context().current_actor
        self._broker.controlled.remote(self._group, me)


class WorkerGroup:
    """A running group. `fit()` blocks, so it lives in a thread of the sweep process."""

    def __init__(self, spec: GroupSpec, resources: Resources, broker: Any) -> None:
        """Start the group; its processes come up in the background."""
        run_dir, remote = spec.folder.run_dir, spec.folder.remote
        self.spec = spec
        self.resources = resources
        self.error: str | None = None
        self._trainer = TorchTrainer(
            run_group,
            train_loop_config=spec,
            torch_config=NoticingTorchConfig(
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
                storage_path=str(run_dir / _GROUPS_DIR) if remote is None else f"{remote.path}/{_GROUPS_DIR}",
                storage_filesystem=None if remote is None else remote.filesystem,
                failure_config=ray.train.FailureConfig(max_failures=_MAX_GROUP_RESTARTS, controller_failure_limit=3),
                callbacks=[ControllerRegistration(broker, spec.group)],
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
        except Exception as error:  # any error is the group's result, which the manager reports
            self.error = f"{type(error).__name__}: {error}"


def _worker_environment(resources: Resources) -> dict[str, str]:
    environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(resources.cpus_per_worker)}
    return environment if resources.gpus_per_worker else environment | {"DS_ACCELERATOR": "cpu"}
