"""The fields of chat completions and completions that say how tokens are chosen."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, StringConstraints, Tag

from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import RequestError
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.protocol.base import RequestModel

LARGEST_MAX_TOKENS = 2**31
LARGEST_SEED = 2**63 - 1
MOST_STOP_STRINGS = 64
MOST_LOGPROBS = 20

_StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_Stop = Annotated[
    Annotated[_StopString, Tag("(text)")]
    | Annotated[list[_StopString], Field(max_length=MOST_STOP_STRINGS), Tag("(list)")],
    Discriminator(lambda value: "(list)" if isinstance(value, list) else "(text)"),
]


class StreamOptions(RequestModel):
    """What a stream tells besides the text."""

    include_usage: bool | None = Field(default=None, description="Send a last chunk with the usage.")
    continuous_usage_stats: bool | None = Field(default=None, description="Send the usage so far with every chunk.")


class SamplingFields(RequestModel):
    """How tokens are chosen. Null is the same as leaving a field out."""

    model: str | None = Field(default=None, description="The served model's name, or nothing.")
    stream: bool | None = Field(default=None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST_MAX_TOKENS,
        description="The most tokens of an answer. Default: the server's own limit, or what the context has room for.",
    )
    temperature: float | None = Field(
        default=None, ge=0, le=100, description="0, the default, takes the likeliest token. Above 0 samples."
    )
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=2**31, description="Sample from the K likeliest; -1 and 0: all.")
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED)
    stop: _Stop | None = Field(default=None, description="The answer ends before any of these texts.")
    ignore_eos: bool | None = Field(default=None, description="Go on after an end-of-sequence token.")
    min_tokens: int | None = Field(
        default=None, ge=0, description="At most max_tokens. Above 0 it needs ignore_eos: true and no stop."
    )
    n: int | None = Field(default=None, ge=1, le=16, description="Answers; more than one needs a temperature above 0.")
    num_beams: int | None = Field(default=None, ge=1, le=16, description="Above 1: beam search, with temperature 0.")
    user: str | None = Field(default=None, description="Accepted, without effect.")

    @property
    def wanted_tokens(self) -> int | None:
        """The request's own limit of an answer's tokens."""
        return self.max_tokens

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check_stream_options(self) -> None:
        """Raises ApiError for stream_options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "invalid_field", "stream_options need stream: true", "stream_options")

    def sampling_params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """The engine's SamplingParams. Raises ApiError for fields that exclude each other."""
        names = ("temperature", "top_p", "repetition_penalty", "seed", "stop", "ignore_eos", "n", "num_beams")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        self._check_min_tokens(max_tokens)
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        try:
            return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)
        except RequestError as error:
            raise invalid_sampling(error) from None

    def _check_min_tokens(self, max_tokens: int) -> None:
        """Raises ApiError unless every answer is so long anyway, because nothing ends it before `max_tokens`."""
        if self.min_tokens and (not self.ignore_eos or self.stop or self.min_tokens > max_tokens):
            message = f"min_tokens is {self.min_tokens}; above 0 it needs ignore_eos: true, no stop and max_tokens"
            raise ApiError(400, "invalid_field", f"{message} (here {max_tokens}) not below it", "min_tokens")


def invalid_sampling(error: RequestError) -> ApiError:
    """The refusal of SamplingParams. Each message of theirs begins with the name of the field."""
    name = str(error).partition(" ")[0]
    return ApiError(400, "invalid_field", str(error), name if name in SamplingFields.model_fields else None)
