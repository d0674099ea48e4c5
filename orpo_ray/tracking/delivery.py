"""Background queue with retries, ordered per key; `put` never blocks."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Generic, TypeVar

from mlflow.exceptions import MlflowException

log = logging.getLogger(__name__)

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 30.0
_MAX_ITEMS_PER_CALL = 200

Item = TypeVar("Item")


class Unreachable(Exception):
    """The receiver did not answer; the items should be sent again."""


def backoffs() -> Iterator[float]:
    """Seconds to wait before each retry: doubling up to `LONGEST_BACKOFF_S`, without end."""
    seconds = FIRST_BACKOFF_S
    while True:
        yield seconds
        seconds = min(2 * seconds, LONGEST_BACKOFF_S)


class Delivery(Generic[Item]):
    """Sends queued items from threads that run between `start` and `close`.

    Items of a key go in order, one call after another; different keys may go at the same time. Those without a key
    (None) go one by one after everything else. While the receiver is unreachable all items wait in memory. Refused
    items are logged and counted, and do not delay others.
    """

    def __init__(self, receiver: str, send: Callable[[str | None, list[Item]], None], senders: int = 1) -> None:
        """Nothing is sent before `start`.

        Args:
            receiver: name of the receiver, for messages.
            send: delivers items of one key; raises Unreachable to get the same items again later, and any other error
                if they are refused.
            senders: number of threads that call `send`, never two at once for the same key.
        """
        self._receiver, self._send = receiver, send
        # Keys, ordered by their oldest item.
        self._queued: dict[str | None, deque[Item]] = {}
        self._in_flight: dict[str | None, int] = {}
        self._refused = 0
        self._changed = threading.Condition()
        self._closing = self._abandoned = False
        self._waits: Iterator[float] | None = None  # while the receiver is unreachable
        self._failed_at = self._again_at = 0.0
        self._threads = [
            threading.Thread(target=self._run, name=f"{receiver} delivery {number}", daemon=True)
            for number in range(senders)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def put(self, items: Iterable[tuple[str | None, Item]]) -> None:
        """Queue (key, item) pairs; returns at once."""
        with self._changed:
            for key, item in items:
                self._queued.setdefault(key, deque()).append(item)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> int:
        """Wait at most `timeout_s` until all queued items are sent. Returns the number of items not sent."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._queued or self._in_flight), timeout_s)
            return self._refused + sum(self._in_flight.values()) + sum(map(len, self._queued.values()))

    def close(self, timeout_s: float) -> int:
        """`flush` with more frequent retries, then end the threads. Returns the number of items not sent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        unsent = self.flush(timeout_s)
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
        give_up = time.monotonic() + 1.0  # the threads are daemons: a hanging request does not keep the process alive
        for thread in self._threads:
            thread.join(timeout=max(0.0, give_up - time.monotonic()))
        return unsent

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            key, items = taken
            began = time.monotonic()
            refused = 0
            try:
                self._send(key, items)
            except Unreachable as error:
                self._put_back(key, items, began, error)
                continue
            except Exception:  # this thread must survive any error of the receiver
                log.exception("%s refused %d items of %s", self._receiver, len(items), key or "no key")
                refused = len(items)
            with self._changed:
                self._refused += refused
                del self._in_flight[key]
                if self._waits is not None and began >= self._failed_at:
                    log.warning("%s is back", self._receiver)
                    self._waits = None
                self._changed.notify_all()

    def _take(self) -> tuple[str | None, list[Item]] | None:
        """Wait for a key's items and take them; None when the delivery is closed."""
        with self._changed:
            while not self._abandoned:
                pause = self._pause_s()
                if pause <= 0:
                    for key in self._ready():
                        queue = self._queued.pop(key)
                        items = list(islice(queue, 1 if key is None else _MAX_ITEMS_PER_CALL))
                        if rest := deque(islice(queue, len(items), None)):
                            self._queued[key] = rest  # after the other keys
                        self._in_flight[key] = len(items)
                        return key, items
                if self._closing and not self._queued and not self._in_flight:
                    return None
                self._changed.wait(pause if pause > 0 else None)
            return None

    def _ready(self) -> Iterator[str | None]:
        """Keys that can be sent now, the longest-waiting first."""
        yield from (key for key in self._queued if key is not None and key not in self._in_flight)
        if [*self._queued] == [None] and not self._in_flight:
            yield None

    def _pause_s(self) -> float:
        """Seconds until the next try; during `close` there is one per second."""
        if self._waits is None:
            return 0.0
        again_at = min(self._again_at, self._failed_at + FIRST_BACKOFF_S) if self._closing else self._again_at
        return again_at - time.monotonic()

    def _put_back(self, key: str | None, items: list[Item], began: float, error: Unreachable) -> None:
        with self._changed:
            later = self._queued.pop(key, deque())
            self._queued = {key: deque(items) + later} | self._queued
            del self._in_flight[key]
            is_first = self._waits is None
            if self._waits is None:
                log.warning("%s cannot be reached; queued items wait until it can: %s", self._receiver, error)
                self._waits = backoffs()
            if is_first or began > self._failed_at:  # else it was in flight together with the first failure
                self._failed_at = time.monotonic()
                self._again_at = self._failed_at + next(self._waits)
            self._changed.notify_all()


def is_temporary(error: Exception) -> bool:
    """Whether a request should be retried: no connection, a timeout or no permission yet, but not a refusal."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in (401, 403, 408, 429)
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
