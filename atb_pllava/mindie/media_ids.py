"""A video as a block of token ids, because MindIE passes only token ids from its tokenizer to its workers.

A video of n tokens is a block of n ids. The first and the last id are the image token. The second and the third are
negative numbers: the key and the size of the shared memory segment. All others are zero. Only the negative numbers mark
a block. The tokenizer makes no negative id from text, so a user's `<image>` or digits remain text. An image token
outside a block is an ordinary token.

With a repetition penalty, MindIE's sampler cuts prompt ids to int32 and uses them as indices (quirk 18). The lower 32
bits of the negative ids are therefore positive and beyond any vocabulary. MindIE has a column of its own for such ids.
"""

from collections.abc import Sequence

from atb_pllava.errors import ConfigError, RequestError
from atb_pllava.mindie.segments import Segment
from atb_pllava.prompt.placeholders import VideoSpan

SHORTEST_BLOCK = 4  # ids: image token, key, size, image token
# A number of up to 60 bits becomes an int64. The lower half is its lower 29 bits plus _LOWEST. The upper half is its
# other bits. Then the sign is turned, and the lower half of the result lies between 3 * 2**29 and 2**31.
_LOW_BITS = 29
_LOWEST = 2**31 + 1


def check_block_length(tokens: int) -> None:
    """Raises ConfigError when a video has fewer tokens than SHORTEST_BLOCK, which cannot name a segment."""
    if tokens < SHORTEST_BLOCK:
        raise ConfigError(
            f"pooling_shape makes {tokens} tokens of a video; inside MindIE at least {SHORTEST_BLOCK} are needed"
        )


def insert_blocks(token_ids: Sequence[int], segments: Sequence[Segment], image_token: int, length: int) -> list[int]:
    """The prompt with each image token replaced by a block of `length` ids that names the next of `segments`."""
    remaining = iter(segments)
    ids: list[int] = []
    for token in token_ids:
        if token == image_token:
            segment = next(remaining)
            padding = [0] * (length - SHORTEST_BLOCK)
            ids += [token, _to_id(segment.key), _to_id(segment.num_bytes), *padding, token]
        else:
            ids.append(token)
    return ids


def find_blocks(token_ids: Sequence[int], image_token: int, length: int) -> list[tuple[VideoSpan, Segment]]:
    """All blocks in the ids of one or several prompts: the span of each block, and the segment that it names.

    Raises RequestError for a negative id outside a whole block: the prompt was cut, or was not made by this package.
    """
    found: list[tuple[VideoSpan, Segment]] = []
    position = 0
    for i, token in enumerate(token_ids):
        if token >= 0 or i < position:
            continue
        start = i - 1
        block = token_ids[max(start, position) : start + length]
        is_whole = start >= position and len(block) == length and _is_number(block[1]) and _is_number(block[2])
        if not is_whole or block[0] != image_token or block[-1] != image_token or any(block[3:-1]):
            raise RequestError(
                f"token {i} of the prompt is {token}, and not part of a whole video of {length} tokens: the prompt was "
                "cut (raise maxInputTokenLen and maxSeqLen), or ids were given that are none"
            )
        found.append((VideoSpan(start, length), Segment(_to_number(block[1]), _to_number(block[2]))))
        position = start + length
    return found


def _to_id(number: int) -> int:
    """A number of up to 60 bits as a negative token id."""
    upper, lower = divmod(number, 1 << _LOW_BITS)
    return -((upper << 32) + _LOWEST + lower)


def _to_number(token: int) -> int:
    """The inverse of `_to_id`."""
    upper, lower = divmod(-token, 2**32)
    return (upper << _LOW_BITS) + lower - _LOWEST


def _is_number(token: int) -> bool:
    """Whether `_to_id` makes this token id for some number."""
    return token < 0 and 0 <= -token % 2**32 - _LOWEST < 1 << _LOW_BITS
