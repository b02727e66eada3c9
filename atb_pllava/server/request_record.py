"""RequestRecord: what is known of one HTTP request, for its log line and for the handlers.

The record lies in the request's scope. The access log makes it and writes it. Authentication sets the owner, and
handlers set the rest.
"""

import secrets
from dataclasses import dataclass, field

from starlette.types import Scope

from atb_pllava.engine.outputs import RequestOutput

_KEY = "record"


def new_request_id() -> str:
    """32 hexadecimal digits that no other request has."""
    return secrets.token_hex(16)


@dataclass
class RequestRecord:
    """No field may hold text of a prompt or an answer, nor the address of a medium.

    request_id: the client's X-Request-Id, or a new one. owner: the digest of the API key, None without keys. ttft:
    seconds to the first token. None stands for a fact that the request does not have.
    """

    request_id: str = field(default_factory=new_request_id)
    owner: str | None = None
    ttft: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    videos: int | None = None
    error_code: str | None = None

    def add_output(self, output: RequestOutput) -> None:
        """Take the numbers of a finished answer. A request of several prompts adds one output for each of them."""
        metrics = output.metrics
        self.prompt_tokens = (self.prompt_tokens or 0) + metrics.prompt_tokens
        self.completion_tokens = (self.completion_tokens or 0) + metrics.output_tokens
        self.ttft = metrics.ttft if self.ttft is None else min(self.ttft, metrics.ttft)


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request. The first call makes it."""
    state = scope.setdefault("state", {})
    record: RequestRecord = state.setdefault(_KEY, RequestRecord())
    return record
