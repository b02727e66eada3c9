"""SingleFlight: threads that want the same result at the same time compute the result once."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from atb_pllava.errors import PllavaError

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Joins calls with equal keys. A finished call is forgotten: neither its result nor its error is kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[object, Future[T | None]] = {}

    def run(self, key: object, compute: Callable[[], T]) -> T:
        """The result of `compute()`, or of the call with the same key that another thread is in.

        Threads that join a call raise the call's PllavaError or MemoryError too. When the call ends in any other way,
        by Ctrl-C for example, each of the threads that joined tries again.
        """
        while True:
            with self._lock:
                running = self._calls.get(key)
                if running is None:
                    own: Future[T | None] = Future()
                    self._calls[key] = own
            if running is None:
                return self._lead(key, own, compute)
            result = running.result()
            if result is not None:
                return result

    def _lead(self, key: object, own: "Future[T | None]", compute: Callable[[], T]) -> T:
        result: T | None = None
        failure: PllavaError | MemoryError | None = None
        try:
            result = compute()
            return result
        except (PllavaError, MemoryError) as error:
            failure = error
            raise
        finally:
            with self._lock:
                del self._calls[key]
            if failure is None:
                own.set_result(result)
            else:
                own.set_exception(failure)
