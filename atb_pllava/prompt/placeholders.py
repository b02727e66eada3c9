"""Expands each `<image>` token of a prompt to one placeholder token for every row of the video embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass

from atb_pllava.errors import RequestError
from atb_pllava.prompt.tokenizer import IMAGE_TOKEN


@dataclass(frozen=True)
class VideoSpan:
    """The position of one video's placeholder tokens in the expanded prompt."""

    start: int
    length: int


def expand_placeholders(
    token_ids: Sequence[int], image_token_id: int, videos: int, tokens_per_video: int
) -> tuple[list[int], list[VideoSpan]]:
    """Replaces each `<image>` token by `tokens_per_video` placeholder tokens of the same id.

    Returns the expanded ids and one span for each video, in the order of the prompt.
    Raises RequestError unless the prompt has exactly one `<image>` token for each video.
    """
    found = sum(token == image_token_id for token in token_ids)
    if found != videos:
        raise RequestError(
            f"the prompt has {found} {IMAGE_TOKEN} and the request {videos} video(s) or image(s); "
            f"write {IMAGE_TOKEN} exactly once for each of them"
        )
    expanded: list[int] = []
    spans = []
    for token in token_ids:
        if token == image_token_id:
            spans.append(VideoSpan(len(expanded), tokens_per_video))
            expanded += [token] * tokens_per_video
        else:
            expanded.append(token)
    return expanded, spans
