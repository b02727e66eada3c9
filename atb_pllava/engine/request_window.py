"""RequestWindow: many requests through the engine, with a bounded number under way."""

import contextlib
import queue
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

from atb_pllava.engine.async_engine import AsyncEngine
from atb_pllava.engine.outputs import RequestOutput
from atb_pllava.engine.request_parser import request_name
from atb_pllava.engine.request_stream import RequestStream
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import PllavaError


class RequestWindow:
    """Takes requests from an iterable while fewer than `size` are under way. `answers` yields each one when it ends.

    on_text: called with (number of the request, text so far) after new tokens, by the thread that iterates. The text
    may be the same as before. The window holds `owner`: an LLM that nobody holds closes its engine.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        requests: Iterable[Mapping[str, Any]],
        params: SamplingParams,
        on_text: Callable[[int, str], None] | None = None,
        owner: object = None,
    ) -> None:
        self._engine = engine
        self._owner = owner
        self._source = enumerate(requests)
        self._params = params
        self._on_text = on_text
        self._size = 2 * engine.core.config.max_batch_size  # one batch runs, and one waits with its media read
        self._streams: dict[int, RequestStream] = {}
        self._changes: queue.SimpleQueue[int] = queue.SimpleQueue()  # numbers of requests whose stream changed

    def answers(self) -> Generator[tuple[int, RequestOutput | PllavaError], None, None]:
        """(Number of the request, answer or error) in the order in which requests end.

        Closing the iterator aborts what is under way.
        """
        try:
            with self._engine.core.progress.logged():
                while self._fill() or self._streams:
                    number = self._changes.get()
                    stream = self._streams.get(number)
                    if stream is None:
                        continue
                    if self._on_text is not None:
                        self._on_text(number, stream.text)
                    if stream.is_finished:
                        del self._streams[number]
                        yield number, _answer(stream)
        finally:
            for stream in self._streams.values():
                stream.abort()

    def _fill(self) -> bool:
        """Submit requests until the window is full or the iterable ends. Returns whether a request was submitted."""
        submitted = False
        while len(self._streams) < self._size:
            item = next(self._source, None)
            if item is None:
                break
            self._submit(*item)
            submitted = True
        return submitted

    def _submit(self, number: int, request: Any) -> None:
        stream = self._engine.submit(request, self._params, request_name(request, number))
        self._streams[number] = stream

        def changed(stream: RequestStream) -> None:
            if self._on_text is not None or stream.is_finished:
                self._changes.put(number)

        stream.add_listener(changed)


def _answer(stream: RequestStream) -> RequestOutput | PllavaError:
    try:
        return stream.result()
    except PllavaError as error:
        return error


def in_order(answers: Generator[tuple[int, RequestOutput | PllavaError], None, None]) -> list[RequestOutput]:
    """All answers by the numbers of their requests. Raises the first error, and aborts the other requests."""
    by_number: dict[int, RequestOutput] = {}
    with contextlib.closing(answers):
        for number, answer in answers:
            if isinstance(answer, PllavaError):
                raise answer
            by_number[number] = answer
    return [by_number[number] for number in sorted(by_number)]
