"""The responses' forms, for the OpenAPI document. The server builds responses as plain dicts, which is faster."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """The body of every status from 400 on."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """Prompt tokens whose keys and values were in the KV cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request. prompt_tokens counts the tokens of videos."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class AnswerMessage(BaseModel):
    """The model's answer."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One of the n answers."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The answer to a chat completion request that does not stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    """One of the n continuations of one prompt."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    """The answer to a completion request that does not stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(BaseModel):
    """The served model. max_model_len: the most tokens of a prompt and its answer together.

    num_frames are sampled of a video unless a request says otherwise, and pooled to pooling_shape: num_video_tokens.
    settings: what else decides the answers, such as a digest of the weights. Servers with equal settings answer alike.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    num_frames: int
    pooling_shape: list[int]
    num_video_tokens: int
    settings: dict[str, Any] | None
    permission: list[Any]


class ModelList(BaseModel):
    """All served models: one."""

    object: Literal["list"]
    data: list[ModelCard]


class Version(BaseModel):
    """The version of atb_pllava."""

    version: str
