"""The rows of a caption run: what is asked about a video, and the row of an answer or an error.

Beside the fields of `result_log`, a row has:

    path            of the video, as this process opens it: a table's relative path has the table's folder in front
    prompt          name of the prompt: a number, a preset, or "own" for the prompt of the input's row
    text, finish_reason, tokens, prompt_tokens    the answer and its sizes
    flags           see `caption_flags`
    frame_indices, frame_seconds    the sampled frames, and their times (null without a frame rate)
    seconds         from the moment when the answer was asked for; the first prompt's also has the reading
    copied_from     id of the row whose answer this is: the sampled frames and the prompt are the same
    start_seconds, end_seconds, own_prompt, columns    of the input's row, where it has them
    error, kind     instead of an answer. kind: a VideoErrorKind, a code of RequestError, of a URL or of the server
"""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from atb_pllava.batch.answering import error_row
from atb_pllava.batch.caption_flags import caption_flags
from atb_pllava.batch.caption_item import CaptionItem, is_address
from atb_pllava.batch.caption_prompts import Prompt
from atb_pllava.batch.captioner import Caption, OpenVideo
from atb_pllava.batch.log_line import Row
from atb_pllava.batch.result_key import Key, key_of
from atb_pllava.errors import PllavaError, RequestError, ServerError, VideoError
from atb_pllava.multimodal.media_source_error import MediaSourceError

OWN_PROMPT = "own"


@dataclass(frozen=True)
class Question:
    """A prompt about one item, with the key of its row."""

    key: Key
    item: CaptionItem
    prompt: Prompt


def questions_of(item: CaptionItem, prompts: list[Prompt], folders: dict[str, str]) -> list[Question]:
    """The questions about an item: its own prompt, or all `prompts`. The file is looked at, and not read.

    `folders` is that of `key_of`.
    """
    asked = prompts if item.prompt is None else [Prompt(OWN_PROMPT, item.prompt)]
    file = Key(item.id) if is_address(item.path) else key_of(item.id, item.path, folders)
    return [Question(replace(file, request=_request_digest(item, prompt)), item, prompt) for prompt in asked]


def model_input(video: OpenVideo, prompt: Prompt) -> str:
    """A digest of the frames and the prompt. Under one settings digest, equal inputs have equal answers."""
    return _digest(video.frames_hash, prompt.text)


def caption_row(question: Question, video: OpenVideo, caption: Caption, seconds: float, copied_from: str | None) -> Row:
    """The row of an answer."""
    row = {
        **_head(question),
        "text": caption.text,
        "finish_reason": caption.finish_reason,
        "flags": caption_flags(caption.text, caption.finish_reason, question.prompt.text),
        "tokens": caption.output_tokens,
        "prompt_tokens": caption.prompt_tokens,
        "frame_indices": list(video.frame_indices),
        "frame_seconds": None if video.frame_seconds is None else [round(time, 3) for time in video.frame_seconds],
        "seconds": round(seconds, 3),
        "model_input": model_input(video, question.prompt),
    }
    if copied_from is not None:
        row["copied_from"] = copied_from
    return row | _of_input(question.item)


def caption_of(row: Row) -> Caption:
    """The answer in a row."""
    return Caption(row["text"], row["finish_reason"], row["prompt_tokens"], row["tokens"])


def failed_row(question: Question, error: PllavaError, seconds: float) -> Row:
    """The row of an error."""
    return {
        **_head(question),
        **error_row(error),
        "kind": error_kind(error),
        "seconds": round(seconds, 3),
        **_of_input(question.item),
    }


def error_kind(error: PllavaError) -> str:
    """The stable word for the cause of an error."""
    if isinstance(error, VideoError):
        return error.kind
    if isinstance(error, RequestError | ServerError | MediaSourceError) and error.code is not None:
        return error.code
    return str(error_row(error)["kind"])


def _head(question: Question) -> Row:
    return {"path": question.item.path, "prompt": question.prompt.name}


def _of_input(item: CaptionItem) -> Row:
    """What a row repeats of the input."""
    given: dict[str, Any] = {
        "start_seconds": item.start_seconds,
        "end_seconds": item.end_seconds,
        "own_prompt": item.prompt,
        "columns": dict(item.columns) or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _request_digest(item: CaptionItem, prompt: Prompt) -> str:
    return _digest(prompt.text, item.start_seconds, item.end_seconds)


def _digest(*parts: Any) -> str:
    """32 hexadecimal digits of SHA-256."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
