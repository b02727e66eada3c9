"""From a request as users write it, a mapping, to an EngineRequest: checked, media decoded, prompt tokenized."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from atb_pllava.config import PllavaConfig
from atb_pllava.engine.engine_request import EngineRequest, new_request_id
from atb_pllava.engine.request_media import MEDIA_KEYS, TIME_KEYS, media_of, media_of_chat
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import ConfigError, RequestError
from atb_pllava.multimodal.processor import Media, ProcessedVideo, VideoProcessor
from atb_pllava.prompt.chat_template import Conversation, render, render_turns
from atb_pllava.prompt.messages import Chat, parse_chat_messages
from atb_pllava.prompt.placeholders import expand_placeholders
from atb_pllava.prompt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_FRAME_KEYS = ("frame_indices", *TIME_KEYS, "num_frames")
REQUEST_KEYS = ("prompt", "question", "messages", *MEDIA_KEYS, *_FRAME_KEYS, "history", "answer_prefix", "id")
# The keys beside which a request may have other keys.
_WITH_PROMPT = {"prompt", *MEDIA_KEYS, *_FRAME_KEYS, "id"}
_WITH_MESSAGES = {"messages", "num_frames", "answer_prefix", "id"}
_SAMPLING_NAMES = tuple(field.name for field in fields(SamplingParams))


class RequestParser:
    """Makes EngineRequests for one model. The parser touches no engine state, so any thread may call it.

    Raises ConfigError for a conversation whose turn end is no token of the tokenizer.
    """

    def __init__(
        self,
        config: PllavaConfig,
        tokenizer: Tokenizer,
        conversation: Conversation,
        processor: VideoProcessor,
        max_output_length: int | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.conversation = conversation
        self.processor = processor
        self.max_output_length = max_output_length
        self._turn_end = _turn_end_token(conversation, tokenizer)

    def sampling_params(self, params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
        """The given `params`, or a SamplingParams with the fields in `options`.

        Without max_tokens in `options`, max_tokens is its default, or max_output_length where that is less. Raises
        RequestError when `params` and `options` are both given, and TypeError for an option that is no field of
        SamplingParams.
        """
        unknown = sorted(set(options) - set(_SAMPLING_NAMES))
        if unknown:
            raise TypeError(
                f"unexpected arguments {unknown}; fields of SamplingParams are {', '.join(_SAMPLING_NAMES)}"
            )
        if params is None:
            usual = SamplingParams.max_tokens
            longest = self.max_output_length or usual
            return SamplingParams(**{"max_tokens": min(usual, longest), **options})
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params is a {type(params).__name__}; it must be a SamplingParams")
        if options:
            raise RequestError(f"params is given and {', '.join(sorted(options))} too; put all into one of them")
        return params

    def parse(
        self,
        request: object,
        params: SamplingParams,
        name: str = "the request",
        arrival_time: float | None = None,
        request_id: str | None = None,
    ) -> EngineRequest:
        """An EngineRequest for `AsyncEngine.add`. `name` is the name of the request in progress lines.

        arrival_time None means now. request_id None means a new one. Raises RequestError for a malformed request,
        VideoError for media that cannot be read.
        """
        if arrival_time is None:
            arrival_time = time.perf_counter()
        request = check_request(request)
        chat = _chat_of(request)
        media = media_of(request) if chat is None else media_of_chat(chat, request.get("num_frames"))
        token_ids, stop_token_ids = self._prompt_of(request, chat, len(media))
        expanded, spans = expand_placeholders(
            token_ids, self.config.image_token_index, len(media), self.config.num_video_tokens
        )
        if not expanded:
            raise RequestError("the prompt is empty; there is nothing to continue", param="prompt")
        decode_began = time.perf_counter()
        videos = media.prepare(self.processor)
        decode_seconds = time.perf_counter() - decode_began
        self._warn_of_length(len(expanded), params.max_tokens)
        return EngineRequest(
            prompt_token_ids=token_ids,
            token_ids=expanded,
            spans=spans,
            videos=videos,
            params=params,
            stop_token_ids=frozenset() if params.ignore_eos else frozenset(stop_token_ids),
            arrival_time=arrival_time,
            video_decode=decode_seconds,
            external_id=request.get("id"),
            name=name,
            request_id=request_id or new_request_id(),
        )

    def _prompt_of(self, request: Mapping[str, Any], chat: Chat | None, videos: int) -> tuple[list[int], list[int]]:
        """Token ids with one image token for each video, and the tokens that end the answer."""
        end_token_ids = list(self.config.eos_token_ids)
        if "prompt" in request:
            return self.tokenizer.encode(_text(request, "prompt")), end_token_ids
        prefix = request.get("answer_prefix")
        if chat is not None:
            pieces = render_turns(self.conversation, chat.turns, system=chat.system, answer_prefix=prefix)
        else:
            question = _text(request, "question")
            history = request.get("history") or ()
            pieces = render(self.conversation, question, videos=videos, history=history, answer_prefix=prefix)
        return self.tokenizer.encode_pieces(pieces), [*end_token_ids, self._turn_end]

    def _warn_of_length(self, prompt_tokens: int, max_tokens: int) -> None:
        longest = self.config.text.max_position_embeddings
        if prompt_tokens + max_tokens > longest:
            logger.warning(
                "%d prompt tokens and up to %d more exceed the %d positions the model was trained on; "
                "the quality beyond them is untested",
                prompt_tokens,
                max_tokens,
                longest,
            )


def chat_request(
    media: Media | ProcessedVideo | Sequence[Media | ProcessedVideo] | None,
    question: str,
    history: Sequence[tuple[str, str]],
    answer_prefix: str | None,
) -> dict[str, Any]:
    """The request that asks one question, after the (question, answer) turns of `history`."""
    request: dict[str, Any] = {"question": question, "history": history, "answer_prefix": answer_prefix}
    return request if media is None else {**request, "video": media}


def check_request(request: object) -> Mapping[str, Any]:
    """Check the keys and texts of a request, and return the request. Media are checked when they are read.

    Raises RequestError that names the key.
    """
    if not isinstance(request, Mapping):
        raise RequestError(f"a request is a {type(request).__name__}; it must be a dict with {', '.join(REQUEST_KEYS)}")
    unknown = sorted(map(str, set(request) - set(REQUEST_KEYS)))
    if unknown:
        allowed = ", ".join(REQUEST_KEYS)
        raise RequestError(f"a request has unknown keys {unknown}; allowed are {allowed}", param=unknown[0])
    for key, may_have in (("messages", _WITH_MESSAGES), ("prompt", _WITH_PROMPT)):
        excluded = [name for name in REQUEST_KEYS if name in request and name not in may_have]
        if key in request and excluded:
            names = ", ".join(map(repr, excluded))
            raise RequestError(f"a request with {key!r} takes no {names}", param=excluded[0])
    if "messages" not in request:
        text = _text(request, "prompt" if "prompt" in request else "question")
        if "prompt" not in request and not text.strip():
            raise RequestError(f"the question is {text!r}, an empty text; ask something", param="question")
    if not isinstance(request.get("id"), str | int | None) or isinstance(request.get("id"), bool):
        raise RequestError(f"id is a {type(request['id']).__name__}; it must be a text or a whole number", param="id")
    if request.get("answer_prefix") is not None:
        _text(request, "answer_prefix")
    history = request.get("history") or ()
    turns = history if isinstance(history, list | tuple) else [history]
    if not all(isinstance(turn, list | tuple) and [type(text) for text in turn] == [str, str] for turn in turns):
        raise RequestError(
            f"history is {history!r}; it must be a list of (question, answer) pairs of text", param="history"
        )
    return request


def _chat_of(request: Mapping[str, Any]) -> Chat | None:
    """The messages of a request as a Chat. None when it has none."""
    if "messages" not in request:
        return None
    try:
        return parse_chat_messages(request["messages"])
    except RequestError as error:
        error.param = "messages"
        raise


def request_name(request: object, number: int) -> str:
    """The name of request `number` in progress lines: its id, or "request 1" for number 0."""
    given = request.get("id") if isinstance(request, Mapping) else None
    return f"request {number + 1}" if given is None else str(given)


def _turn_end_token(conversation: Conversation, tokenizer: Tokenizer) -> int:
    """The token that ends an assistant's turn."""
    text = conversation.turn_end
    token = tokenizer.token_id(text)
    if token is None:
        raise ConfigError(
            f"the conversation ends turns with {text}, which is no token of this checkpoint: the _llavanext "
            "conversations are for 34B"
        )
    return token


def _text(request: Mapping[str, Any], key: str) -> str:
    text = request.get(key)
    if not isinstance(text, str):
        given = type(text).__name__
        raise RequestError(
            f"a request needs a text under 'prompt' or 'question', or 'messages'; {key!r} is {given}", param=key
        )
    return text
