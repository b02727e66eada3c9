"""A video file to its sampled frames: exact frame numbers, read with as little decoding as possible.

Which frames are taken is `sampling.py`, what the model sees of them `pixels.py`, images and folders `media.py`.
Files are untrusted: their kind and size are checked before anything is decoded, and FFmpeg's own messages never leave.
`T` frames of `H` x `W` pixels.
"""

import logging
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
from av.error import FFmpegError

from atb_pllava.errors import VideoError, check_whole_number
from atb_pllava.multimodal.frame_sampling import check_frame_sampler, sample_frame_indices
from atb_pllava.multimodal.limits import (
    MediaLimits,
    check_clip_bytes,
    check_deadline,
    check_length,
    check_size,
    is_image,
    open_media,
)
from atb_pllava.multimodal.packet_times import REORDERED, Packet, find_jumps, measure_length, presentation_order

logger = logging.getLogger(__name__)

try:
    av.logging.set_level(None)  # no messages of FFmpeg
except TypeError:  # PyAV 12
    av.logging.set_level(av.logging.PANIC)

DEMUXERS = ("mov", "matroska", "avi", "asf", "gif", "mpegts", "mpeg", "flv", "ogg")
COVER_CODECS = frozenset(["png", "bmp", "webp", "tiff"])  # of covers; no film that is accepted is in them
PICTURE_BRANDS = frozenset(["heic", "heix", "mif1", "avif"])  # of ISO base media files: streams are parts of a picture
DECODERS = frozenset(
    ["av1", "libdav1d", "libaom-av1", "h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "vp3", "vp6", "vp6f"]
    + ["mpeg4", "msmpeg4", "msmpeg4v1", "msmpeg4v2", "wmv1", "wmv2", "wmv3", "vc1", "flv", "h261", "h263", "theora"]
    + ["mpeg1video", "mpeg2video", "mpegvideo", "gif", "mjpeg", "prores", "dnxhd", "dvvideo", "svq1", "svq3", "qtrle"]
    + ["ffv1", "huffyuv", "ffvhuff", "rawvideo", "cinepak", "indeo4", "indeo5"]
)
DEFAULT_STREAM = 0x1  # AV_DISPOSITION_DEFAULT
ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC: a cover, not a video
FULL_RANGE, ITU601 = 2, 5  # AVCOL_RANGE_JPEG; SWS_CS_ITU601
SMALLEST_SEEK = 8  # packets; a shorter way is decoded through, for a seek throws away the decoder's pipeline
TAIL = 2  # frames at the very end that many files announce but do not hold


@dataclass(frozen=True)
class Clip:
    """The frames taken from one video or image."""

    frames: np.ndarray  # uint8 [T, H, W, 3], RGB, upright
    frame_indices: list[int]  # T frame numbers in presentation order; repeats where the clip is short
    total_frames: int  # frames in the file
    fps: float  # average; 0.0 for a still image
    source: str  # for messages


def read_video(
    source: str | os.PathLike[str] | bytes,
    num_frames: int | None = 16,
    *,
    frame_sampler: str = "demo",
    frame_indices: Sequence[int] | None = None,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    limits: MediaLimits = MediaLimits(),  # noqa: B008 -- frozen
) -> Clip:
    """Reads `num_frames` frames of a local file, or of a file's content given as bytes.

    `frame_indices`, when given, win over sampling. Frame k is the k-th frame shown. The total is the number of frames
    the file's packets show, which for mp4 is the header's count and decord's `len` unless an edit list hides some; a
    frame at the very end that is announced but missing is replaced by the last one there is.
    Among several video streams FFmpeg's best is read. As in the original (decord), the sample aspect ratio is ignored:
    frames are not stretched to square pixels. Interlaced frames are not deinterlaced.
    `start_seconds` and `end_seconds` become frame numbers by the average frame rate, so pauses and leaps of the file's
    clock do not count.
    Raises VideoError for options out of range, a file that is no video, is damaged where it is needed, or is larger
    than `limits`.
    """
    choice = FrameChoice(num_frames, frame_sampler, frame_indices, start_seconds, end_seconds)
    choice.check(limits)
    with open_media(source, limits) as (file, name):
        return read_open_video(file, name, choice, limits)


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a clip are wanted, as `read_video` takes it."""

    num_frames: int | None
    frame_sampler: str
    frame_indices: Sequence[int] | None
    start_seconds: float | None
    end_seconds: float | None

    def check(self, limits: MediaLimits) -> None:
        """Raises VideoError for what is wrong whatever the file is."""
        check_frame_sampler(self.frame_sampler, self.start_seconds, self.end_seconds)
        if self.frame_indices is not None:
            name = "the number of frame_indices"
            value: int | None = len(self.frame_indices)
        else:
            name = "num_frames"
            value = self.num_frames
        note = " (MediaLimits.max_sampled_frames)"
        check_whole_number(name, value, 1, limits.max_sampled_frames, VideoError, note)

    def of(self, total: int, fps: float, name: str, is_gif: bool = False) -> list[int]:
        """The frame numbers in a clip of `total` frames. Raises VideoError when there are no such frames."""
        if self.frame_indices is not None:
            return check_indices(self.frame_indices, total, name)
        between = {"start_seconds": self.start_seconds, "end_seconds": self.end_seconds}
        indices = sample_frame_indices(total, self.num_frames or 0, self.frame_sampler, fps=fps, **between)
        # The original collects the set of indices of a GIF, then repeats the whole sequence.
        return _tile(sorted(set(indices)), len(indices)) if self.frame_sampler == "eval" and is_gif else indices


def read_open_video(file: BinaryIO, name: str, choice: FrameChoice, limits: MediaLimits) -> Clip:
    """Reads a video as `read_video` does, from an open file; `name` is for messages."""
    reading = _Reading(file, name, limits, time.monotonic() + limits.max_decode_seconds)

    def choose(table: _FrameTable) -> list[int]:
        return choice.of(table.total, table.fps, name, table.is_gif)

    table, clip = _read_frames(reading, choose)
    if clip.concealed:
        logger.warning("%s: damaged; the decoder filled in what %d frames lack", name, clip.concealed)
    return Clip(clip.pixels(), clip.indices, table.total, table.fps, name)


def check_indices(frame_indices: Sequence[int], total: int, name: str) -> list[int]:
    """The indices as a list; raises VideoError unless all are integers from 0 to total - 1."""
    for k in frame_indices:
        if not isinstance(k, Integral) or isinstance(k, bool) or not 0 <= k < total:
            raise VideoError(f"{name}: frame index {k!r} is not a frame number; they go from 0 to {total - 1}")
    return [int(k) for k in frame_indices]


@dataclass
class _Reading:
    """One file being read, by as many passes as it takes."""

    file: BinaryIO
    name: str
    limits: MediaLimits
    expires: float  # time.monotonic() of the deadline
    faults: int = 0  # packets that could not be read or decoded

    def check_deadline(self) -> None:
        check_deadline(self.expires, self.name, self.limits)


class _Key(NamedTuple):
    """A packet where decoding can start."""

    pts: int
    dts: int
    position: int  # number of the packet in file order


@dataclass(frozen=True)
class _FrameTable:
    """The frames a file shows, in presentation order."""

    total: int
    fps: float
    is_gif: bool
    times: list[int] | None  # pts of each frame; None: frames are known only by counting
    positions: list[int]  # number of each frame's packet in file order
    keys: list[_Key]  # by pts
    jumps: list[int]  # positions behind which only the decoder knows the frames' order
    truncated: bool  # `total` frames are announced, fewer are there


_Choice = Callable[[_FrameTable], list[int]]  # the frame numbers wanted of a clip


class _ClockError(Exception):
    """The decoder shows frames in another order than their times say."""


class _ClipBuffer:
    """The wanted frames, each stored once wherever it belongs; the first one sets the size of all."""

    def __init__(self, indices: list[int], reading: _Reading):
        self.indices = indices
        self.missing = set(indices)
        self.concealed = 0
        self._reading = reading
        self._stored: np.ndarray | None = None
        self._size = (0, 0)

    def store(self, index: int, frame: av.VideoFrame) -> None:
        """Puts a decoded frame at every place that asks for frame `index`."""
        check_size(frame.width, frame.height, self._reading.name, self._reading.limits)
        if self._stored is None:
            self._size = (frame.width, frame.height)
        pixels = _upright(_to_rgb(frame, *self._size), frame)
        if self._stored is None:
            check_clip_bytes(len(self.indices), *self._size, self._reading.name, self._reading.limits)
            self._stored = np.empty((len(self.indices), *pixels.shape), np.uint8)
        places = [i for i, wanted in enumerate(self.indices) if wanted == index]
        self._stored[places] = pixels
        self.missing.discard(index)
        self.concealed += len(places) * bool(frame.is_corrupt)

    def pixels(self) -> np.ndarray:
        assert self._stored is not None and not self.missing
        return self._stored


def _read_frames(reading: _Reading, choose: _Choice) -> tuple[_FrameTable, _ClipBuffer]:
    """The frame table and the frames that `choose` picks from it; from the fastest way to the surest one."""
    table = _index_packets(reading)
    if table.times is None:
        return _read_by_counting(reading, table, choose)
    try:
        return _read_by_times(reading, table, choose)
    except _ClockError:
        return _read_by_counting(reading, replace(table, times=None), choose)


def _read_by_times(reading: _Reading, table: _FrameTable, choose: _Choice) -> tuple[_FrameTable, _ClipBuffer]:
    """Seeks to the wanted frames and tells them by their times."""
    assert table.times is not None
    clip = _ClipBuffer(choose(table), reading)
    readable = len(table.times)
    if table.truncated and max(clip.indices) >= readable:
        raise _unreadable(reading, min(k for k in clip.indices if k >= readable), table.total, readable)
    _decode_runs(reading, table, _plan_runs(table, clip.missing), clip)
    if clip.missing:
        latest = _decode_runs(reading, table, [_whole_run(table)], clip)
        _replace_missing_tail(table, latest, clip)
    if not clip.missing:
        return table, clip
    # Either frames are lost, or the packets do not hold one frame each and were no measure.
    reading.faults = 0
    total = sum(1 for _ in _all_frames(reading))
    if reading.faults or not 0 < total < readable:
        raise _unreadable(reading, min(clip.missing), table.total, total)
    return _read_by_counting(reading, replace(table, total=total, times=None), choose)


def _read_by_counting(reading: _Reading, table: _FrameTable, choose: _Choice) -> tuple[_FrameTable, _ClipBuffer]:
    """Decodes the whole file and counts, for files whose packet times do not tell the order of frames.

    When another number of frames comes out than the table says, the choice is repeated with that number.
    """
    reading.faults, total, latest = 0, 0, None
    clip = _ClipBuffer(choose(table), reading)
    faults_before = 0  # up to the last wanted frame
    for latest in _all_frames(reading):
        if total in clip.missing:
            clip.store(total, latest)
            faults_before = reading.faults
        total += 1
    clip.concealed += faults_before
    if not clip.missing and (total == table.total or reading.faults):
        return table, clip
    if latest is None or table.truncated or (reading.faults and total < table.total - TAIL):
        raise _unreadable(reading, min(clip.missing), table.total, total)
    return _read_by_counting(reading, replace(table, total=total), choose)


def _unreadable(reading: _Reading, index: int, total: int, readable: int) -> VideoError:
    return VideoError(
        f"{reading.name}: frame {index} of {total} cannot be decoded, {readable} frames are readable; "
        "the file seems truncated or damaged"
    )


@contextmanager
def _open_stream(reading: _Reading) -> Iterator[tuple[Any, Any]]:
    """The container at its beginning and its checked video stream."""
    reading.file.seek(0)
    # Only as container options: stream options crash PyAV before 18 where streams appear late (flv, mpegts).
    options = {
        "format_whitelist": ",".join(DEMUXERS),
        "protocol_whitelist": "none",  # a container must not open other files or addresses
    }
    try:
        container = av.open(reading.file, container_options=options, metadata_errors="ignore", buffer_size=1 << 18)
    except (FFmpegError, ValueError):
        raise _not_a_video(reading) from None
    with container:
        stream = _check_stream(container, reading)
        stream.codec_context.options = {"max_pixels": str(reading.limits.max_pixels)}
        stream.codec_context.thread_type = "AUTO"
        stream.codec_context.thread_count = min(8, os.cpu_count() or 1)  # each thread holds a frame
        yield container, stream


def _not_a_video(reading: _Reading) -> VideoError:
    if is_image(reading.file):
        return VideoError(f"{reading.name}: holds an image, not a video; give it where images are accepted")
    return VideoError(
        f"{reading.name}: cannot be read as a video; it is another kind of file, truncated or damaged. "
        "Accepted are mp4, mov, mkv, webm, avi, wmv, gif, ts, mpg, flv and ogv, and as images JPEG, PNG, APNG, WebP, "
        "BMP and TIFF"
    )


def _check_stream(container: Any, reading: _Reading) -> Any:
    """The video stream; raises VideoError when there is none, its kind is not accepted, or it exceeds the limits."""
    name, limits = reading.name, reading.limits
    if not set(container.format.name.split(",")) & set(DEMUXERS):
        raise _not_a_video(reading)
    stream = best_stream(container)
    if stream is None:
        raise VideoError(f"{name}: has no video stream")
    if container.metadata.get("major_brand") in PICTURE_BRANDS and len(container.streams.video) > 1:
        raise VideoError(f"{name}: holds a picture in tiles, or several pictures; convert it, to JPEG for example")
    codec = _codec_name(stream)
    if codec not in DECODERS:
        raise VideoError(f"{name}: video codec {codec} is not accepted; convert it, to H.264 for example")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not width or not height:
        raise VideoError(f"{name}: the picture size cannot be read; the file is damaged, or the size is absurd")
    check_size(width, height, name, limits)
    # A header that counts the frames also states their length; FFmpeg guesses that of others from the clock.
    stated = float(stream.duration * stream.time_base) if stream.frames and stream.duration else 0.0
    check_length(stated, stream.frames, name, limits)
    return stream


def best_stream(container: Any) -> Any | None:
    """The stream that FFmpeg calls best, as decord and so the original take it.

    Never an attached picture, nor one in a format of pictures when there is another stream.
    """
    films = [stream for stream in container.streams.video if not _is_cover(stream)]
    find_best = getattr(container.streams, "best", None)  # absent before PyAV 13
    best = find_best("video") if find_best else None
    if best in films and _codec_name(best) not in COVER_CODECS:
        return best
    return max(films, key=_likeness_to_film, default=None)


def _likeness_to_film(stream: Any) -> tuple[bool, bool, bool, bool]:
    codec = _codec_name(stream)
    is_default = bool(_disposition(stream) & DEFAULT_STREAM)
    return codec not in COVER_CODECS, is_default, stream.frames != 1, codec != "mjpeg"


def _codec_name(stream: Any) -> str:
    return stream.codec_context.name if stream.codec_context is not None else "unknown"


def _is_cover(stream: Any) -> bool:
    return bool(_disposition(stream) & ATTACHED_PICTURE)


def _disposition(stream: Any) -> int:
    disposition = getattr(stream, "disposition", 0)  # absent before PyAV 14, then a flag, then a number
    return int(getattr(disposition, "value", disposition))


def _packets(container: Any, stream: Any, reading: _Reading) -> Iterator[Any]:
    """The stream's packets in file order up to its end, or to where the file cannot be read on."""
    try:
        for packet in container.demux(stream):
            reading.check_deadline()
            if packet.size == 0 and packet.dts is None:  # PyAV's marker of the end
                return
            if not _is_theora_header(packet, stream):
                yield packet
    except FFmpegError:
        reading.faults += 1


def _is_theora_header(packet: Any, stream: Any) -> bool:
    """Whether it describes the stream once more, where Ogg files are joined (Theora specification, 6.1)."""
    return stream.codec_context.name == "theora" and packet.size > 0 and bool(memoryview(packet)[0] & 0x80)


def _index_packets(reading: _Reading) -> _FrameTable:
    """The frame table from the packets' times, without decoding."""
    shown: list[Packet] = []
    keys: list[Packet] = []
    seen = 0
    end = 0
    reading.faults = 0
    with _open_stream(reading) as (container, stream):
        is_gif = container.format.name == "gif"
        for position, raw in enumerate(_packets(container, stream, reading)):
            seen = position + 1
            check_length(0.0, seen, reading.name, reading.limits)
            packet = Packet(position, raw.pts, raw.dts, raw.duration or 0, bool(raw.is_keyframe))
            if packet.is_key:
                keys.append(packet)
            if _is_shown(raw, stream.codec_context.name):
                shown.append(packet)
                end = max(end, (packet.pts or 0) + packet.duration)
        has_b_frames = bool(stream.codec_context.has_b_frames)
        # AVI, and AVI's streams inside matroska, store decoding times only; FFmpeg then makes up the others.
        made_up = has_b_frames and bool({"avi", "matroska"} & set(container.format.name.split(",")))
        announced = stream.frames
        length = measure_length(shown, stream.time_base)
        fps = float(stream.average_rate or length.rate or stream.guessed_rate or 0)
        # Edit lists lower the duration but not the count, so only both together mean that frames are missing.
        declared_end = (stream.start_time or 0) + (stream.duration or 0)
        shortfall = float((declared_end - end) * stream.time_base) * (fps or 25.0)
    check_length(length.seconds, seen, reading.name, reading.limits)
    missing = max(0, announced - seen) if shortfall > 0.5 else 0
    truncated = missing > TAIL
    frames = presentation_order(shown, keys[0], has_b_frames) if keys else None
    if frames is None or (made_up and frames == sorted(frames)):
        first = keys[0].position if keys else 0
        total = sum(packet.position >= first for packet in shown)
        return _FrameTable(total + missing, fps, is_gif, None, [], [], [], truncated)
    times = [frame.pts for frame in frames if frame.pts is not None]
    positions = [frame.position for frame in frames]
    jumps = find_jumps(shown) if has_b_frames else []
    starts = [_Key(k.pts, k.pts if k.dts is None else k.dts, k.position) for k in keys if k.pts is not None]
    return _FrameTable(len(frames) + missing, fps, is_gif, times, positions, sorted(starts), jumps, truncated)


def _is_shown(packet: Any, codec: str) -> bool:
    """Whether the packet holds a frame to be shown, not one hidden by an edit list or kept for reference only."""
    if packet.size == 0 or packet.is_discard:
        return False
    # VP8 keeps reference-only frames in packets of their own: bit 4 of the frame tag is show_frame (RFC 6386, 9.1).
    return not codec.startswith(("vp8", "libvpx")) or codec == "libvpx-vp9" or bool(memoryview(packet)[0] & 0x10)


class _Run(NamedTuple):
    """A stretch of packets that is decoded in one go."""

    key: _Key | None  # None: from the beginning of the file
    last: int  # position of the last packet
    wanted: frozenset[int] | None  # positions whose frames must come out; None: all


def _whole_run(table: _FrameTable) -> _Run:
    return _Run(None, max(table.positions), None)


def _plan_runs(table: _FrameTable, targets: set[int]) -> list[_Run]:
    """The stretches from a key packet to the frames that need it, in file order."""
    assert table.times is not None
    key_times = [key.pts for key in table.keys]
    runs: list[_Run] = []
    for index in sorted(min(k, len(table.times) - 1) for k in targets):
        position = table.positions[index]
        at = bisect_right(key_times, table.times[index]) - 1
        while at > 0 and table.keys[at].position > position:
            at -= 1
        key = table.keys[at]
        last = _last_to_decode(table, position)
        wanted = frozenset(range(position, last + 1))
        if runs and key.position <= runs[-1].last + SMALLEST_SEEK:
            runs[-1] = _Run(runs[-1].key, max(runs[-1].last, last), (runs[-1].wanted or frozenset()) | wanted)
        else:
            runs.append(_Run(None if key.position <= SMALLEST_SEEK else key, last, wanted))
    return runs


def _last_to_decode(table: _FrameTable, position: int) -> int:
    """The last packet a frame needs: its own, or where the clock soon jumps, one by which the decoder has shown it."""
    soon = bisect_right(table.jumps, position)
    jumps_soon = soon < len(table.jumps) and table.jumps[soon] <= position + REORDERED
    return position + REORDERED if jumps_soon else position


def _decode_runs(reading: _Reading, table: _FrameTable, runs: list[_Run], clip: _ClipBuffer) -> Any | None:
    """Stores the clip's missing frames as far as the runs reach them; gives the last frame there was."""
    assert table.times is not None
    index_at = {table.times[k]: k for k in clip.missing if k < len(table.times)}
    latest: Any = None
    with _open_stream(reading) as (container, stream):
        for run in runs:
            packets = _packets_from(container, stream, reading, table, run.key)
            before = None
            for frame in _decode_run(packets, stream, run, reading):
                if frame.pts is None:
                    continue
                if before is not None and frame.pts < before:
                    raise _ClockError
                before = frame.pts
                index = index_at.get(frame.pts)
                if index in clip.missing:
                    clip.store(index, frame)
                if latest is None or frame.pts >= latest.pts:
                    latest = frame
    return latest


def _replace_missing_tail(table: _FrameTable, latest: Any | None, clip: _ClipBuffer) -> None:
    """Puts the last frame there is where frames at the very end are missing."""
    assert table.times is not None
    if latest is not None and latest.pts >= table.times[-TAIL - 1 :][0] and not table.truncated:
        for index in [k for k in clip.missing if k >= table.total - TAIL]:
            clip.store(index, latest)


def _packets_from(
    container: Any, stream: Any, reading: _Reading, table: _FrameTable, key: _Key | None
) -> Iterator[tuple[int, Any]]:
    """Packets with their position, from `key` or an earlier key packet on; none when the container cannot go there."""
    if key is None:
        yield from enumerate(_packets(container, stream, reading))
        return
    position_at = {k.pts: k.position for k in table.keys}
    for when in (key.pts, key.dts):  # containers differ in which of the two they search by
        try:
            container.seek(when, stream=stream)
        except FFmpegError:
            return
        packets = _packets(container, stream, reading)
        landed = next((p for p in packets if p.is_keyframe), None)
        start = position_at.get(landed.pts, key.position + 1) if landed is not None else key.position + 1
        if start <= key.position:
            yield start, landed
            yield from enumerate(packets, start + 1)
            return


def _decode_run(
    packets: Iterator[tuple[int, Any]], stream: Any, run: _Run, reading: _Reading
) -> Iterator[av.VideoFrame]:
    """The frames of a run; those that nothing refers to are skipped unless wanted."""
    for position, packet in packets:
        needed = run.wanted is None or position in run.wanted
        stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
        yield from _decode(stream, packet, reading)
        if position >= run.last:
            break
    yield from _decode(stream, None, reading)


def _all_frames(reading: _Reading) -> Iterator[av.VideoFrame]:
    """Every frame that can be decoded, in presentation order."""
    with _open_stream(reading) as (container, stream):
        for packet in _packets(container, stream, reading):
            yield from _decode(stream, packet, reading)
        yield from _decode(stream, None, reading)


def _decode(stream: Any, packet: Any | None, reading: _Reading) -> list[av.VideoFrame]:
    """Frames that come out when `packet` goes in; None brings out what the decoder still holds."""
    try:
        return list(stream.decode(packet))
    except EOFError:
        return []
    except FFmpegError:
        reading.faults += 1
        return []


def _to_rgb(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    """Pixels uint8 [height, width, 3] by the frame's own matrix and range."""
    full = frame.color_range == FULL_RANGE or frame.format.name.startswith("yuvj")
    # Before 17, PyAV uses the frame's matrix only when told another one for the result, where RGB has none; it passes
    # full range on only when told so, and PyAV 12 counts ranges from 0.
    src_range = int(full) + (not av.__version__.startswith("12."))
    rgb = frame.reformat(width, height, format="rgb24", dst_colorspace=ITU601, src_color_range=src_range)
    return rgb.to_ndarray()


def _upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Pixels [H, W, 3] turned and mirrored as the frame's display matrix asks, in steps of 90 degrees."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # FFmpeg's libavutil/display.h: x' = a x + c y, y' = b x + d y, with a, b at 0 and 1, c, d at 3 and 4.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(np.int64)
    if abs(a) < abs(b):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _tile(sequence: list[int], length: int) -> list[int]:
    return (sequence * (length // len(sequence) + 1))[:length]
