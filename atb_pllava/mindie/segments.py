"""The frames of a video in a POSIX shared memory segment, from MindIE's tokenizer process to its workers.

MindIE deletes media files when a prompt is tokenised, so the tokenizer process writes the frames into one segment for
each video. The tokenizer process adds the segment's name to a file, from which MindIE frees the segments when the
request ends. The workers of all ranks read the same segment and free nothing.

A segment is a header of int64 (magic, T, U, side, then inverse_indices[T]) and the U distinct frames, uint8
[U, side, side, 3]. The magic number is written last, so a reader finds a whole video or raises an error.
"""

import math
import os
import secrets
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np

from atb_pllava.config import PreprocessorConfig
from atb_pllava.errors import BackendError, RequestError
from atb_pllava.multimodal.processor import ProcessedVideo

SHARED_MEMORY = Path("/dev/shm")
KEY_BITS = 60  # too many to guess, and few enough for the int64 of `media_ids`
_MAGIC = 0x504C4C6156410001
_FIXED = 4  # int64 before inverse_indices


@dataclass(frozen=True)
class Segment:
    """A segment: the random key in its name, and its size in bytes."""

    key: int
    num_bytes: int

    @property
    def name(self) -> str:
        return f"pllava_{self.key:015x}"


def write_segment(video: ProcessedVideo, names_file: str | os.PathLike[str]) -> Segment:
    """Write a video's frames into a new segment and append its name to `names_file`, one on a line.

    Raises BackendError when the shared memory is full or the file cannot be written. No segment remains then.
    """
    sizes = (len(video.inverse_indices), len(video), video.frames.shape[1])
    header = np.array([0, *sizes, *video.inverse_indices], np.int64)
    segment = Segment(1 + secrets.randbelow(2**KEY_BITS - 1), header.nbytes + video.frames.nbytes)
    try:
        memory = SharedMemory(segment.name, create=True, size=segment.num_bytes)
    except OSError as error:
        raise BackendError(f"no shared memory of {segment.num_bytes} bytes: {error.strerror}. {_advice()}") from None
    try:
        _reserve(segment)
        content = np.frombuffer(memory.buf, np.uint8, segment.num_bytes)  # type: ignore[arg-type]  # open: not None
        content[header.nbytes :] = video.frames.reshape(-1)
        content[: header.nbytes] = header.view(np.uint8)
        content[:8] = np.frombuffer(_MAGIC.to_bytes(8, "little"), np.uint8)
        del content  # memory.close() fails while a view exists
        _append(names_file, segment.name)
    except BaseException:
        memory.unlink()
        raise
    finally:
        memory.close()
    return segment


def read_segment(segment: Segment, preprocessor: PreprocessorConfig) -> ProcessedVideo:
    """The video in a segment. Raises RequestError when the segment is missing, too short, or no complete video."""
    try:
        # Not SharedMemory, which would remove the segment when this process ends.
        content = (SHARED_MEMORY / segment.name).read_bytes()
    except OSError as error:
        raise RequestError(
            f"the frames of a video are gone: shared memory {segment.name} cannot be read ({error.strerror}). The host "
            "removes it when a request ends; a prompt cannot be used again after that"
        ) from None
    header = np.frombuffer(content, np.int64, min(len(content) // 8, _FIXED))
    if len(header) < _FIXED or header[0] != _MAGIC:
        raise RequestError(f"shared memory {segment.name} holds no complete video")
    total, distinct, side = map(int, header[1:])
    sizes = (distinct, side, side, 3)
    start = (_FIXED + total) * 8
    if min(total, distinct, side) < 1 or not len(content) == segment.num_bytes == start + math.prod(sizes):
        raise RequestError(
            f"shared memory {segment.name} has {len(content)} bytes; {segment.num_bytes} were written for {distinct} "
            f"frames of {side} pixels"
        )
    inverse_indices = tuple(map(int, np.frombuffer(content, np.int64, total, _FIXED * 8)))
    if not set(inverse_indices) <= set(range(distinct)):
        raise RequestError(f"shared memory {segment.name} names frames it does not hold")
    frames = np.frombuffer(content, np.uint8, offset=start).reshape(sizes)
    return ProcessedVideo(frames, inverse_indices, inverse_indices, preprocessor)


def remove_segments(segments: list[Segment]) -> None:
    """Free the segments of a request that failed. The names stay in the file, where MindIE ignores them."""
    for segment in segments:
        try:
            memory = SharedMemory(segment.name)
        except FileNotFoundError:
            continue
        memory.close()
        memory.unlink()


def _reserve(segment: Segment) -> None:
    """Allocate all pages of the segment. Without this, writing to a full /dev/shm would kill the process (SIGBUS)."""
    try:
        with open(SHARED_MEMORY / segment.name, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, segment.num_bytes)
    except OSError as error:
        raise BackendError(f"no shared memory of {segment.num_bytes} bytes: {error.strerror}. {_advice()}") from None


def _append(names_file: str | os.PathLike[str], name: str) -> None:
    try:
        # MindIE normally creates the file. MindIE accepts a file with this mode.
        handle = os.open(names_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        with os.fdopen(handle, "w") as file:
            file.write(name + "\n")
    except OSError as error:
        raise BackendError(
            f"{os.fspath(names_file)}, from which the host frees shared memory, cannot be written: {error.strerror}"
        ) from None


def _advice() -> str:
    status = os.statvfs(SHARED_MEMORY)
    size = status.f_blocks * status.f_frsize >> 20
    free = status.f_bavail * status.f_frsize >> 20
    return f"{SHARED_MEMORY} has {size} MiB, {free} are free: start the container with a larger --shm-size, 1g or more"
