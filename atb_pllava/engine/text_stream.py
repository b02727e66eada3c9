"""stream_text: the answer to one request, piece by piece."""

from collections.abc import Iterator

from atb_pllava.engine.async_engine import AsyncEngine
from atb_pllava.engine.engine_request import EngineRequest


def stream_text(engine: AsyncEngine, request: EngineRequest, owner: object = None) -> Iterator[str]:
    """Pieces of the answer's text. The request begins with the first piece, and ends when the iterator is closed.

    The iterator holds `owner`: an LLM that nobody holds closes its engine.
    Raises RequestError at once for a request that can never be served, or whose answer does not grow piece by piece.
    """
    request.params.check_streamed()
    engine.core.check(request)
    return _pieces(engine, request, owner)


def _pieces(engine: AsyncEngine, request: EngineRequest, owner: object) -> Iterator[str]:
    stream = engine.add(request)  # not in `stream_text`: an iterator that nobody starts must not hold blocks
    try:
        with engine.progress.logged():
            for delta in stream:
                if delta.text:
                    yield delta.text
    finally:
        stream.abort()
