"""Threads that want the same result at the same time compute it once. No result and no error is kept."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.single_flight import SingleFlight


class Slow:
    """A computation that waits until `go` is set, then does what `end` does. Its calls are counted."""

    def __init__(self, end: Callable[[], int]) -> None:
        self.calls = 0
        self.go = threading.Event()
        self._end = end

    def __call__(self) -> int:
        self.calls += 1
        assert self.go.wait(60)
        return self._end()


def together(flight: SingleFlight[int], slow: Slow, threads: int = 4) -> list[object]:
    """What each of several threads gets, results or errors, when all of them ask before the computation ends."""

    def ask() -> object:
        try:
            return flight.run("key", slow)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        asked = [pool.submit(ask) for _ in range(threads)]
        time.sleep(0.2)
        slow.go.set()
        return [one.result() for one in asked]


def test_one_call_is_for_all_and_is_not_kept() -> None:
    flight: SingleFlight[int] = SingleFlight()
    slow = Slow(lambda: 7)
    assert together(flight, slow) == [7] * 4 and slow.calls == 1
    assert flight.run("key", lambda: 8) == 8


def test_other_keys_do_not_wait() -> None:
    flight: SingleFlight[int] = SingleFlight()
    slow = Slow(lambda: 7)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(flight.run, "key", slow)
        assert flight.run("other", lambda: 8) == 8 and not first.done()
        slow.go.set()
        assert first.result() == 7


@pytest.mark.parametrize("error", [VideoError("damaged", "corrupt"), MemoryError("damaged")], ids=repr)
def test_an_error_is_for_all_and_is_not_kept(error: Exception) -> None:
    def fail() -> int:
        raise error

    flight: SingleFlight[int] = SingleFlight()
    slow = Slow(fail)
    got = together(flight, slow)
    assert [type(one) for one in got] == [type(error)] * 4 and slow.calls == 1
    assert flight.run("key", lambda: 8) == 8


def test_ctrl_c_is_for_one_thread_alone() -> None:
    ends = [KeyboardInterrupt()]

    def fail_once() -> int:
        if ends:
            raise ends.pop()
        return 7

    flight: SingleFlight[int] = SingleFlight()
    got = together(flight, Slow(fail_once))
    assert sorted(map(str, got)) == ["", "7", "7", "7"] and any(isinstance(one, KeyboardInterrupt) for one in got)
