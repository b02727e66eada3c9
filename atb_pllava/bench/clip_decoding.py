"""Reading a few frames of a long video by seeking, compared with decoding every frame."""

import logging
import os
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import av
import numpy as np

from atb_pllava.bench.timing import Work, interleaved, ratio
from atb_pllava.errors import VideoError
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media import read_media
from atb_pllava.multimodal.video_stream import best_stream

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_REPORTS = 5.0
_RATE = 30  # frames a second
_ENCODED_SECONDS = 20


def compare_decoding(path: str, num_frames: int, rounds: int, threads: int | None = None) -> dict[str, Any]:
    """Median seconds of seeking and of decoding every frame, timed in turns, and whether the frames are equal.

    The CPU seconds of all threads stand beside the wall-clock seconds, because other load lengthens only the latter.
    Decoding every frame uses `threads` threads, or all that FFmpeg takes, and converts only the wanted frames to RGB.
    No way without seeking is faster. Raises VideoError for a file that cannot be read.
    """
    limits = MediaLimits(max_decode_seconds=3600)
    clip = read_media(path, num_frames, limits=limits, threads=threads)
    if clip.fps == 0:
        raise VideoError(f"{path} is an image; there is nothing to seek in", "wrong_medium")
    wanted = set(clip.frame_indices)
    seek = _WithCpuTime(lambda: read_media(path, num_frames, limits=limits, threads=threads))
    decode = _WithCpuTime(lambda: _decode_all(path, wanted, threads))
    seeking, decoding = interleaved([seek, decode], rounds)
    every = _decode_all(path, wanted, threads)
    same = all(np.array_equal(frame, every[i]) for frame, i in zip(clip.frames, clip.frame_indices, strict=True))
    height, width = clip.frames.shape[1:3]
    return {
        "file": f"{clip.total_frames} frames, {width}x{height}, {clip.total_frames / clip.fps:.0f} s",
        "seek_s": median(seeking),
        "full_decode_s": median(decoding),
        "speedup": ratio(seeking, decoding),
        "seek_cpu_s": median(seek.cpu_seconds[1:]),
        "full_decode_cpu_s": median(decode.cpu_seconds[1:]),
        "cpu_speedup": ratio(seek.cpu_seconds[1:], decode.cpu_seconds[1:]),
        "frames_equal": "yes" if same else "NO",
    }


class _WithCpuTime:
    """A work that notes the CPU seconds of all threads in each call. `interleaved` warms up in the first call."""

    def __init__(self, work: Work) -> None:
        self.cpu_seconds: list[float] = []
        self._work = work

    def __call__(self) -> None:
        began = time.process_time()
        self._work()
        self.cpu_seconds.append(time.process_time() - began)


def _decode_all(path: str, wanted: set[int], threads: int | None) -> dict[int, np.ndarray]:
    frames = {}
    with av.open(path) as container:
        stream: Any = best_stream(container)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads or 0  # 0: FFmpeg decides
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                frames[number] = frame.to_ndarray(format="rgb24")
    return frames


def make_clip(path: str | os.PathLike[str], seconds: int = 600, size: tuple[int, int] = (1280, 720)) -> None:
    """Write an H.264 mp4 file with 30 frames a second and x264's default of 250 frames between key frames.

    20 seconds are encoded and then repeated. The file takes as long to decode as one that was encoded as a whole. The
    log says how far the encoding is.
    """
    frames = _RATE * min(seconds, _ENCODED_SECONDS)
    with av.open(os.fspath(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=_RATE, options={"preset": "veryfast"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        packets = _encode(stream, frames, size)
        times = [(packet.pts, packet.dts, packet.time_base) for packet in packets]
        for number in range(-(-_RATE * seconds // frames)):
            for packet, (shown, decoded, unit) in zip(packets, times, strict=True):
                shift = round(number * frames / _RATE / unit)
                packet.pts = shown + shift
                packet.dts = decoded + shift
                packet.time_base = unit
                container.mux(packet)


def _encode(stream: Any, total: int, size: tuple[int, int]) -> list[Any]:
    packets: list[Any] = []
    began = time.perf_counter()
    reported = began
    for number, picture in enumerate(_pictures(total, size)):
        packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p"))
        now = time.perf_counter()
        if now - reported > _SECONDS_BETWEEN_REPORTS:
            reported = now
            left = (now - began) / (number + 1) * (total - number - 1)
            logger.info("making a clip: frame %d of %d, %.0f s left", number + 1, total, left)
    return [*packets, *stream.encode(None)]


def _pictures(total: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Drifting colour blocks, with new blocks every 5 seconds: planes Y, U, V as uint8 [height * 3 / 2, width]."""
    width, height = size
    generator = np.random.default_rng(0)
    for number in range(total):
        if number % 150 == 0:
            blocks = generator.integers(16, 236, (height * 3 // 2 // 20, width // 20), dtype=np.uint8)
            base = blocks.repeat(20, 0).repeat(20, 1)
        yield np.ascontiguousarray(np.roll(base, number % 150, axis=1))
