"""Connect to Ray: to an existing cluster, or to one started on this machine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from orpo_ray.errors import UserError


class ClusterError(UserError, RuntimeError):
    """The cluster cannot be reached or started with these settings."""


@contextmanager
def connected(num_cpus: int | None = None) -> Iterator[None]:
    """A Ray connection: the cluster that RAY_ADDRESS names (a submitted job has it set), else one started here.

    Args:
        num_cpus: CPUs of a cluster started here; by default the machine's.
    """
    import ray

    # DeepSpeed needs ninja, which is not on PATH if the virtual environment is not activated. Children inherit PATH.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    # Interval at which Ray Train polls its workers: bounds how fast a crashed or finished group is noticed.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    # Tune would save its list of all trials repeatedly; the journal makes that unnecessary.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
    # Population-based schedulers link checkpoints and fit models between two results; Tune warns from half a second.
    os.environ.setdefault("TUNE_WARN_THRESHOLD_S", "30")
    # Tune's table and files would repeat the sweep's own.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # One driver per submitted trial means more processes than CPUs, by design; Ray warns above 3 × this number.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    # A group that must wait for room, or for a node to be added, gives up after this long.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    local = "RAY_ADDRESS" not in os.environ
    if num_cpus is not None and not local:
        raise ClusterError(f"--num-cpus is for a local cluster, but RAY_ADDRESS is {os.environ['RAY_ADDRESS']}")
    if local and "RAY_AUTH_MODE" not in os.environ:
        # Ray then uses token authentication, makes the token itself, and warns that it does. (Set here, the variable
        # would come too late: Ray's core reads it when it is imported.)
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    with _on_loopback() if local else nullcontext():
        try:
            _init(local, num_cpus)
        except ConnectionError as error:
            raise ClusterError(
                f"no Ray cluster answers at RAY_ADDRESS {os.environ.get('RAY_ADDRESS')}; unset it to start one here"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray cluster that is started here listen on 127.0.0.1 only: no other machine needs to reach it.

    Ray does so by itself on macOS and Windows (ray-project/ray#18730) and has no argument for it: an address given to
    `ray.init` is replaced by the machine's. Ray's processes read the variable; this process has read it on import.
    """
    from ray._private import ray_constants

    before, was_open = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    # Collectives between workers of one machine.
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = was_open
        for name in (ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _init(local: bool, num_cpus: int | None) -> None:
    import ray

    ray.init(
        address="local" if local else None,
        include_dashboard=False if local else None,
        num_cpus=num_cpus if local else None,
        logging_level="WARNING",
        log_to_driver=False,
    )
