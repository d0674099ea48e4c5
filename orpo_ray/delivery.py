"""Items sent in order from a thread of their own, and again where the receiver was away: nobody else waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 30.0
_MAX_ITEMS_PER_BATCH = 1000

Item = TypeVar("Item")


class Unreachable(Exception):
    """The receiver did not answer; worth another try."""


def backoffs() -> Iterator[float]:
    """Seconds to wait before each further try: doubling, without end."""
    seconds = FIRST_BACKOFF_S
    while True:
        yield seconds
        seconds = min(2 * seconds, LONGEST_BACKOFF_S)


class Delivery(Generic[Item]):
    """Sends what is queued, batch by batch, in a thread that `start` begins and `close` ends.

    Within a batch, items of the same key go together and in order; those without a key (None) go last. While the
    receiver is unreachable they wait in memory. What it refuses is logged and counted, and holds up nothing else.
    """

    def __init__(self, receiver: str, send: Callable[[str | None, list[Item]], None]) -> None:
        """Nothing is sent before `start`.

        Args:
            receiver: its name, for messages.
            send: delivers items of one key; raises Unreachable to get the same items again later, and anything else
                where they are refused.
        """
        self._receiver, self._send = receiver, send
        self._queue: deque[tuple[str | None, Item]] = deque()
        self._in_flight = self._refused = 0
        self._changed = threading.Condition()
        self._closing = self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=f"{receiver} delivery", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def put(self, items: Iterable[tuple[str | None, Item]]) -> None:
        """Queue (key, item) pairs; returns at once."""
        with self._changed:
            self._queue.extend(items)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> int:
        """Wait until everything queued is sent, at most `timeout_s`; returns how many items were not."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._queue or self._in_flight), timeout_s)
            return self._refused + self._in_flight + len(self._queue)

    def close(self, timeout_s: float) -> int:
        """`flush`, trying more often, then end: what is left is not sent any more."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        unsent = self.flush(timeout_s)
        self._abandoned = True
        self._thread.join(timeout=1.0)  # a daemon: a request that still hangs does not hold up the process
        return unsent

    def _run(self) -> None:
        while not self._abandoned:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                batch: dict[str | None, list[Item]] = {}
                for _ in range(min(len(self._queue), _MAX_ITEMS_PER_BATCH)):
                    key, item = self._queue.popleft()
                    batch.setdefault(key, []).append(item)
                if None in batch:
                    batch[None] = batch.pop(None)
                self._in_flight = sum(map(len, batch.values()))
            self._send_batch(batch)
            with self._changed:
                self._changed.notify_all()

    def _send_batch(self, batch: dict[str | None, list[Item]]) -> None:
        waits: Iterator[float] | None = None  # while the receiver is unreachable
        while batch and not self._abandoned:
            key, items = next(iter(batch.items()))
            try:
                self._send(key, items)
            except Unreachable as error:
                if waits is None:
                    log.warning(
                        "%s cannot be reached, what is to be sent waits until it can: %s", self._receiver, error
                    )
                    waits = backoffs()
                self._pause(next(waits))
                continue
            except Exception:  # this thread must outlive every answer the receiver can think of
                log.exception("%s refused %d items of %s", self._receiver, len(items), key or "no key")
                self._refused += len(items)
            if waits is not None:
                log.warning("%s is back", self._receiver)
                waits = None
            del batch[key]
            self._in_flight -= len(items)

    def _pause(self, seconds: float) -> None:
        """Wait; but who stands in `close` gets a try each second."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing, seconds)
        if self._closing:
            time.sleep(min(seconds, FIRST_BACKOFF_S))
