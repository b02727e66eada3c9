"""How a video travels in a prompt's token ids through a host that knows only ids.

A video of n tokens is a block of n ids: the image token, the segment's key and its size as negative numbers, zeros,
and the image token again. Only the negative numbers make a block. The tokenizer makes none of text, so a user who
writes `<image>`, or digits, has written text; and image tokens outside of blocks are words like any other.

The host's sampler keeps prompts as int32 and counts words by index (quirk 18). So the negative numbers are such that
their lower halves are positive and beyond any vocabulary, which it counts nowhere.
"""

from collections.abc import Sequence

from atb_pllava.errors import ConfigError, RequestError
from atb_pllava.mindie.segments import Segment
from atb_pllava.prompt.placeholders import VideoSpan

SHORTEST_BLOCK = 4
_LOW_BITS = 29  # of a number of up to 60 bits, in the lower half of its id; the others are in the upper half
_LOWEST = 2**31 + 1  # of lower halves: with the sign turned they are between 3 * 2**29 and 2**31


def check_block_length(tokens: int) -> None:
    """Raises ConfigError for a pooling whose videos are too short to name a segment."""
    if tokens < SHORTEST_BLOCK:
        raise ConfigError(
            f"pooling_shape makes {tokens} tokens of a video; inside MindIE at least {SHORTEST_BLOCK} are needed"
        )


def insert_blocks(token_ids: Sequence[int], segments: Sequence[Segment], image_token: int, length: int) -> list[int]:
    """A prompt with one image token for each segment to one with blocks of `length` ids in their place."""
    waiting = iter(segments)
    ids: list[int] = []
    for token in token_ids:
        if token == image_token:
            segment = next(waiting)
            named = (_to_id(segment.key), _to_id(segment.num_bytes))
            ids += [token, *named, *[0] * (length - SHORTEST_BLOCK), token]
        else:
            ids.append(token)
    return ids


def find_blocks(token_ids: Sequence[int], image_token: int, length: int) -> list[tuple[VideoSpan, Segment]]:
    """The blocks in the ids of one or several prompts. Raises RequestError for negative ids that are not a whole one.

    A prompt that was cut in the middle of a video, or ids that somebody made up, end here.
    """
    found: list[tuple[VideoSpan, Segment]] = []
    position = 0
    for i, token in enumerate(token_ids):
        if token >= 0 or i < position:
            continue
        start = i - 1
        block = token_ids[max(start, position) : start + length]
        whole = start >= position and len(block) == length and _is_ours(block[1]) and _is_ours(block[2])
        if not whole or block[0] != image_token or block[-1] != image_token or any(block[3:-1]):
            raise RequestError(
                f"token {i} of the prompt is {token}, and not part of a whole video of {length} tokens: the prompt was "
                "cut (raise maxInputTokenLen and maxSeqLen), or ids were given that are none"
            )
        found.append((VideoSpan(start, length), Segment(_to_number(block[1]), _to_number(block[2]))))
        position = start + length
    return found


def _to_id(number: int) -> int:
    upper, lower = divmod(number, 1 << _LOW_BITS)
    return -((upper << 32) + _LOWEST + lower)


def _to_number(token: int) -> int:
    upper, lower = divmod(-token, 2**32)
    return (upper << _LOW_BITS) + lower - _LOWEST


def _is_ours(token: int) -> bool:
    return token < 0 and 0 <= -token % 2**32 - _LOWEST < 1 << _LOW_BITS
