"""Cuts a long video into segments, each of which gets a caption of its own."""

from collections.abc import Iterator
from dataclasses import replace

from atb_pllava.batch.caption_item import CaptionItem, with_times
from atb_pllava.errors import ConfigError, VideoError, check_number
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media_length import read_length

_SHORTEST = 0.1  # seconds: two frames at a rate of 20
_LONGEST = 86_400.0
_LEAST_REST = 1.0  # seconds of a last segment of its own


def check_segment(seconds: float) -> float:
    """The length of segments. Raises ConfigError unless it is from 0.1 seconds to a day."""
    check_number("segment", seconds, _SHORTEST, _LONGEST, ConfigError)
    return float(seconds)


def cut_into_segments(item: CaptionItem, seconds: float, limits: MediaLimits) -> Iterator[CaptionItem]:
    """The item's part of the video in segments of `seconds`, with ids such as `film.mp4#60-90`.

    The length comes from the file's headers. A rest of less than a second, or of less than half a segment if that is
    shorter, belongs to the segment before. The last segment of a whole video has no end, in case the headers understate
    the length. Images and animations, whose headers state no length, stay one item. So does a file that cannot be
    opened: the run reports the reason.
    """
    try:
        length = read_length(item.path, limits).seconds
    except VideoError:
        length = None
    if length is None:
        yield item
        return
    base = item.id.removesuffix(with_times("", item.start_seconds, item.end_seconds))
    start = item.start_seconds or 0.0
    end = length if item.end_seconds is None else min(item.end_seconds, length)
    if start >= end:  # the run reports that no frame lies there
        yield item
        return
    number = _number_of_segments(end - start, seconds)
    for i in range(number):
        first = start + i * seconds
        is_last = i == number - 1
        last = end if is_last else first + seconds
        yield replace(
            item,
            id=with_times(base, first, last),
            start_seconds=first,
            end_seconds=item.end_seconds if is_last else last,
        )


def _number_of_segments(length: float, seconds: float) -> int:
    whole = int(length // seconds)
    rest = length - whole * seconds
    return max(1, whole + (rest >= min(_LEAST_REST, seconds / 2)))
