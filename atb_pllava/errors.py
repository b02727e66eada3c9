"""The errors that a user can cause, one class for each part of the package that finds them.

Each message names the given value, the allowed values and the remedy. The command line prints the message alone and
exits with status 2. A traceback means a bug of this package.
"""

from collections.abc import Callable
from numbers import Integral
from typing import Literal, get_args


class PllavaError(Exception):
    """Base of all errors of this package."""


class ConfigError(PllavaError):
    """An option or a config.json that cannot work."""


class WeightError(PllavaError):
    """A checkpoint whose files contradict each other or the model, or whose values cannot be used."""


VideoErrorKind = Literal[
    "bad_request",  # options that do not fit this medium or these limits, or an argument that is no medium
    "not_found",  # no file has this name
    "unreadable",  # a file or folder that cannot be opened: no permission, no regular file, no media in a folder
    "empty",  # no bytes, or no frames
    "not_a_medium",  # the content is neither a video nor an image of an accepted format
    "wrong_medium",  # an image in place of a video, several pictures in place of one
    "no_video_stream",  # a file with sound only
    "unsupported_codec",
    "truncated",  # the end of the file is missing, and a wanted frame with it
    "corrupt",  # a wanted frame, or the picture size, cannot be decoded
    "too_large",  # bytes, pixels, or the ratio of the sides
    "too_long",  # seconds
    "too_many_frames",  # frames of a video, or images of a sequence
    "timeout",  # not read within max_decode_seconds
    "worker_died",  # the process that read the medium crashed or was killed
    "out_of_resources",  # no thread, descriptor or shared memory is left
    "closed",  # the media pool was closed
    "internal",  # an error in this package
]
RequestErrorCode = Literal[
    "context_length_exceeded",  # the prompt, or prompt and answer together, exceed a length or the KV cache
    "aborted",  # ended by the caller
]
VIDEO_ERROR_KINDS: tuple[VideoErrorKind, ...] = get_args(VideoErrorKind)


class VideoError(PllavaError):
    """A video or image that cannot be read, or is larger than the limits allow.

    `kind` is a short code of the cause, one of VIDEO_ERROR_KINDS. Programs decide by `kind`, people read the message.
    """

    def __init__(self, message: str, kind: VideoErrorKind) -> None:
        super().__init__(message, kind)  # both are in `args`, so that the error can be pickled
        assert kind in VIDEO_ERROR_KINDS
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


class RequestError(PllavaError):
    """A request that can never be served: too long, the wrong number of videos, a parameter out of range.

    param: the field of SamplingParams or the key of the request that is wrong. None when no single one is. code: a
    short code of the cause, for causes that a program may want to tell apart. None for all others.
    """

    def __init__(self, message: str, *, param: str | None = None, code: RequestErrorCode | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class BackendError(PllavaError):
    """A backend, dtype or feature that this machine does not have, or a rank that failed."""


class EngineDeadError(BackendError):
    """The engine ended after an exception in a step. All its requests fail with this error, later ones too."""


class ServerError(PllavaError):
    """A server that cannot be reached, or that refused a request.

    status: the HTTP status. None without an answer. code: the server's short name of the cause, or None.
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class OutOfMemoryError(BackendError, MemoryError):
    """A backend could not allocate the memory that a computation needs."""


def check_whole_number(
    name: str,
    value: object,
    lowest: int,
    largest: int | None = None,
    error: Callable[[str], PllavaError] = ConfigError,
    note: str = "",
) -> int:
    """`value` as an int.

    Raises `error` unless `value` is a whole number from `lowest` to `largest`. `largest` None sets no upper bound.
    numpy's integers are whole numbers. True and False are not. The message ends with `note`.
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or int(value) < lowest or (largest is not None and int(value) > largest):  # type: ignore[call-overload]
        allowed = f"of at least {lowest}" if largest is None else f"from {lowest} to {largest}"
        raise error(f"{name} is {value!r}; it must be a whole number {allowed}{note}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def check_number(
    name: str, value: object, lowest: float, largest: float, error: Callable[[str], PllavaError] = ConfigError
) -> None:
    """Raises `error` unless `value` is a finite int or float from `lowest` to `largest`, bounds included."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= largest:  # type: ignore[operator]  # False for NaN
        raise error(f"{name} is {value!r}; it must be a number from {lowest:g} to {largest:g}")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`number` with its noun: "1 file", "2 files". `plural` is the plural of a noun that does not take an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """A length of time in its largest fitting unit: `0.4 s`, `12 s`, `21 min`, `5.2 h`, `3.1 days`."""
    if seconds < 0.05:
        return "under 0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
