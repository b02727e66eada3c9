"""The host's rules on owner and mode of the files it opens, and the commands that satisfy them."""

import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

CHECKS_ARE_OFF = ("MINDIE_CHECK_INPUTFILES_PERMISSION", "0")
LIBRARY_MODE = 0o775  # atb_llm only minds what others may write


def permission_problems(path: Path, most: int, *, same_owner: bool = False) -> Iterator[tuple[str, str]]:
    """What the host would refuse about `path`, with the command that fixes it.

    It wants nothing writable by others and no bit beyond `most`, and an owner or group that is this process's (root is
    exempt unless `same_owner`): atb_llm/utils/file_utils.py, src/utils/safe_path.cpp, src/utils/log/file_utils.cpp.
    """
    try:
        info = path.stat()
    except OSError as error:
        yield f"{path}: {error.strerror}", f"ls -l {path.parent}"
        return
    mode = stat.S_IMODE(info.st_mode)
    if mode & ~most & 0o777:
        yield f"{path} has mode {mode & 0o777:o}", f"chmod {mode & most:o} {shlex.quote(str(path))}"
    mine = info.st_uid == os.geteuid() or (not same_owner and info.st_gid == os.getegid())
    if not mine and (same_owner or os.geteuid() != 0):
        what = f"{path} belongs to user {info.st_uid}, this is user {os.geteuid()}"
        yield what, f"chown $(id -un) {shlex.quote(str(path))}"
