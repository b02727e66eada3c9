"""The usage of a request, in tokens."""

from collections.abc import Sequence
from typing import Any

from atb_pllava.engine.outputs import RequestOutput
from atb_pllava.server.generation import Generation


def final_usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """The usage of finished answers. prompt_tokens counts the tokens of videos."""
    usage = _usage(
        sum(output.metrics.prompt_tokens for output in outputs), sum(output.metrics.output_tokens for output in outputs)
    )
    cached = sum(output.num_cached_tokens for output in outputs)
    return {**usage, "prompt_tokens_details": {"cached_tokens": cached}}


def usage_so_far(generation: Generation) -> dict[str, Any]:
    """The usage while answers grow."""
    return _usage(generation.num_prompt_tokens, generation.num_tokens)


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
