"""RequestStream: one request's answer while it grows. The engine's thread writes it, and any thread reads it."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from atb_pllava.engine.outputs import CompletionDelta, RequestOutput, TokenLogprobs
from atb_pllava.errors import PllavaError, RequestError


@dataclass
class _Completion:
    """One answer so far, and how much of it no delta has had."""

    text: str = ""
    read_chars: int = 0
    new_token_ids: list[int] = field(default_factory=list)
    new_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None
    has_news: bool = False

    def take(self, index: int) -> CompletionDelta:
        """All that is new, which is then no longer new."""
        delta = CompletionDelta(
            index, self.text[self.read_chars :], self.new_token_ids, self.new_logprobs, self.finish_reason
        )
        self.read_chars = len(self.text)
        self.new_token_ids = []
        self.new_logprobs = []
        self.has_news = False
        return delta


class RequestStream:
    """The answer to one request. Iterate over it for what is new, or call `result` for the whole answer.

    A stream keeps only the answer itself: a slow reader gets longer deltas, and never holds up the engine. `name`
    stands for the request in progress lines. One thread or one task at a time may iterate. `on_finished(stream)` is
    called before any reader gets the answer or the error.
    """

    def __init__(
        self,
        request_id: str,
        name: str,
        n: int,
        on_finished: Callable[["RequestStream"], None],
    ) -> None:
        self.request_id = request_id
        self.name = name
        self._on_finished = on_finished
        self.renew_lock()
        self._completions = [_Completion() for _ in range(n)]
        self._listeners: list[Callable[[RequestStream], None]] = []
        self._output: RequestOutput | None = None
        self._error: PllavaError | None = None

    @property
    def text(self) -> str:
        """The text of the first answer so far."""
        return self._completions[0].text

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all answers so far."""
        return sum(completion.num_tokens for completion in self._completions)

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended: answered, failed or aborted."""
        return self._output is not None or self._error is not None

    @property
    def has_failed(self) -> bool:
        """Whether the request has ended with an error."""
        return self._error is not None

    @property
    def output(self) -> RequestOutput | None:
        """The answer of a request that has ended, None for an error. `result` waits for the end."""
        return self._output

    @property
    def error(self) -> PllavaError | None:
        """The error of a request that has ended with one."""
        return self._error

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end of the request and return the answer.

        Raises the request's error, and TimeoutError after `timeout` seconds. The request then goes on.
        """
        with self._ended:
            if not self._ended.wait_for(lambda: self.is_finished, timeout):
                raise TimeoutError(f"{self.name} was not answered within {timeout} seconds")
        return self._finished_output()

    def abort(self) -> None:
        """End the request: it fails with RequestError, and the engine frees its blocks before the next step.

        A finished request stays as it is.
        """
        self.fail(RequestError("the request was aborted", code="aborted"))

    def __iter__(self) -> Iterator[CompletionDelta]:
        """Yields what is new, until the request has ended. Raises the request's error. Does not abort when closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.is_finished or self._has_news())
            yield from self._take_deltas()
            if self.is_finished and not self._has_news():
                self._finished_output()
                return

    def __aiter__(self) -> AsyncIterator[CompletionDelta]:
        """Like `__iter__`, for asyncio."""
        return self._iterate_in_loop()

    async def wait(self) -> RequestOutput:
        """Like `result`, for asyncio. A cancelled task does not abort the request."""
        with self._changes_in_loop() as news:
            while not self.is_finished:
                await news.wait()
                news.clear()
        return self._finished_output()

    async def _iterate_in_loop(self) -> AsyncIterator[CompletionDelta]:
        with self._changes_in_loop() as news:
            while True:
                news.clear()
                for delta in self._take_deltas():
                    yield delta
                if self.is_finished and not self._has_news():
                    self._finished_output()
                    return
                if not self._has_news():
                    await news.wait()

    @contextlib.contextmanager
    def _changes_in_loop(self) -> Iterator[asyncio.Event]:
        """An event of the running loop that every change of the stream sets."""
        loop = asyncio.get_running_loop()
        news = asyncio.Event()

        def notify(_: RequestStream) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed before the request ended
                loop.call_soon_threadsafe(news.set)

        self.add_listener(notify)
        try:
            yield news
        finally:
            self.remove_listener(notify)

    def add_listener(self, listener: Callable[["RequestStream"], None]) -> None:
        """Call `listener(self)` after every change, and at once if there was a change before.

        The thread that makes the change calls the listener: mostly the engine's thread. A listener must return at once
        and must not raise.
        """
        with self._changed:
            self._listeners.append(listener)
            has_changed = self.is_finished or self._has_news()
        if has_changed:
            listener(self)

    def remove_listener(self, listener: Callable[["RequestStream"], None]) -> None:
        """Stop calling a listener that `add_listener` added."""
        with self._changed:
            self._listeners.remove(listener)

    # Called by the engine

    def extend(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        finish_reason: str | None,
    ) -> None:
        """Add tokens to answer `index`, unless the request was aborted. `text` is the whole text so far."""
        with self._changed:
            if self.is_finished:
                return
            completion = self._completions[index]
            completion.text = text
            completion.new_token_ids += token_ids
            completion.num_tokens += len(token_ids)
            completion.new_logprobs += logprobs
            completion.finish_reason = finish_reason
            completion.has_news = True
            self._changed.notify_all()
        self._notify_listeners()

    def finish(self, output: RequestOutput) -> None:
        """End the request with its answer, unless it was aborted."""
        self._end(output, None)

    def fail(self, error: PllavaError) -> None:
        """End the request with an error, unless it has ended already."""
        self._end(None, error)

    def renew_lock(self) -> None:
        """In a forked child: replace the lock, which a thread of the parent may have held."""
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._ended = threading.Condition(lock)  # of its own: `result` must not wake up for every token

    def _end(self, output: RequestOutput | None, error: PllavaError | None) -> None:
        with self._changed:
            if self.is_finished:
                return
            self._output = output
            self._error = error
            self._on_finished(self)
            self._changed.notify_all()
            self._ended.notify_all()
        self._notify_listeners()

    def _notify_listeners(self) -> None:
        for listener in list(self._listeners):
            listener(self)

    def _finished_output(self) -> RequestOutput:
        with self._changed:  # until `_end` has called `on_finished`
            pass
        if self._error is not None:
            raise self._error
        assert self._output is not None, "the request has not finished"
        return self._output

    def _has_news(self) -> bool:
        return any(completion.has_news for completion in self._completions)

    def _take_deltas(self) -> list[CompletionDelta]:
        with self._changed:
            return [completion.take(index) for index, completion in enumerate(self._completions) if completion.has_news]
