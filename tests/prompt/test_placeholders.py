"""Every `<image>` of a prompt becomes as many tokens as its video has, and their number must fit the request."""

import pytest

from atb_pllava.errors import RequestError
from atb_pllava.prompt.placeholders import VideoSpan, expand_placeholders


def test_placeholders_are_expanded_to_their_true_length() -> None:
    ids, spans = expand_placeholders([1, 9, 5, 9, 6], 9, videos=2, tokens_per_video=3)
    assert ids == [1, 9, 9, 9, 5, 9, 9, 9, 6] and spans == [VideoSpan(1, 3), VideoSpan(5, 3)]
    for videos in (0, 1, 3):
        with pytest.raises(RequestError, match=f"2 <image> and the request {videos}"):
            expand_placeholders([1, 9, 5, 9, 6], 9, videos, 3)
