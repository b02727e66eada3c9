"""A video's frame order, its length, its frame rate and the jumps of its clock, from the times of its packets.

A muxer wrote the times. The clock restarts where files were joined and leaps where a recording was cut, and single
times may be wrong. The bitstream alone decides in which order a decoder shows frames. `presentation_order` therefore
returns None when the times may contradict the bitstream.
The functions are plain arithmetic. `packet_index.py` reads the packets and calls them. Times are in the stream's time
base. `pts` is the presentation time and `dts` the decoding time.
"""

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from statistics import median
from typing import NamedTuple

LONGEST_STEP = 10  # seconds. A longer step is a leap of the clock: ffmpeg's default for -dts_delta_threshold
MAX_REORDERED = 16  # frames a decoder holds back at most: the picture buffer's size in H.264 and HEVC


class Packet(NamedTuple):
    """The header of a packet of the video stream."""

    position: int  # number of the packet in file order
    pts: int | None  # None: the file does not say
    dts: int | None  # None: the file does not say
    duration: int  # 0: unknown
    is_keyframe: bool


class Length(NamedTuple):
    """The length of a video and its frame rate. Leaps of the clock do not count."""

    seconds: float
    rate: float  # frames a second. 0.0: unknown


def presentation_order(packets: Sequence[Packet], first_keyframe: Packet, has_b_frames: bool) -> list[Packet] | None:
    """The packets in the order of their pts, or None when the decoder may show the frames in another order.

    Packets stored or shown before the file's first keyframe are left out, because their frames refer to frames that
    were cut off. The order is None when times are missing or repeat, and when dts decrease. The order is also None when
    no decoder with this stream's delay can show the frames in the order of their pts.
    """
    times = {packet.pts for packet in packets}
    if first_keyframe.pts is None or None in times or len(times) < len(packets):
        return None
    decoding_times = [packet.dts for packet in packets if packet.dts is not None]
    if any(after < before for before, after in pairwise(decoding_times)):
        return None
    frames = [packet for packet in packets if packet.position >= first_keyframe.position]
    ordered = sorted(frames, key=_pts)
    if not _keyframes_follow(frames) or not _can_be_shown(frames, ordered, has_b_frames):
        return None
    if any(_pts(frame) < first_keyframe.pts and frame.dts is not None and _pts(frame) < frame.dts for frame in frames):
        return None  # a frame whose pts is before its own dts: that pts is wrong
    return [packet for packet in ordered if _pts(packet) >= first_keyframe.pts]


def find_jumps(packets: Sequence[Packet]) -> list[int]:
    """Positions of the packets at which the clock jumps: the step to their dts is over twice the median step.

    Keyframes are left out. Near a jump inside a group of B-frames, the order of the pts is not the decoder's order.
    """
    decoded = [packet for packet in packets if packet.dts is not None]
    steps = [_dts(after) - _dts(before) for before, after in pairwise(decoded)]
    usual = median(steps) if steps else 0
    return [p.position for p, step in zip(decoded[1:], steps, strict=True) if step > 2 * usual and not p.is_keyframe]


def measure_length(packets: Sequence[Packet], unit: Fraction) -> Length:
    """The length of packets in file order: the sum of the steps between their dts. `unit` is the time base in seconds.

    A step backwards, or one that exceeds the packet's duration by more than LONGEST_STEP seconds, is a leap of the
    clock. The packet's duration counts in place of a leap. Without any dts the steps between pts are summed.
    """
    by_dts = any(packet.dts is not None for packet in packets)
    known = [(i, p.dts if by_dts else p.pts) for i, p in enumerate(packets)]
    clock = [(i, time) for i, time in known if time is not None]
    longest = int(LONGEST_STEP / unit)
    frames = 0
    ticks = 0
    filled = 0
    for (i, time), (next_i, next_time) in pairwise(clock):
        step = next_time - time
        if 0 <= step <= packets[i].duration + longest:
            ticks += step
            frames += next_i - i
        else:
            filled += packets[i].duration
    filled += packets[-1].duration if packets else 0
    return Length(float((ticks + filled) * unit), float(frames / (ticks * unit)) if ticks else 0.0)


def _keyframes_follow(frames: Sequence[Packet]) -> bool:
    """Whether every keyframe is shown after all frames stored before the keyframe, as the standards demand."""
    latest = None
    for frame in frames:
        if frame.is_keyframe and latest is not None and _pts(frame) <= latest:
            return False
        latest = _pts(frame) if latest is None else max(latest, _pts(frame))
    return True


def _can_be_shown(frames: Sequence[Packet], ordered: Sequence[Packet], has_b_frames: bool) -> bool:
    """Whether a decoder can show the frames in this order while it holds back no more frames than this stream needs."""
    shown_as = {frame.position: number for number, frame in enumerate(ordered)}
    held_back = [number - shown_as[frame.position] for number, frame in enumerate(frames)]
    if not has_b_frames:
        return not any(held_back)
    return max(held_back, default=0) <= _decoding_delay(frames, ordered) and not _is_any_far_ahead(frames)


def _decoding_delay(frames: Sequence[Packet], ordered: Sequence[Packet]) -> int:
    """The usual number of frames that are decoded and not yet shown. MAX_REORDERED if no packet has a dts.

    The result is the lower quartile, because a wrong pts far ahead raises the number of all later frames.
    """
    times = [_pts(frame) for frame in ordered]
    waiting = sorted(i - bisect_left(times, frame.dts) for i, frame in enumerate(frames) if frame.dts is not None)
    return waiting[len(waiting) // 4] if waiting else MAX_REORDERED


def _is_any_far_ahead(frames: Sequence[Packet]) -> bool:
    """Whether the pts of a frame is later than the dts of the packet 2 * MAX_REORDERED packets further on.

    Such a pts is wrong, because no encoder delays a frame so long. The dts are extrapolated beyond the last packet.
    """
    decoded = [frame for frame in frames if frame.dts is not None]
    clock = [_dts(frame) for frame in decoded]
    steps = [after - before for before, after in pairwise(clock)]
    usual = median(steps) if steps else 0
    clock += [clock[-1] + round(usual * k) for k in range(1, 2 * MAX_REORDERED + 1)] if clock else []
    return any(_pts(frame) > clock[i + 2 * MAX_REORDERED] for i, frame in enumerate(decoded))


def _pts(packet: Packet) -> int:
    assert packet.pts is not None
    return packet.pts


def _dts(packet: Packet) -> int:
    assert packet.dts is not None
    return packet.dts
