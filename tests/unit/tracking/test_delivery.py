import threading
import time
from itertools import islice

import pytest

from orpo_ray.tracking import delivery
from orpo_ray.tracking.delivery import Delivery, Unreachable, backoffs


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(delivery, "FIRST_BACKOFF_S", 0.02)


class Receiver:
    """Keeps what it is sent; unreachable for the first `away` calls; refuses items of key "bad"."""

    def __init__(self, away=0):
        self.away, self.calls, self.got = away, 0, []
        self.open = threading.Event()
        self.open.set()

    def send(self, key, items):
        self.open.wait()
        self.calls += 1
        if self.calls <= self.away:
            raise Unreachable("no answer")
        if key == "bad":
            raise ValueError("never heard of it")
        self.got.append((key, items))


def delivery_to(receiver):
    made = Delivery("the server", receiver.send)
    made.start()
    return made


def test_items_of_a_key_go_together_in_order_and_those_without_one_last():
    receiver = Receiver()
    sending = Delivery("the server", receiver.send)
    sending.put([("a", 1), (None, "end"), ("b", 2), ("a", 3)])
    sending.start()
    assert sending.flush(5) == 0
    assert receiver.got == [("a", [1, 3]), ("b", [2]), (None, ["end"])]
    sending.put([("b", 4)])
    assert sending.close(5) == 0
    assert receiver.got[3:] == [("b", [4])]


def test_keys_go_at_once_each_in_order_and_what_has_none_when_all_is_sent(monkeypatch):
    monkeypatch.setattr(delivery, "_MAX_ITEMS_PER_CALL", 1)
    got, together, most = [], set(), 0
    lock, both = threading.Lock(), threading.Barrier(2)

    def send(key, items):
        nonlocal most
        with lock:
            assert key not in together, "two calls for a key at once"
            together.add(key)
            most = max(most, len(together))
        if items == [0]:
            both.wait(5)  # neither gets here unless the other does meanwhile
        with lock:
            got.extend((key, item) for item in items)
            together.discard(key)

    sending = Delivery("the server", send, senders=4)
    sending.put([(None, "first"), (None, "second")])
    sending.put([("a", 0), ("b", 0)])
    for item in range(1, 50):
        sending.put([("a", item), ("b", item)])
    sending.start()
    assert sending.close(5) == 0
    assert most == 2
    for key in ("a", "b"):
        assert [item for k, item in got if k == key] == [*range(50)]
    assert got[-2:] == [(None, "first"), (None, "second")]


def test_many_who_find_it_away_at_once_are_one_failure(monkeypatch, caplog):
    monkeypatch.setattr(delivery, "FIRST_BACKOFF_S", 0.2)
    away, calls = threading.Event(), []

    def send(key, items):
        calls.append(key)
        if not away.is_set():
            time.sleep(0.05)
            raise Unreachable("no answer")

    sending = Delivery("the server", send, senders=4)
    sending.put((key, 1) for key in "abcd")
    sending.start()
    time.sleep(0.15)
    away.set()
    assert sending.flush(0.5) == 0, "four failures must not quadruple the wait"
    assert sending.close(1) == 0
    assert sorted(calls) == sorted("abcd" * 2)
    assert caplog.text.count("cannot be reached") == caplog.text.count("is back") == 1


def test_who_is_away_gets_everything_later_once_and_in_order(caplog):
    receiver = Receiver(away=3)
    sending = delivery_to(receiver)
    sending.put([("a", 1), ("b", 2)])
    sending.put([("a", 3)])
    assert sending.close(5) == 0
    of_a = [item for key, items in receiver.got for item in items if key == "a"]
    assert (of_a, len(receiver.got)) == ([1, 3], receiver.calls - 3)
    assert caplog.text.count("the server cannot be reached") == 1
    assert caplog.text.count("the server is back") == 1


def test_what_is_refused_is_counted_and_holds_up_nothing(caplog):
    receiver = Receiver()
    sending = delivery_to(receiver)
    sending.put([("bad", 1), ("bad", 2), ("good", 3)])
    assert sending.close(5) == 2
    assert receiver.got == [("good", [3])]
    assert "never heard of it" in caplog.text


def test_closing_is_bounded_and_counts_what_was_not_sent():
    receiver = Receiver(away=10**9)
    sending = delivery_to(receiver)
    sending.put([("a", 1), ("a", 2)])
    began = time.monotonic()
    assert sending.close(0.2) == 2
    assert time.monotonic() - began < 1.5
    calls = receiver.calls
    assert 2 <= calls < 50  # tried more often while somebody waits, but not without a pause
    time.sleep(0.1)
    assert receiver.calls == calls  # given up


def test_nobody_waits_for_a_request_that_hangs():
    receiver = Receiver()
    receiver.open.clear()
    sending = delivery_to(receiver)
    began = time.monotonic()
    sending.put([("a", 1)])
    assert sending.flush(0.05) == 1
    sending.put([("a", 2)])
    assert sending.close(0.05) == 2
    assert time.monotonic() - began < 1.5
    receiver.open.set()


def test_waits_double_up_to_the_longest(monkeypatch):
    monkeypatch.setattr(delivery, "LONGEST_BACKOFF_S", 0.1)
    assert [*islice(backoffs(), 5)] == [0.02, 0.04, 0.08, 0.1, 0.1]
