"""Generation: the engine's requests that one HTTP request has started, and their answers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager

from atb_pllava.engine.outputs import CompletionDelta, RequestOutput
from atb_pllava.engine.request_stream import RequestStream
from atb_pllava.errors import VideoError


class Generation:
    """The streams of one HTTP request: one of a chat, one for each prompt of a completion request.

    `close` ends the requests and calls each function of `on_close`, which frees what the requests read from.
    `refusal_of` makes the refusal of a medium that cannot be read.
    """

    def __init__(
        self,
        streams: Sequence[RequestStream],
        prompt_lengths: Sequence[int],
        on_close: Sequence[Callable[[], None]] = (),
        refusal_of: Callable[[VideoError], Exception] | None = None,
    ) -> None:
        self.streams = streams
        self.prompt_lengths = prompt_lengths
        self._on_close = on_close
        self._refusal_of = refusal_of

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.prompt_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(stream.num_tokens for stream in self.streams)

    async def outputs(self) -> list[RequestOutput]:
        """The finished answers. Raises the error of the first that fails."""
        with self._named_media():
            return [await stream.wait() for stream in self.streams]

    async def deltas(self) -> AsyncIterator[tuple[int, CompletionDelta]]:
        """(number of the prompt, what is new), until all answers have ended. Raises the error of one that fails.

        A slow reader gets longer deltas: nothing but the answers' text is kept for it.
        """
        if len(self.streams) == 1:
            with self._named_media():
                async for delta in self.streams[0]:
                    yield 0, delta
            return
        queue: asyncio.Queue[tuple[int, CompletionDelta] | BaseException | None] = asyncio.Queue(1)
        readers = [asyncio.ensure_future(_feed(queue, *numbered)) for numbered in enumerate(self.streams)]
        try:
            unfinished = len(readers)
            while unfinished:
                item = await queue.get()
                if item is None:
                    unfinished -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    @contextmanager
    def _named_media(self) -> Iterator[None]:
        """A VideoError of the body becomes the refusal that names the medium as the client does."""
        try:
            yield
        except VideoError as error:
            if self._refusal_of is None:
                raise
            raise self._refusal_of(error) from None

    def close(self) -> None:
        """End all requests that have not ended: the engine frees their blocks."""
        with ExitStack() as closing:
            for function in self._on_close:
                closing.callback(function)
            for stream in self.streams:
                stream.abort()


async def _feed(
    queue: "asyncio.Queue[tuple[int, CompletionDelta] | BaseException | None]", number: int, stream: RequestStream
) -> None:
    try:
        async with aclosing(stream.__aiter__()) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                await queue.put((number, delta))
        await queue.put(None)
    except Exception as error:
        await queue.put(error)
