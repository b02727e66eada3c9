"""Log-probabilities in the forms of OpenAI's two APIs."""

from collections.abc import Sequence
from typing import Any

from atb_pllava.engine.outputs import TokenLogprobs
from atb_pllava.prompt.tokenizer import Tokenizer


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion: every token with its log-probability and the `num_top` likeliest."""
    content = []
    for token_id, values in zip(token_ids, logprobs, strict=True):
        top = [_entry(tokenizer, other, values[other]) for other in list(values)[:num_top]]
        content.append({**_entry(tokenizer, token_id, values[token_id]), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int, offset: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. `offset` is the length of the text before the first of these tokens."""
    tokens = [tokenizer.token_text(token_id) for token_id in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [values[token_id] for token_id, values in zip(token_ids, logprobs, strict=True)],
        "top_logprobs": [
            {tokenizer.token_text(other): values[other] for other in list(values)[:num_top]} for values in logprobs
        ],
        "text_offset": offsets,
    }


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.token_text(token_id)
    byte = tokenizer.byte_of(token_id)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if byte is None else [byte]}
