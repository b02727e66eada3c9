"""PacketIndex: which packet of a video file holds frame k. The index is made from packet headers, without decoding.

`packet_times.py` finds the presentation order of frames from the packets' times. `decoder.py` seeks by the index.
Times are in the stream's time base.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from atb_pllava.multimodal.limits import check_length
from atb_pllava.multimodal.packet_times import Packet, find_jumps, measure_length, presentation_order
from atb_pllava.multimodal.video_stream import VideoFile, open_stream

TAIL = 2  # frames at the very end that many files announce but do not hold
LARGEST_BLOCK = 128  # pixels of the largest coding block's side: AV1's superblock
USUAL_FPS = 25.0  # for a comparison of durations when no frame rate is known


class Keyframe(NamedTuple):
    """A packet at which decoding can start."""

    pts: int
    dts: int
    position: int  # number of the packet in file order


@dataclass(frozen=True)
class SeekIndex:
    """The packet of every frame, in presentation order, and the keyframes to seek to."""

    pts: list[int]  # of each frame
    positions: list[int]  # number of each frame's packet in file order
    keyframes: list[Keyframe]  # sorted by pts
    jumps: list[int]  # positions of packets where the clock jumps; see packet_times.find_jumps
    coded_pixels: int  # of a frame as the header says, with sides rounded up to whole blocks


@dataclass(frozen=True)
class PacketIndex:
    """How many frames a file shows, at which rate, and where they are."""

    total: int  # frames, announced but missing ones included
    fps: float  # average; 0.0: unknown
    is_gif: bool
    is_truncated: bool  # more frames are announced than the file holds, beyond the usual TAIL
    seek: SeekIndex | None  # None: packet times do not tell the order of frames, only decoding does


@dataclass(frozen=True)
class _Scan:
    """The findings of one pass over the packets, and the numbers of the header. 0 stands for an unknown number."""

    shown: list[Packet]  # packets that hold a frame to be shown
    keyframes: list[Packet]
    num_packets: int
    end: int  # latest end of a shown packet
    container_names: frozenset[str]
    has_b_frames: bool
    coded_pixels: int
    time_base: Fraction  # seconds
    announced_frames: int
    announced_end: int
    average_fps: float
    guessed_fps: float


def index_packets(video: VideoFile) -> PacketIndex:
    """The index of a video file, by one pass over its packets.

    Raises VideoError when the file has more packets or lasts longer than the limits allow.
    """
    scan = _scan_packets(video)
    length = measure_length(scan.shown, scan.time_base)
    check_length(length.seconds, scan.num_packets, video.name, video.limits)
    fps = scan.average_fps or length.rate or scan.guessed_fps
    missing = _count_missing(scan, fps)
    frames = _frames_in_order(scan)
    return PacketIndex(
        total=missing + (_count_after_first_keyframe(scan) if frames is None else len(frames)),
        fps=fps,
        is_gif="gif" in scan.container_names,
        is_truncated=missing > TAIL,
        seek=None if frames is None else _make_seek_index(scan, frames),
    )


def _scan_packets(video: VideoFile) -> _Scan:
    shown: list[Packet] = []
    keyframes: list[Packet] = []
    num_packets = 0
    end = 0
    with open_stream(video) as stream:
        for raw in stream.packets():
            packet = Packet(num_packets, raw.pts, raw.dts, raw.duration or 0, bool(raw.is_keyframe))
            num_packets += 1
            check_length(0.0, num_packets, video.name, video.limits)
            if packet.is_keyframe:
                keyframes.append(packet)
            if _is_shown(raw, stream.codec_name):
                shown.append(packet)
                end = max(end, (packet.pts or 0) + packet.duration)
        header = stream.info  # read after the packets, because FFmpeg completes the header while reading packets
        return _Scan(
            shown=shown,
            keyframes=keyframes,
            num_packets=num_packets,
            end=end,
            container_names=stream.container_names,
            has_b_frames=bool(header.codec_context.has_b_frames),
            coded_pixels=_round_up(header.codec_context.width) * _round_up(header.codec_context.height),
            time_base=header.time_base,
            announced_frames=header.frames,
            announced_end=(header.start_time or 0) + (header.duration or 0),
            average_fps=float(header.average_rate or 0),
            guessed_fps=float(header.guessed_rate or 0),
        )


def _round_up(side: int) -> int:
    return -(-side // LARGEST_BLOCK) * LARGEST_BLOCK


def _is_shown(raw: Any, codec: str) -> bool:
    """Whether the packet holds a frame to be shown, not one hidden by an edit list or kept for reference only."""
    if raw.size == 0 or raw.is_discard:
        return False
    if not codec.startswith(("vp8", "libvpx")) or codec == "libvpx-vp9":
        return True
    # VP8 keeps reference-only frames in packets of their own: bit 4 of the frame tag is show_frame (RFC 6386, 9.1).
    return bool(memoryview(raw)[0] & 0x10)


def _count_missing(scan: _Scan, fps: float) -> int:
    """Frames that the header announces and the file does not hold.

    Edit lists lower the duration but not the announced count. Frames therefore count as missing only if the packets
    also end before the announced end.
    """
    missing_frame_times = float((scan.announced_end - scan.end) * scan.time_base) * (fps or USUAL_FPS)
    if missing_frame_times <= 0.5:
        return 0
    return max(0, scan.announced_frames - scan.num_packets)


def _frames_in_order(scan: _Scan) -> list[Packet] | None:
    """The shown packets in presentation order. None if the packets' times do not tell the order."""
    if not scan.keyframes:
        return None
    frames = presentation_order(scan.shown, scan.keyframes[0], scan.has_b_frames)
    # AVI, and AVI's streams inside matroska, store no presentation times. FFmpeg then invents them.
    may_be_made_up = scan.has_b_frames and not scan.container_names.isdisjoint({"avi", "matroska"})
    if frames is not None and may_be_made_up and frames == sorted(frames):
        return None
    return frames


def _count_after_first_keyframe(scan: _Scan) -> int:
    """The shown packets from the first keyframe on. Earlier packets refer to frames that were cut off."""
    first = scan.keyframes[0].position if scan.keyframes else 0
    return sum(packet.position >= first for packet in scan.shown)


def _make_seek_index(scan: _Scan, frames: list[Packet]) -> SeekIndex:
    keyframes = [
        Keyframe(packet.pts, packet.pts if packet.dts is None else packet.dts, packet.position)
        for packet in scan.keyframes
        if packet.pts is not None
    ]
    return SeekIndex(
        pts=[frame.pts for frame in frames if frame.pts is not None],
        positions=[frame.position for frame in frames],
        keyframes=sorted(keyframes),
        jumps=find_jumps(scan.shown) if scan.has_b_frames else [],
        coded_pixels=scan.coded_pixels,
    )
