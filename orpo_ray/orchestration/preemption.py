"""Detect that a worker's machine is about to be preempted: SIGTERM, or Ray draining its node."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.context import get_train_context

if TYPE_CHECKING:
    from collections.abc import Iterator

_at_work = threading.Event()
_terminated = threading.Event()


def is_preempted() -> bool:
    """Whether this worker should save its trial and end. Called after every step, so it sends no messages.

    Ray's own `ray.train.get_preemption_info` synchronises all workers, which takes milliseconds; this reads the same
    information from the worker's context (ray 2.60).
    """
    return _terminated.is_set() or get_train_context().preemption_context.preemption_info is not None


@contextmanager
def at_work() -> Iterator[None]:
    """Context in which SIGTERM does not end the process but makes `is_preempted` true."""
    _at_work.set()
    try:
        yield
    finally:
        _at_work.clear()


@dataclass
class NoticingTorchConfig(TorchConfig):
    """Ray Train's torch backend, with a SIGTERM handler in the workers.

    By default Ray ends a worker at once on SIGTERM. Only the main thread can install a handler, and training runs in
    another thread; a backend's start-up functions run in the main thread.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """The backend class, as Ray Train asks for it."""
        return _NoticingBackend


class _NoticingBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Install the handler in every worker, then join the process group."""
        worker_group.execute(_install)
        super().on_start(worker_group, backend_config)


def _install() -> None:
    usual = signal.getsignal(signal.SIGTERM)

    def noticed(number: int, frame: FrameType | None) -> None:
        if _at_work.is_set():
            _terminated.set()
        elif callable(usual):
            usual(number, frame)

    signal.signal(signal.SIGTERM, noticed)
