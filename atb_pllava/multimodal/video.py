"""Reads the wanted frames of a video file, by exact frame numbers and with as little decoding as possible.

`packet_index.py` finds the packet of each frame. `decoder.py` and `parallel_decoder.py` decode the packets.
If packet times do not tell the order of frames, the whole file is decoded and its frames are counted. `media.py` reads
media of any kind.
"""

import logging
import os
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, BinaryIO

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.clip import Clip, ClipBuffer
from atb_pllava.multimodal.decoder import ClockError, decode_ranges, plan_ranges, whole_range
from atb_pllava.multimodal.frame_sampling import FrameSelection
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media_file import open_media
from atb_pllava.multimodal.packet_index import TAIL, PacketIndex, SeekIndex, index_packets
from atb_pllava.multimodal.parallel_decoder import decode_in_parallel
from atb_pllava.multimodal.video_stream import VideoFile, check_threads, open_stream

logger = logging.getLogger(__name__)


def read_video(
    source: str | os.PathLike[str] | bytes,
    num_frames: int | None = 16,
    *,
    frame_sampler: str = "demo",
    frame_indices: Sequence[int] | None = None,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    limits: MediaLimits = MediaLimits(),  # noqa: B008 -- frozen
    threads: int | None = None,
) -> Clip:
    """Reads `num_frames` frames of a local file, or of a file's content given as bytes.

    Frame k is the k-th frame shown. `frame_indices` names frames and turns frame sampling off. The total is the number
    of frames that the file's packets show. For mp4 the total is the header's count and decord's `len`, unless an edit
    list hides frames. A frame at the very end that is announced but missing is replaced by the last frame there is.
    Among several video streams FFmpeg's best one is read. As in the original (decord), the sample aspect ratio is
    ignored: frames are not stretched to square pixels. Interlaced frames are not deinterlaced.
    `start_seconds` and `end_seconds` become frame numbers by the average frame rate, so pauses and leaps of the file's
    clock do not count.
    `threads` threads decode the file, by default one for each core and at most 8. The frames do not depend on it.
    Raises VideoError for options out of range, and for a file that is no video, larger than `limits`, or damaged at a
    wanted frame.
    """
    selection = FrameSelection(num_frames, frame_sampler, frame_indices, start_seconds, end_seconds)
    selection.check(limits)
    with open_media(source, limits) as (file, name):
        return read_open_video(file, name, selection, limits, threads)


def read_open_video(
    file: BinaryIO, name: str, selection: FrameSelection, limits: MediaLimits, threads: int | None = None
) -> Clip:
    """Reads the selected frames of an open file as `read_video` does. `name` is for messages."""
    video = VideoFile(file, name, limits, time.monotonic() + limits.max_decode_seconds, check_threads(threads))
    index = index_packets(video)
    if index.seek is None:
        return _read_by_counting(video, index, selection)
    try:
        return _read_by_seeking(video, index, index.seek, selection)
    except ClockError:
        return _read_by_counting(video, index, selection)


def _read_by_seeking(video: VideoFile, index: PacketIndex, seek: SeekIndex, selection: FrameSelection) -> Clip:
    """Seeks to the wanted frames and recognises them by their pts. Damaged files are read in slower ways.

    Raises ClockError when the decoder's order contradicts the times.
    """
    buffer = _new_buffer(video, index, selection)
    readable = len(seek.pts)
    if index.is_truncated and max(buffer.indices) >= readable:
        first_lost = min(k for k in buffer.indices if k >= readable)
        raise _unreadable(video, first_lost, index, readable)
    wanted = frozenset(seek.pts[k] for k in buffer.missing if k < readable)
    _store_missing(decode_in_parallel(video, seek, plan_ranges(seek, buffer.missing), wanted), seek, buffer)
    if buffer.missing:
        latest = _store_missing(decode_ranges(video, seek, [whole_range(seek)]), seek, buffer)
        _replace_missing_tail(index, seek, latest, buffer)
    if not buffer.missing:
        return _make_clip(video, index, buffer)
    # Either frames are lost, or the packets do not hold one frame each and their number is no measure.
    total, faults = _count_decodable_frames(video)
    if faults or not 0 < total < readable:
        raise _unreadable(video, min(buffer.missing), index, total)
    return _read_by_counting(video, replace(index, total=total), selection)


def _read_by_counting(video: VideoFile, index: PacketIndex, selection: FrameSelection) -> Clip:
    """Decodes the whole file and counts its frames.

    When another number of frames comes out than the index says, frames are selected again by that number.
    """
    buffer = _new_buffer(video, index, selection)
    total = 0
    faults_before_last_wanted = 0
    with open_stream(video) as stream:
        for frame in stream.decode_all():
            if total in buffer.missing:
                buffer.store(total, frame)
                faults_before_last_wanted = stream.faults
            total += 1
        faults = stream.faults
    buffer.concealed += faults_before_last_wanted
    if not buffer.missing and (total == index.total or faults or index.is_truncated):
        return _make_clip(video, index, buffer)
    is_damaged = faults > 0 and total < index.total - TAIL
    if total == 0 or index.is_truncated or is_damaged:
        raise _unreadable(video, min(buffer.missing), index, total)
    return _read_by_counting(video, replace(index, total=total), selection)


def _new_buffer(video: VideoFile, index: PacketIndex, selection: FrameSelection) -> ClipBuffer:
    """An empty buffer for the selected frames."""
    indices = selection.resolve(index.total, index.fps, video.name, is_gif=index.is_gif)
    return ClipBuffer(indices, video.name, video.limits)


def _store_missing(frames: Generator[Any, None, None], seek: SeekIndex, buffer: ClipBuffer) -> Any | None:
    """Stores the missing frames among the decoded `frames`. Returns the decoded frame with the latest pts, if any."""
    index_at = {seek.pts[k]: k for k in buffer.missing if k < len(seek.pts)}
    latest: Any = None
    with closing(frames):
        for frame in frames:
            index = index_at.get(frame.pts)
            if index in buffer.missing:
                buffer.store(index, frame)
            if latest is None or frame.pts >= latest.pts:
                latest = frame
    return latest


def _replace_missing_tail(index: PacketIndex, seek: SeekIndex, latest: Any | None, buffer: ClipBuffer) -> None:
    """Stores the last frame there is in place of missing frames among the TAIL last ones."""
    first_of_tail = seek.pts[-TAIL - 1 :][0]
    if latest is None or latest.pts < first_of_tail or index.is_truncated:
        return
    for k in [k for k in buffer.missing if k >= index.total - TAIL]:
        buffer.store(k, latest)


def _count_decodable_frames(video: VideoFile) -> tuple[int, int]:
    """The number of frames in the whole file, and the number of packets that cannot be read or decoded."""
    with open_stream(video) as stream:
        total = sum(1 for _ in stream.decode_all())
        return total, stream.faults


def _make_clip(video: VideoFile, index: PacketIndex, buffer: ClipBuffer) -> Clip:
    if buffer.concealed:
        logger.warning("%s: damaged; the decoder concealed damaged parts of %d frames", video.name, buffer.concealed)
    return Clip(buffer.pixels(), buffer.indices, index.total, index.fps, video.name)


def _unreadable(video: VideoFile, frame: int, index: PacketIndex, readable: int) -> VideoError:
    return VideoError(
        f"{video.name}: frame {frame} of {index.total} cannot be decoded, {readable} frames are readable; "
        "the file seems truncated or damaged",
        "truncated" if index.is_truncated else "corrupt",
    )
