"""A media worker: a process that reads media for a MediaPool, one job after the other.

`worker_process.py` starts it as `python -m atb_pllava.multimodal.media_worker`. Its stdin is a Unix socket with the
messages of `worker_messages.py`. It imports no torch. It ends when the pool's process closes the socket or ends in any
way, also in the middle of a job.
"""

if __name__ == "__main__":
    import signal

    # Ctrl-C reaches the whole process group, and the pool's process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import logging
import os
import select
import socket
import sys
import threading

import numpy as np

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.image_sequence import ImageSequence
from atb_pllava.multimodal.processor import Media, ProcessedVideo, VideoProcessor
from atb_pllava.multimodal.shared_bytes import read_array, share
from atb_pllava.multimodal.video_stream import USUAL_THREADS
from atb_pllava.multimodal.worker_messages import (
    ArrayMedium,
    BytesMedium,
    Channel,
    Done,
    Failed,
    ImagesMedium,
    Job,
    LogLine,
    Medium,
    PathMedium,
    PeerLostError,
    Ready,
    Started,
    VideoPart,
)

logger = logging.getLogger("atb_pllava")


def main() -> int:
    """Run jobs until the pool closes the socket. Returns the exit status."""
    threading.Thread(target=_exit_with_pool, daemon=True).start()
    channel = Channel(socket.socket(fileno=os.dup(0)))
    log = _LogLines()
    logger.addHandler(log)
    logger.propagate = False
    try:
        channel.send(Ready())
        while True:
            job, descriptor = channel.receive()
            assert isinstance(job, Job)
            _run(job, descriptor, channel, log)
    except PeerLostError:
        return 0


class _LogLines(logging.Handler):
    """Keeps what is logged during a job. The pool logs the lines in its own process."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[LogLine] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(LogLine(record.name, record.levelno, os.fsencode(record.getMessage())))

    def take(self) -> list[LogLine]:
        lines = self._lines
        self._lines = []
        return lines


def _exit_with_pool() -> None:
    """End this process when the pool's end of the socket is closed, whatever the main thread is doing."""
    hang_up = select.poll()
    hang_up.register(0, 0)  # POLLHUP is always reported
    hang_up.poll()
    os._exit(0)


def _run(job: Job, descriptor: int | None, channel: Channel, log: _LogLines) -> None:
    """Read the media of a job and send the videos or the error."""
    logger.setLevel(job.log_level)
    try:
        if job.directory is not None:
            os.chdir(job.directory)
        media = _media_of(job, descriptor)
        processor = VideoProcessor(
            job.num_frames,
            job.preprocessor,
            job.frame_sampler,
            job.resize,
            job.limits,
            threads=min(USUAL_THREADS, job.decoder_threads),
        )
        videos = processor.prepare_here(
            media, job.frame_indices, job.time_ranges, lambda number: channel.send(Started(number))
        )
        frames = share([video.frames for video in videos])
    except PeerLostError:
        raise
    except Exception as error:
        channel.send(_failure(error, log))
        return
    try:
        channel.send(Done([_part(video) for video in videos], log.take()), frames)
    finally:
        os.close(frames)


def _failure(error: Exception, log: _LogLines) -> Failed:
    if isinstance(error, VideoError):
        kind = "media"
    elif isinstance(error, MemoryError):
        kind = "memory"
    elif isinstance(error, OSError):  # no thread, descriptor or shared memory is left
        kind = "system"
    else:
        kind = "bug"
        logger.error("a media worker failed: %s", error, exc_info=error)
    text = f"{type(error).__name__}: {error}" if kind == "bug" else str(error)
    cause = error.kind if isinstance(error, VideoError) else None
    return Failed(kind, cause, os.fsencode(text), log.take())


def _media_of(job: Job, descriptor: int | None) -> list[Media]:
    """The media of a job, with contents out of the shared memory. Closes the descriptor."""
    memory = _Memory(descriptor)
    try:
        return [_medium_of(item, memory) for item in job.media]
    finally:
        if descriptor is not None:
            os.close(descriptor)


class _Memory:
    """Reads the parts of a job's shared memory one after the other."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._offset = 0

    def next(self, *shape: int) -> np.ndarray:
        """The next uint8 array of this shape."""
        assert self._descriptor is not None
        content = read_array(self._descriptor, self._offset, shape)
        self._offset += content.nbytes
        return content


def _medium_of(item: Medium, memory: _Memory) -> Media:
    if isinstance(item, ImagesMedium):
        return ImageSequence(tuple(_file_of(image, memory) for image in item.images))
    return memory.next(*item.shape) if isinstance(item, ArrayMedium) else _file_of(item, memory)


def _file_of(item: PathMedium | BytesMedium, memory: _Memory) -> str | bytes:
    return os.fsdecode(item.path) if isinstance(item, PathMedium) else memory.next(item.size).tobytes()


def _part(video: ProcessedVideo) -> VideoPart:
    count, height, width, channels = video.frames.shape
    shape = (count, height, width, channels)
    return VideoPart(shape, video.inverse_indices, video.frame_indices, video.mm_hash, video.source)


if __name__ == "__main__":
    sys.exit(main())
