"""The client of `bench.serve` for a running server: streamed chat completions over HTTP."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from atb_pllava.bench.serve import Client, Request, RequestTimeline
from atb_pllava.client.api_client import ApiClient
from atb_pllava.errors import ServerError


class HttpClient(Client):
    """Sends {"messages": [...]} to a server. `connections` requests at most are under way.

    Each chunk of an answer carries the number of tokens so far, so that a chunk of several tokens is counted as such.
    """

    def __init__(self, api: ApiClient, max_tokens: int, connections: int) -> None:
        self._api = api
        usage = {"include_usage": True, "continuous_usage_stats": True}
        self._fields: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True, "stream_options": usage}
        self._threads = ThreadPoolExecutor(connections, "ask")

    def __enter__(self) -> "HttpClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an exception, as of Ctrl-C, no thread goes on to wait for an answer."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if kind is not None:
            self._api.abort()
        self._threads.shutdown()

    def send(self, request: Request, timeline: RequestTimeline) -> None:
        self._threads.submit(self.ask, request, timeline)

    def ask(self, request: Request, timeline: RequestTimeline) -> None:
        """Ask and wait for the answer."""
        usage = {"prompt_tokens": 0, "completion_tokens": 0}
        try:
            for chunk in self._api.stream_chat({**request, **self._fields}):
                moment = time.perf_counter()
                before = usage["completion_tokens"]
                usage = chunk.get("usage") or usage
                if usage["completion_tokens"] > before:
                    timeline.add(moment, usage["completion_tokens"] - before)
        except ServerError as error:
            timeline.fail(error.code or "server", str(error))
        else:
            timeline.finish(usage["prompt_tokens"])
