"""LocalMedia: opens the file of a file: URL, which must lie in the one folder that the operator allows.

The file is opened before it is checked, without effect on the file (O_PATH). The checked file is what is read later.
No file can take its place between the check and the reading.
"""

import os
import stat
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from atb_pllava.errors import ConfigError
from atb_pllava.multimodal.media_source_error import MediaSourceError, shortened


class LocalMedia:
    """Opens files in `folder`. Links are followed, unless they lead out of the folder.

    Raises ConfigError when `folder` is no readable folder, or the system has no /proc to check open files with.
    """

    def __init__(self, folder: str) -> None:
        if not os.path.isdir(folder) or not os.access(folder, os.R_OK | os.X_OK):
            raise ConfigError(f"allowed_local_media_path is {folder!r}, which is no readable folder")
        if not os.path.isdir("/proc/self/fd"):
            raise ConfigError("allowed_local_media_path works on Linux only, with /proc mounted")
        self._root = os.path.realpath(folder)

    def open(self, url: str, max_bytes: int) -> BinaryIO:
        """The open file of a file: URL. Raises MediaSourceError.

        One message tells of missing, unreadable and outside files, so that nobody learns which files exist elsewhere.
        """
        path = path_of_file_url(url)
        try:
            checked = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            raise _unavailable(url) from None
        try:
            status = os.fstat(checked)
            if not stat.S_ISREG(status.st_mode) or not self._contains(checked):
                raise _unavailable(url)
            file = open(f"/proc/self/fd/{checked}", "rb")  # noqa: SIM115 -- the caller closes the file
        except OSError:
            raise _unavailable(url) from None
        finally:
            os.close(checked)
        if status.st_size > max_bytes:
            file.close()
            message = f"{shortened(url)}: {status.st_size} bytes, the limit is {max_bytes}"
            raise MediaSourceError("media_too_large", message)
        return file

    def _contains(self, descriptor: int) -> bool:
        """Whether the open file lies in the folder, after all links."""
        real = os.readlink(f"/proc/self/fd/{descriptor}")
        return real.startswith(self._root.rstrip("/") + "/")


def path_of_file_url(url: str) -> bytes:
    """The absolute path in a file: URL (RFC 8089). Raises MediaSourceError for other forms, and for `..` in it."""
    rest = url[len("file:") :]
    host, slash, path = rest[2:].partition("/") if rest.startswith("//") else ("", rest[:1], rest[1:])
    if slash != "/" or host.lower() not in ("", "localhost"):
        raise _invalid(url, "names another host or no absolute path; write file:///folder/clip.mp4")
    if not path.isprintable() or any(mark in path for mark in "?#\\"):
        raise _invalid(url, "holds ?, #, a backslash or a control character; percent-encode it")
    decoded = b"/" + unquote_to_bytes(path)
    if b"\0" in decoded or b".." in decoded.split(b"/"):
        raise _invalid(url, "holds a NUL or a .. in its path")
    return decoded


def _invalid(url: str, why: str) -> MediaSourceError:
    return MediaSourceError("invalid_media_url", f"{shortened(url)} {why}")


def _unavailable(url: str) -> MediaSourceError:
    return MediaSourceError(
        "local_media_unavailable", f"{shortened(url)} is no readable file in the folder that this server allows"
    )
