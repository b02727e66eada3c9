"""What POST /v1/completions takes: literal prompts."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from atb_pllava.server.protocol.sampling import SamplingFields


def _prompt_tag(value: Any) -> str:
    return "(list)" if isinstance(value, list) else "(text)"


Prompts = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[str], Field(min_length=1, max_length=64), Tag("(list)")],
    Discriminator(_prompt_tag),
]


class CompletionRequest(SamplingFields):
    """Prompts that are continued as they are, without a conversation format. Token ids are not supported."""

    prompt: Prompts
    logprobs: int | None = Field(default=None, ge=0, le=20, description="Return the K likeliest tokens at each place.")
