"""What packet times tell of a video's frames: their order, how long they last, and where the clock jumps.

A file's clock is what some muxer wrote. It restarts where files were joined, it leaps where a recording was cut, and
single times may be wrong. The order in which a decoder shows frames is in the bitstream and does not depend on it.
Plain arithmetic; `video.py` reads the packets and is the caller. Times are in the stream's time base.
"""

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from statistics import median
from typing import NamedTuple

LONGEST_STEP = 10  # seconds; a longer one is a leap of the clock: ffmpeg's default for -dts_delta_threshold
REORDERED = 16  # frames a decoder holds back at most: the picture buffer's size in H.264 and HEVC


class Packet(NamedTuple):
    """A packet that holds a frame to be shown."""

    position: int  # number of the packet in file order
    pts: int | None
    dts: int | None
    duration: int  # 0: unknown
    is_key: bool


class Length(NamedTuple):
    """How long frames last, and how many there are to a second; leaps of the clock do not count."""

    seconds: float
    rate: float  # frames a second; 0.0: the times do not tell


def presentation_order(packets: Sequence[Packet], first_key: Packet, has_b_frames: bool) -> list[Packet] | None:
    """The packets in the order of their pts, or None: the decoder may show the frames in another order.

    Frames stored or shown before the file's first key packet refer to frames that were cut off. They are left out.
    """
    times = {packet.pts for packet in packets}
    if first_key.pts is None or None in times or len(times) < len(packets):
        return None
    decoding_times = [packet.dts for packet in packets if packet.dts is not None]
    if any(after < before for before, after in pairwise(decoding_times)):
        return None
    frames = [packet for packet in packets if packet.position >= first_key.position]
    ordered = sorted(frames, key=_pts)
    if not _keys_follow(frames) or not _can_be_shown(frames, ordered, has_b_frames):
        return None
    if any(_pts(frame) < first_key.pts and frame.dts is not None and _pts(frame) < frame.dts for frame in frames):
        return None  # shown before the first key packet, but also before it is decoded
    return [packet for packet in ordered if _pts(packet) >= first_key.pts]


def find_jumps(packets: Sequence[Packet]) -> list[int]:
    """Positions of packets that come long after the one before, and are no key packets.

    Where such a jump of the clock lies between frames that are shown in another order than stored, the times give an
    order that is not the decoder's.
    """
    decoded = [packet for packet in packets if packet.dts is not None]
    steps = [_dts(after) - _dts(before) for before, after in pairwise(decoded)]
    usual = median(steps) if steps else 0
    return [p.position for p, step in zip(decoded[1:], steps, strict=True) if step > 2 * usual and not p.is_key]


def measure_length(packets: Sequence[Packet], unit: Fraction) -> Length:
    """The length of packets in file order, by the steps of their dts; `unit` is the time base in seconds.

    The clock leaps where it steps back, or ahead by more than LONGEST_STEP beyond the packet's own duration. Such a
    step counts as that duration.
    """
    by_dts = any(packet.dts is not None for packet in packets)
    known = [(i, p.dts if by_dts else p.pts) for i, p in enumerate(packets)]
    clock = [(i, time) for i, time in known if time is not None]
    longest = int(LONGEST_STEP / unit)
    frames = ticks = filled = 0
    for (i, time), (next_i, next_time) in pairwise(clock):
        step = next_time - time
        if 0 <= step <= packets[i].duration + longest:
            ticks += step
            frames += next_i - i
        else:
            filled += packets[i].duration
    filled += packets[-1].duration if packets else 0
    return Length(float((ticks + filled) * unit), float(frames / (ticks * unit)) if ticks else 0.0)


def _keys_follow(frames: Sequence[Packet]) -> bool:
    """Whether every key packet is shown after all frames before it in the file, as the standards demand."""
    latest = None
    for frame in frames:
        if frame.is_key and latest is not None and _pts(frame) <= latest:
            return False
        latest = _pts(frame) if latest is None else max(latest, _pts(frame))
    return True


def _can_be_shown(frames: Sequence[Packet], ordered: Sequence[Packet], has_b_frames: bool) -> bool:
    """Whether a decoder that holds back as many frames as this stream needs can show the frames in this order."""
    shown_as = {frame.position: number for number, frame in enumerate(ordered)}
    held_back = [number - shown_as[frame.position] for number, frame in enumerate(frames)]
    if not has_b_frames:
        return not any(held_back)
    return max(held_back, default=0) <= _decoding_delay(frames, ordered) and not _is_any_far_ahead(frames)


def _decoding_delay(frames: Sequence[Packet], ordered: Sequence[Packet]) -> int:
    """How many frames are decoded and not yet shown, most of the time; REORDERED when there is no dts."""
    times = [_pts(frame) for frame in ordered]
    waiting = sorted(i - bisect_left(times, frame.dts) for i, frame in enumerate(frames) if frame.dts is not None)
    # A wrong pts far ahead adds one behind it, a lost packet takes one away near it: neither counts in the lower part.
    return waiting[len(waiting) // 4] if waiting else REORDERED


def _is_any_far_ahead(frames: Sequence[Packet]) -> bool:
    """Whether a frame is shown after more of those stored behind it than encoders put between two references."""
    decoded = [frame for frame in frames if frame.dts is not None]
    clock = [_dts(frame) for frame in decoded]
    steps = [after - before for before, after in pairwise(clock)]
    usual = median(steps) if steps else 0
    clock += [clock[-1] + round(usual * k) for k in range(1, 2 * REORDERED + 1)] if clock else []
    return any(_pts(frame) > clock[i + 2 * REORDERED] for i, frame in enumerate(decoded))


def _pts(packet: Packet) -> int:
    assert packet.pts is not None
    return packet.pts


def _dts(packet: Packet) -> int:
    assert packet.dts is not None
    return packet.dts
