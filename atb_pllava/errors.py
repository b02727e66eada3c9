"""Every error a user can cause, by the place where it is noticed.

Each message names what was given, what is allowed and what to do. The command line prints the message alone
and exits with status 2; a traceback means a mistake of ours.
"""


class PllavaError(Exception):
    """Base of all errors of this package."""


class ConfigError(PllavaError):
    """An option or a config.json that cannot work."""


class WeightError(PllavaError):
    """A checkpoint that is not what it claims to be."""


class VideoError(PllavaError):
    """A video or image that cannot be read, or is larger than the limits allow."""


class RequestError(PllavaError):
    """A request that can never be served: too long, the wrong number of videos, a parameter out of range."""


class BackendError(PllavaError):
    """A device backend that was asked for and is not available here."""


class OutOfMemoryError(BackendError, MemoryError):
    """Memory that a backend needed for a computation and could not have."""
