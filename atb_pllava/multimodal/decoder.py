"""Decodes the wanted frames of a video: seeks to keyframes and decodes as few packets as possible.

`plan_ranges` chooses the packets, and `decode_range` decodes them. `video.py` calls the one, and `parallel_decoder.py`
the other. A position is the number of a packet in file order.
"""

from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import av

from atb_pllava.multimodal.packet_index import Keyframe, SeekIndex
from atb_pllava.multimodal.packet_times import MAX_REORDERED
from atb_pllava.multimodal.video_stream import VideoFile, VideoStream, open_stream

SMALLEST_SEEK = 8  # packets: decoding fewer packets is cheaper than a seek over them


class ClockError(Exception):
    """The decoder shows frames in another order than their presentation times say."""


class PacketRange(NamedTuple):
    """A range of packets that is decoded without a seek inside the range."""

    start: Keyframe | None  # None: the beginning of the file
    last: int  # position of the last packet
    wanted: frozenset[int] | None  # positions whose frames must come out; None: all


def plan_ranges(seek: SeekIndex, frames: Iterable[int]) -> list[PacketRange]:
    """The ranges that hold the frame numbers `frames`, in file order. A range starts at its first frame's keyframe.

    Two ranges are merged if the second keyframe is at most SMALLEST_SEEK packets after the end of the first range.
    A frame number beyond the last frame means the last frame.
    """
    ranges: list[PacketRange] = []
    for frame in sorted(min(k, len(seek.pts) - 1) for k in frames):
        position = seek.positions[frame]
        key = _keyframe_before(seek, seek.pts[frame], position)
        last = _last_to_decode(seek, position)
        wanted = frozenset(range(position, last + 1))
        if ranges and key.position <= ranges[-1].last + SMALLEST_SEEK:
            before = ranges[-1]
            ranges[-1] = PacketRange(before.start, max(before.last, last), (before.wanted or frozenset()) | wanted)
        else:
            ranges.append(PacketRange(None if key.position <= SMALLEST_SEEK else key, last, wanted))
    return ranges


def whole_range(seek: SeekIndex) -> PacketRange:
    """The range of all packets, whose frames must all come out."""
    return PacketRange(None, max(seek.positions), None)


def decode_ranges(video: VideoFile, seek: SeekIndex, ranges: Sequence[PacketRange]) -> Generator[Any, None, None]:
    """The decoded frames of the ranges by one decoder, unwanted frames included, in the order of `decode_range`."""
    with open_stream(video) as stream:
        for packet_range in ranges:
            yield from decode_range(stream, seek, packet_range)


def decode_range(stream: VideoStream, seek: SeekIndex, packet_range: PacketRange) -> Iterator[Any]:
    """The decoded frames of one range, unwanted frames included, in the decoder's order. Frames need a pts.

    Raises ClockError if the pts decreases between two frames.
    """
    latest = None
    for frame in _decode_packets(stream, seek, packet_range):
        if frame.pts is None:
            continue
        if latest is not None and frame.pts < latest:
            raise ClockError
        latest = frame.pts
        yield frame


def _keyframe_before(seek: SeekIndex, pts: int, position: int) -> Keyframe:
    """The last keyframe that is neither shown nor stored after the frame. The first keyframe if there is none."""
    number = bisect_right(seek.keyframes, pts, key=lambda key: key.pts) - 1
    while number > 0 and seek.keyframes[number].position > position:
        number -= 1
    return seek.keyframes[number]


def _last_to_decode(seek: SeekIndex, position: int) -> int:
    """The position of the last packet to decode for the frame at `position`.

    The result is `position`, or `position` + MAX_REORDERED if a clock jump follows within MAX_REORDERED packets. Near a
    jump only the decoder knows the order of frames, and holds back a frame for at most MAX_REORDERED packets.
    """
    soon = bisect_right(seek.jumps, position)
    jumps_soon = soon < len(seek.jumps) and seek.jumps[soon] <= position + MAX_REORDERED
    return position + MAX_REORDERED if jumps_soon else position


def _decode_packets(stream: VideoStream, seek: SeekIndex, packet_range: PacketRange) -> Iterator[av.VideoFrame]:
    """The decoded frames of one range. The decoder skips unwanted frames that are not reference frames."""
    wanted = packet_range.wanted
    for position, packet in _packets_from(stream, seek, packet_range.start):
        is_wanted = wanted is None or position in wanted
        stream.skip_nonref(not is_wanted)
        yield from stream.decode(packet)
        if position >= packet_range.last:
            break
    yield from stream.decode(None)


def _packets_from(stream: VideoStream, seek: SeekIndex, start: Keyframe | None) -> Iterator[tuple[int, Any]]:
    """Packets with their positions, from `start` or an earlier keyframe on. No packets if the container cannot seek."""
    if start is None:
        yield from enumerate(stream.packets())
        return
    position_at = {key.pts: key.position for key in seek.keyframes}
    for timestamp in (start.pts, start.dts):  # some containers seek by pts, others by dts
        if not stream.seek(timestamp):
            return
        packets = stream.packets()
        landed = next((packet for packet in packets if packet.is_keyframe), None)
        if landed is None:
            continue
        position = position_at.get(landed.pts)
        if position is not None and position <= start.position:
            yield position, landed
            yield from enumerate(packets, position + 1)
            return
