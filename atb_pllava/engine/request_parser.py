"""From a request as users write it, a mapping, to an EngineRequest: checked, media decoded, prompt tokenized."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import inf, nan
from numbers import Real
from operator import index
from typing import Any

import numpy as np

from atb_pllava.config import PllavaConfig
from atb_pllava.engine.engine_request import EngineRequest, new_request_id
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import ConfigError, RequestError, counted
from atb_pllava.multimodal.frame_sampling import check_time_order
from atb_pllava.multimodal.processor import Media, TimeRange, VideoProcessor
from atb_pllava.prompt.chat_template import Conversation, render
from atb_pllava.prompt.placeholders import expand_placeholders
from atb_pllava.prompt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MEDIA_KEYS = ("video", "image", "frames")
TIME_KEYS = ("start_seconds", "end_seconds")
REQUEST_KEYS = ("prompt", "question", *MEDIA_KEYS, "frame_indices", *TIME_KEYS, "history", "answer_prefix", "id")
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
        media, frame_indices, time_ranges = media_of(request)
        token_ids, stop_token_ids = self._prompt_of(request, len(media))
        expanded, spans = expand_placeholders(
            token_ids, self.config.image_token_index, len(media), self.config.num_video_tokens
        )
        if not expanded:
            raise RequestError("the prompt is empty; there is nothing to continue")
        decode_began = time.perf_counter()
        videos = self.processor.prepare(media, frame_indices, time_ranges) if media else []
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

    def _prompt_of(self, request: Mapping[str, Any], videos: int) -> tuple[list[int], list[int]]:
        """Token ids with one image token for each video, and the tokens that end the answer."""
        end_token_ids = list(self.config.eos_token_ids)
        if "prompt" in request:
            return self.tokenizer.encode(_text(request, "prompt")), end_token_ids
        pieces = render(
            self.conversation,
            _text(request, "question"),
            videos=videos,
            history=request.get("history") or (),
            answer_prefix=request.get("answer_prefix"),
        )
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
    media: Media | Sequence[Media] | None, question: str, history: Sequence[tuple[str, str]], answer_prefix: str | None
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
        raise RequestError(f"a request has unknown keys {unknown}; allowed are {', '.join(REQUEST_KEYS)}")
    if "prompt" in request and not request.keys().isdisjoint({"question", "history", "answer_prefix"}):
        raise RequestError("a request with a literal 'prompt' takes no 'question', 'history' or 'answer_prefix'")
    text = _text(request, "prompt" if "prompt" in request else "question")
    if "prompt" not in request and not text.strip():
        raise RequestError(f"the question is {text!r}, an empty text; ask something")
    if not isinstance(request.get("id"), str | int | None) or isinstance(request.get("id"), bool):
        raise RequestError(f"id is a {type(request['id']).__name__}; it must be a text or a whole number")
    if request.get("answer_prefix") is not None:
        _text(request, "answer_prefix")
    history = request.get("history") or ()
    turns = history if isinstance(history, list | tuple) else [history]
    if not all(isinstance(turn, list | tuple) and [type(text) for text in turn] == [str, str] for turn in turns):
        raise RequestError(f"history is {history!r}; it must be a list of (question, answer) pairs of text")
    return request


def media_of(request: Mapping[str, Any]) -> tuple[list[Media], list[list[int] | None], list[TimeRange]]:
    """The media of a checked request. For each medium, the frame numbers (None: sampled) and the times it names.

    Raises RequestError for media under two keys, and for frame_indices or times that do not fit the media.
    """
    given = [key for key in MEDIA_KEYS if request.get(key) is not None]
    if len(given) > 1:
        raise RequestError(f"a request has {' and '.join(given)}; name its media under one key")
    value = request[given[0]] if given else ()
    media: list[Media] = list(value) if isinstance(value, list | tuple) else [value]
    if given and not media:
        raise RequestError(f"{given[0]} is an empty list; leave it out to ask without media")
    if given == ["frames"] and not all(isinstance(item, np.ndarray) for item in media):
        raise RequestError("frames must be uint8 arrays [frames, height, width, 3]; files go under 'video' or 'image'")
    named = [key for key in TIME_KEYS if request.get(key) is not None]
    if named and (given == ["frames"] or request.get("frame_indices") is not None):
        other = "frame_indices" if request.get("frame_indices") is not None else "frames"
        raise RequestError(
            f"a request has {other} and {' and '.join(named)}; times choose among the frames of a video file, "
            "so leave one of them out"
        )
    return media, _frame_indices_of(request, len(media)), _time_ranges_of(request, len(media))


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
        raise RequestError(f"a request needs a text under 'prompt' or 'question'; {key!r} is {type(text).__name__}")
    return text


def _frame_indices_of(request: Mapping[str, Any], media: int) -> list[list[int] | None]:
    """The frame numbers that a request names, a list for each of its `media` media."""
    indices = request.get("frame_indices")
    if indices is None:
        return [None] * media
    wanted = [_whole_numbers(part) for part in (indices if _is_nested(indices) else [indices])]
    if len(wanted) != media:
        raise RequestError(f"frame_indices is given for {counted(len(wanted), 'video')}, the request has {media}")
    return list(wanted)


def _time_ranges_of(request: Mapping[str, Any], media: int) -> list[TimeRange]:
    """Start and end in seconds of each of the `media` media. None where the request names no time."""
    starts, ends = (_seconds_of(request, key, media) for key in TIME_KEYS)
    for start, end in zip(starts, ends, strict=True):
        check_time_order(start, end, RequestError)
    return list(zip(starts, ends, strict=True))


def _seconds_of(request: Mapping[str, Any], key: str, media: int) -> list[float | None]:
    """The times under `key`, one for each medium. One number is for all media."""
    value = request.get(key)
    values = list(value) if isinstance(value, list | tuple) else [value] * media
    if len(values) != media:
        raise RequestError(f"{key} is given for {counted(len(values), 'video')}, the request has {media}")
    if value is not None and not media:
        raise RequestError(f"a request has {key} and no video; name the video, or leave {key} out")
    return [None if seconds is None else _seconds(key, seconds) for seconds in values]


def _seconds(key: str, seconds: object) -> float:
    is_number = isinstance(seconds, Real) and not isinstance(seconds, bool)
    try:
        value = float(seconds) if is_number else nan  # type: ignore[arg-type]
    except OverflowError:  # a whole number that no float is near
        value = inf
    if not 0 <= value < inf:
        raise RequestError(f"{key} is {seconds!r}; it must be a number of seconds from 0, or one for each video")
    return value


def _whole_numbers(values: Sequence[object]) -> list[int]:
    """Frame numbers as plain integers. Raises RequestError for a sequence of anything but whole numbers."""
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        return [index(value) for value in values]  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(f"frame_indices is {values!r}; it must be a list of whole numbers for each video") from None


def _is_nested(indices: object) -> bool:
    return isinstance(indices, list | tuple) and len(indices) > 0 and isinstance(indices[0], list | tuple | np.ndarray)
