"""Opens a video file with PyAV, chooses the video stream, and yields the packets and frames of the stream.

Files are untrusted. Container format, codec, size and stated length are checked before decoding. FFmpeg's own messages
never leave this module.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import av
from av.error import FFmpegError

from atb_pllava.errors import VideoError, check_whole_number
from atb_pllava.multimodal.limits import MediaLimits, check_deadline, check_length, check_size
from atb_pllava.multimodal.media_file import is_image

try:
    av.logging.set_level(None)  # no messages of FFmpeg
except TypeError:  # PyAV 12
    av.logging.set_level(av.logging.PANIC)

DEMUXERS = ("mov", "matroska", "avi", "asf", "gif", "mpegts", "mpeg", "flv", "ogg")
COVER_CODECS = frozenset(["png", "bmp", "webp", "tiff"])  # codecs of cover art. Videos in these codecs are refused
PICTURE_BRANDS = frozenset(["heic", "heix", "mif1", "avif"])  # of ISO base media files: streams are parts of a picture
DECODERS = frozenset(
    ["av1", "libdav1d", "libaom-av1", "h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "vp3", "vp6", "vp6f"]
    + ["mpeg4", "msmpeg4", "msmpeg4v1", "msmpeg4v2", "wmv1", "wmv2", "wmv3", "vc1", "flv", "h261", "h263", "theora"]
    + ["mpeg1video", "mpeg2video", "mpegvideo", "gif", "mjpeg", "prores", "dnxhd", "dvvideo", "svq1", "svq3", "qtrle"]
    + ["ffv1", "huffyuv", "ffvhuff", "rawvideo", "cinepak", "indeo4", "indeo5"]
)
FIXED_SKIPPING = frozenset(["libdav1d"])  # decoders that read skip_frame once, when they open
DEFAULT_STREAM = 0x1  # AV_DISPOSITION_DEFAULT
USUAL_THREADS = 8  # at most. Each thread holds a frame, or the frames of a decoder
MAX_THREADS = 64
_MOST_PIXELS = 2**31 - 1  # FFmpeg refuses a larger value of its option max_pixels (libavcodec/options_table.h)
ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC: a cover, not a video


@dataclass(frozen=True)
class VideoFile:
    """An open file that is read in one or several passes, with its name for messages, its limits and the deadline."""

    file: BinaryIO
    name: str
    limits: MediaLimits
    deadline: float  # a time of time.monotonic()
    threads: int  # that decode this file


class VideoStream:
    """The chosen video stream of an open container, in one pass over the file.

    A packet that cannot be read or decoded raises no error. `faults` counts such packets.
    """

    def __init__(self, video: VideoFile, container: Any, stream: Any) -> None:
        self.info = stream  # PyAV's av.video.stream.VideoStream
        self.codec = stream.codec_context
        self.codec_name: str = _codec_name(stream)
        self.container_names = frozenset(container.format.name.split(","))
        self.faults = 0
        self._container = container
        self._video = video

    def packets(self) -> Iterator[Any]:
        """The stream's packets in file order, up to the end or to the first packet that cannot be read.

        Raises VideoError when the deadline has passed.
        """
        try:
            for packet in self._container.demux(self.info):
                check_deadline(self._video.deadline, self._video.name, self._video.limits)
                if packet.size == 0 and packet.dts is None:  # PyAV's marker of the end
                    return
                if not self._is_theora_header(packet):
                    yield packet
        except FFmpegError:
            self.faults += 1

    def seek(self, timestamp: int) -> bool:
        """Seeks to the keyframe at or before `timestamp`, in the stream's time base. False if the seek fails."""
        try:
            self._container.seek(timestamp, stream=self.info)
        except FFmpegError:
            return False
        return True

    def decode(self, packet: Any | None) -> list[av.VideoFrame]:
        """The frames that the decoder gives out for `packet`. None flushes the frames that the decoder still holds.

        A packet that cannot be decoded gives no frames and counts in `faults`.
        """
        try:
            return list(self.info.decode(packet))
        except EOFError:
            return []
        except FFmpegError:
            self.faults += 1
            return []

    def skip_nonref(self, skip: bool) -> None:
        """Whether the decoder skips the frames of the next packets that no other frame refers to.

        Decoders in FIXED_SKIPPING skip nothing, because they could not show a skipped frame later.
        """
        if self.codec_name not in FIXED_SKIPPING:
            self.codec.skip_frame = "NONREF" if skip else "DEFAULT"

    def decode_all(self) -> Iterator[av.VideoFrame]:
        """Every frame that can be decoded, in presentation order."""
        for packet in self.packets():
            yield from self.decode(packet)
        yield from self.decode(None)

    def _is_theora_header(self, packet: Any) -> bool:
        """Whether the packet is a header, repeated where Ogg files were joined (Theora specification, 6.1)."""
        return self.codec_name == "theora" and packet.size > 0 and bool(memoryview(packet)[0] & 0x80)


@contextmanager
def open_stream(video: VideoFile, decoders: int = 1) -> Iterator[VideoStream]:
    """Opens the container at its beginning and yields its checked video stream.

    `decoders` streams of the file that are open at once share its threads and its largest frame. A decoder refuses
    frames with more pixels than its share.
    Raises VideoError for a file that is no video of an accepted kind, and for one larger than the limits.
    """
    video.file.seek(0)
    # Only as container options: stream options crash PyAV before 18 where streams appear late (flv, mpegts).
    options = {
        "format_whitelist": ",".join(DEMUXERS),
        "protocol_whitelist": "none",  # a container must not open other files or addresses
    }
    try:
        container = av.open(video.file, container_options=options, metadata_errors="ignore", buffer_size=1 << 18)
    except (FFmpegError, ValueError):
        raise _not_a_video(video) from None
    with container:
        stream = _choose_stream(container, video)
        _check_limits(stream, video)
        stream.codec_context.options = {"max_pixels": str(min(video.limits.max_pixels, _MOST_PIXELS) // decoders)}
        stream.codec_context.thread_type = "AUTO"
        stream.codec_context.thread_count = max(1, video.threads // decoders)
        yield VideoStream(video, container, stream)


def check_threads(threads: int | None) -> int:
    """The number of threads that decode one file. None means one for each core, at most USUAL_THREADS.

    Raises VideoError when the number is out of range.
    """
    if threads is None:
        return min(USUAL_THREADS, os.cpu_count() or 1)
    return check_whole_number("threads", threads, 1, MAX_THREADS, partial(VideoError, kind="bad_request"))


def best_stream(container: Any) -> Any | None:
    """FFmpeg's best video stream (av_find_best_stream), which decord and the original take too.

    Attached pictures are never taken. A stream in one of COVER_CODECS is taken only if there is no other stream.
    None if the container has no video stream.
    """
    candidates = [stream for stream in container.streams.video if not _is_cover(stream)]
    find_best = getattr(container.streams, "best", None)  # absent before PyAV 13
    best = find_best("video") if find_best else None
    if best in candidates and _codec_name(best) not in COVER_CODECS:
        return best
    return max(candidates, key=_preference, default=None)


def _choose_stream(container: Any, video: VideoFile) -> Any:
    """The best stream. Raises VideoError when there is none, or its container or codec is not accepted."""
    if not set(container.format.name.split(",")) & set(DEMUXERS):
        raise _not_a_video(video)
    stream = best_stream(container)
    if stream is None:
        text = f"{video.name}: has no video stream; name a file with a video stream, or an image"
        raise VideoError(text, "no_video_stream")
    if container.metadata.get("major_brand") in PICTURE_BRANDS and len(container.streams.video) > 1:
        raise VideoError(
            f"{video.name}: holds a picture in tiles, or several pictures; convert it, to JPEG for example",
            "wrong_medium",
        )
    codec = _codec_name(stream)
    if codec not in DECODERS:
        raise VideoError(
            f"{video.name}: video codec {codec} is not accepted; convert it, to H.264 for example", "unsupported_codec"
        )
    return stream


def _check_limits(stream: Any, video: VideoFile) -> None:
    """Raises VideoError when the size or length that the header states is unreadable or over the limits."""
    width = stream.codec_context.width
    height = stream.codec_context.height
    if not width or not height:
        raise VideoError(
            f"{video.name}: the picture size cannot be read; the file is damaged, or the size is absurd", "corrupt"
        )
    check_size(width, height, video.name, video.limits)
    # A header with a frame count also states the duration. For other files FFmpeg guesses the duration from the clock.
    stated_seconds = float(stream.duration * stream.time_base) if stream.frames and stream.duration else 0.0
    check_length(stated_seconds, stream.frames, video.name, video.limits)


def _not_a_video(video: VideoFile) -> VideoError:
    if is_image(video.file):
        return VideoError(
            f"{video.name}: holds an image, not a video; give it where images are accepted", "wrong_medium"
        )
    return VideoError(
        f"{video.name}: cannot be read as a video; it is another kind of file, truncated or damaged. "
        "Accepted are mp4, mov, mkv, webm, avi, wmv, gif, ts, mpg, flv and ogv, and as images JPEG, PNG, APNG, WebP, "
        "BMP and TIFF",
        "not_a_medium",
    )


def _preference(stream: Any) -> tuple[bool, bool, bool, bool]:
    """The sort key of `best_stream`: no cover codec, the default stream, more than one frame, no mjpeg."""
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
