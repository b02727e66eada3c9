"""What POST /tokenize takes and returns."""

from pydantic import BaseModel, Field

from atb_pllava.server.protocol.base import RequestModel
from atb_pllava.server.protocol.chat import Message


class TokenizeRequest(RequestModel):
    """A literal prompt, or messages. One of both."""

    model: str | None = Field(default=None, description="The served model's name, or nothing.")
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=1000)


class TokenizeResponse(BaseModel):
    """`count` counts the tokens of videos. In `tokens` each video is one token."""

    count: int
    max_model_len: int
    tokens: list[int]
