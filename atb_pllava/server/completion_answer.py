"""The JSON of a completion: whole, and in chunks."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from atb_pllava.engine.outputs import CompletionDelta, RequestOutput, TokenLogprobs
from atb_pllava.server.logprobs import completion_logprobs
from atb_pllava.server.protocol.completions import CompletionRequest
from atb_pllava.server.served_model import ServedModel


class CompletionAnswer:
    """The AnswerFormat of completions. Answer j to prompt i is choice i * n + j."""

    def __init__(self, model: ServedModel, body: CompletionRequest) -> None:
        self._tokenizer = model.tokenizer
        self._num_logprobs = body.logprobs
        self._n = body.n or 1
        self._lengths: dict[int, int] = {}  # characters of each choice so far
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }

    def response(self, outputs: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [
            self._choice(
                number * self._n + answer.index, answer.text, answer.token_ids, answer.logprobs, answer.finish_reason
            )
            for number, output in enumerate(outputs)
            for answer in output.outputs
        ]
        return {**self._head, "choices": choices, "usage": usage}

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def chunks(self, number: int, delta: CompletionDelta) -> Iterator[dict[str, Any]]:
        if delta.text or delta.logprobs or delta.finish_reason is not None:
            index = number * self._n + delta.index
            choice = self._choice(index, delta.text, delta.token_ids, delta.logprobs, delta.finish_reason)
            yield {**self._head, "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head, "choices": []}

    def _choice(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        before = self._lengths.get(index, 0)
        self._lengths[index] = before + len(text)
        wanted = None
        if self._num_logprobs is not None and logprobs is not None:
            wanted = completion_logprobs(self._tokenizer, token_ids, logprobs, self._num_logprobs, before)
        return {"index": index, "text": text, "logprobs": wanted, "finish_reason": finish_reason}
