"""Notices that a worker's machine is about to be taken away: SIGTERM, or Ray draining its node."""

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
    """Whether this worker is to save its trial and end. No message is sent for it: it is asked after every step.

    Ray's own `ray.train.get_preemption_info` makes all workers meet, which takes milliseconds; what it would pass on
    lies in the worker's context (ray 2.60).
    """
    return _terminated.is_set() or get_train_context().preemption_context.preemption_info is not None


@contextmanager
def at_work() -> Iterator[None]:
    """SIGTERM does not end the process in here; `is_preempted` tells of it."""
    _at_work.set()
    try:
        yield
    finally:
        _at_work.clear()


@dataclass
class NoticingTorchConfig(TorchConfig):
    """Torch's backend of Ray Train that also lets workers notice SIGTERM.

    Ray ends a worker at once on that signal. Only a process's main thread can decide otherwise, and a worker's training
    runs in another one; a backend's start-up functions run in the main one.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What Ray Train calls."""
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
