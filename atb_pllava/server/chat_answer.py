"""The JSON of a chat completion: whole, and in chunks."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from atb_pllava.engine.outputs import CompletionDelta, CompletionOutput, RequestOutput, TokenLogprobs
from atb_pllava.server.logprobs import chat_logprobs
from atb_pllava.server.protocol.chat import ChatCompletionRequest
from atb_pllava.server.served_model import ServedModel


class ChatAnswer:
    """The AnswerFormat of chat completions."""

    def __init__(self, model: ServedModel, body: ChatCompletionRequest) -> None:
        self._tokenizer = model.tokenizer
        self._num_logprobs = body.num_logprobs
        self._n = body.n or 1
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}

    def response(self, outputs: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
        (output,) = outputs
        choices = [self._choice(completion) for completion in output.outputs]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        for index in range(self._n):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(self, number: int, delta: CompletionDelta) -> Iterator[dict[str, Any]]:
        if delta.text or delta.logprobs:
            logprobs = self._logprobs(delta.token_ids, delta.logprobs)
            yield self._chunk(delta.index, {"content": delta.text}, logprobs)
        if delta.finish_reason is not None:
            yield self._chunk(delta.index, {}, finish_reason=delta.finish_reason)

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": []}

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        return {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": self._logprobs(completion.token_ids, completion.logprobs),
            "finish_reason": completion.finish_reason,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if self._num_logprobs is None or logprobs is None:
            return None
        return chat_logprobs(self._tokenizer, token_ids, logprobs, self._num_logprobs)
