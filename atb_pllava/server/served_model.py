"""ServedModel: the engine under the name by which clients ask for it, and the lengths of its requests."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atb_pllava.config import PllavaConfig
from atb_pllava.engine.async_engine import AsyncEngine
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import RequestError
from atb_pllava.prompt.chat_template import render_turns
from atb_pllava.prompt.messages import Chat
from atb_pllava.prompt.tokenizer import Tokenizer
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.protocol.sampling import invalid_sampling


@dataclass(frozen=True)
class ServedModel:
    """The one model of a server. `created` is a Unix time. `settings` are what decides its answers, if known."""

    name: str
    engine: AsyncEngine
    settings: Mapping[str, Any] | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def config(self) -> PllavaConfig:
        return self.engine.request_parser.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.request_parser.tokenizer

    @property
    def max_model_len(self) -> int:
        """The most tokens of a prompt and its answer: what the model was trained on and the KV cache has room for."""
        cached = self.engine.core.block_manager.total * self.engine.config.block_size
        return min(self.config.text.max_position_embeddings, cached)

    def check_name(self, name: str | None) -> None:
        """Raises ApiError 404 when a request names another model. A request need not name one."""
        if name not in (None, "", self.name):
            message = f"the model {ascii(name[:80])} does not exist; this server has {self.name!r}"
            raise ApiError(404, "model_not_found", message, "model")

    def check_params(self, params: SamplingParams) -> None:
        """Raises ApiError when the batch has too few places for the answers or beams of one request."""
        try:
            self.engine.core.scheduler.check_params(params)
        except RequestError as error:
            raise invalid_sampling(error) from None

    def chat_token_ids(self, chat: Chat) -> list[int]:
        """Token ids of a chat's prompt, with one image token for each video. Raises as `prompt_token_ids` does."""
        pieces = render_turns(self.engine.request_parser.conversation, chat.turns, system=chat.system)
        self._check_num_characters(sum(len(piece.text) for piece in pieces), "messages")
        return self.tokenizer.encode_pieces(pieces)

    def prompt_token_ids(self, prompt: str) -> list[int]:
        """Token ids of a literal prompt. Raises ApiError for a text that fits into no context, however it is split."""
        self._check_num_characters(len(prompt), "prompt")
        return self.tokenizer.encode(prompt)

    def prompt_length(self, token_ids: Sequence[int], num_videos: int) -> int:
        """Tokens of a prompt in which each video is one token so far."""
        return len(token_ids) + num_videos * (self.config.num_video_tokens - 1)

    def answer_length(self, prompt_length: int, num_videos: int, wanted: int | None) -> int:
        """The most tokens of an answer: `wanted`, or without it the server's own limit, as far as there is room.

        Raises ApiError when prompt and answer exceed the context length.
        """
        room = self.max_model_len - prompt_length
        if room < max(wanted or 1, 1):
            video = num_videos * self.config.num_video_tokens
            answer = "" if wanted is None else f" and up to {wanted} more are wanted"
            raise ApiError(
                400,
                "context_length_exceeded",
                f"the prompt is {prompt_length} tokens ({video} visual + {prompt_length - video} text){answer}; "
                f"the context holds {self.max_model_len}",
                "messages" if wanted is None or room < 1 else "max_tokens",
            )
        if wanted is not None:
            return wanted
        return min(room, self.engine.config.max_output_length or SamplingParams.max_tokens)

    def _check_num_characters(self, number: int, param: str) -> None:
        """The tokenizer holds up all threads of the process, for about a second a million characters."""
        most = self.max_model_len * self.tokenizer.longest_token
        if number > most:
            message = (
                f"the text has {number} characters, and no text of more than {most} is {self.max_model_len} tokens, "
                "which the context holds"
            )
            raise ApiError(400, "context_length_exceeded", message, param)
