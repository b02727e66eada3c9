"""The messages between a media pool and its workers, and the Unix socket that carries them.

A message is its length (uint32, little-endian) and a msgpack map of one of the structs below. A descriptor of shared
memory (`shared_bytes.py`) may come with it. The pool sends a Job. The worker answers with Started before each medium,
and in the end with Done or Failed.
Texts and paths are bytes, because a file name may hold bytes that are no UTF-8.
"""

import os
import socket
import struct
import time
from collections.abc import Sequence

import msgspec

from atb_pllava.config import PreprocessorConfig
from atb_pllava.errors import VideoErrorKind
from atb_pllava.multimodal.clip import SourceInfo
from atb_pllava.multimodal.limits import MediaLimits

_LENGTH = struct.Struct("<I")
_LONGEST = 64 * 2**20  # bytes of a message


class PathMedium(msgspec.Struct, frozen=True, tag="path"):
    path: bytes


class BytesMedium(msgspec.Struct, frozen=True, tag="bytes"):
    """The content of a file. It lies in the job's shared memory, after the media before it."""

    size: int


class ArrayMedium(msgspec.Struct, frozen=True, tag="array"):
    """uint8 frames. They lie in the job's shared memory, after the media before them."""

    shape: tuple[int, ...]


class ImagesMedium(msgspec.Struct, frozen=True, tag="images"):
    """An ImageSequence. The contents of its images lie in the job's shared memory, one after the other."""

    images: list[PathMedium | BytesMedium]


Medium = PathMedium | BytesMedium | ArrayMedium | ImagesMedium


class Job(msgspec.Struct, frozen=True, tag="job"):
    """The media of one request, and the fields of the VideoProcessor that prepares them."""

    media: list[Medium]
    frame_indices: list[list[int] | None]
    time_ranges: list[tuple[float | None, float | None]]
    num_frames: int
    preprocessor: PreprocessorConfig
    frame_sampler: str
    resize: str
    limits: MediaLimits
    directory: bytes | None  # the pool's working directory, to which relative paths refer
    log_level: int  # of the pool's logger "atb_pllava"
    decoder_threads: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker has imported its modules."""


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The worker begins to read medium `number`."""

    number: int


class LogLine(msgspec.Struct, frozen=True):
    logger: str
    level: int
    text: bytes


class VideoPart(msgspec.Struct, frozen=True):
    """A ProcessedVideo. Its frames lie in the answer's shared memory, after the videos before it."""

    shape: tuple[int, int, int, int]
    inverse_indices: tuple[int, ...]
    frame_indices: tuple[int, ...]
    mm_hash: bytes
    source: SourceInfo | None


class Done(msgspec.Struct, frozen=True, tag="done"):
    videos: list[VideoPart]
    log: list[LogLine]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The error of a job. `media_pool` makes an exception of each `kind`. `cause` is the kind of a VideoError."""

    kind: str
    cause: VideoErrorKind | None
    text: bytes
    log: list[LogLine]


Message = Job | Ready | Started | Done | Failed


class PeerLostError(Exception):
    """The other process has closed its socket."""


class BadMessageError(Exception):
    """The other process sent something that is no message."""


class Channel:
    """One end of the socket. Descriptors that arrive belong to the caller."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def close(self) -> None:
        self._socket.close()

    def send(self, message: Message, descriptor: int | None = None, seconds: float | None = None) -> None:
        """Send a message within `seconds` (None: without a limit). Raises TimeoutError and PeerLostError."""
        payload = msgspec.msgpack.encode(message)
        data = _LENGTH.pack(len(payload)) + payload
        self._socket.settimeout(seconds)
        try:
            sent = socket.send_fds(self._socket, [data], [] if descriptor is None else [descriptor])
            self._socket.sendall(data[sent:])
        except TimeoutError:
            raise
        except OSError:
            raise PeerLostError from None

    def receive(self, seconds: float | None = None) -> tuple[Message, int | None]:
        """The next message and its descriptor, within `seconds` (None: without a limit).

        Raises TimeoutError, PeerLostError and BadMessageError.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        head, descriptors = self._receive_head(deadline)
        try:
            while len(head) < _LENGTH.size:
                head += self._receive_some(_LENGTH.size - len(head), deadline)
            message = _decoded(self._receive_all(_LENGTH.unpack(head)[0], deadline))
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return message, descriptors[0] if descriptors else None

    def _receive_head(self, deadline: float | None) -> tuple[bytes, Sequence[int]]:
        self._socket.settimeout(_seconds_until(deadline))
        try:
            head, descriptors, _, _ = socket.recv_fds(self._socket, _LENGTH.size, 1, _CLOSE_ON_EXEC)
        except TimeoutError:
            raise
        except OSError:
            raise PeerLostError from None
        if not head:
            raise PeerLostError
        return head, descriptors

    def _receive_all(self, length: int, deadline: float | None) -> bytes:
        if length > _LONGEST:
            raise BadMessageError(f"a message of {length} bytes")
        pieces = []
        while length:
            piece = self._receive_some(min(length, 2**20), deadline)
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)

    def _receive_some(self, most: int, deadline: float | None) -> bytes:
        self._socket.settimeout(_seconds_until(deadline))
        try:
            piece = self._socket.recv(most)
        except TimeoutError:
            raise
        except OSError:
            raise PeerLostError from None
        if not piece:
            raise PeerLostError
        return piece


_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_DECODER = msgspec.msgpack.Decoder(Message)


def _decoded(payload: bytes) -> Message:
    try:
        message: Message = _DECODER.decode(payload)
        return message
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadMessageError(str(error)) from None


def _seconds_until(deadline: float | None) -> float | None:
    """A timeout for `settimeout`, to which 0 would mean not to wait at all."""
    return None if deadline is None else max(deadline - time.monotonic(), 1e-3)
