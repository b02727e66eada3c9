"""The key of a row in a result log: an id, what is asked, and for a file its size, modification time and place."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from atb_pllava.batch.progress import Progress


@dataclass(frozen=True)
class Key:
    """An id, and the size in bytes and modification time in ns of its file. Both are None without a file.

    `place` is the file's real path. Keys are compared without the place. `ResultLog` says how a lookup uses it.
    `request` is a digest of what is asked about the file. None where the id and the settings say it all.
    """

    id: str
    size: int | None = None
    mtime_ns: int | None = None
    place: str | None = field(default=None, compare=False)
    request: str | None = None

    def may_have_been_at(self, place: str | None) -> bool:
        """Whether this key's file may be the file that was at `place`.

        True when a place is unknown, when the file at `place` is gone, and when both paths lead to one file.
        """
        if place is None or self.place is None or not os.path.exists(place):
            return True
        try:
            return os.path.samefile(place, self.place)
        except OSError:  # one of the two was removed just now
            return False


def key_of(name: str, path: str | os.PathLike[str], folders: dict[str, str] | None = None) -> Key:
    """The key of a medium with the id `name`, as the medium is on the disk now. `folders` remembers their real paths.

    A folder of frames has the size of all its files together, and the latest modification time. A path that cannot be
    read has neither size nor time. The run reports the reason when it reads the medium.
    """
    try:
        status = os.stat(path)
        if not os.path.isdir(path):
            return Key(name, status.st_size, status.st_mtime_ns, _real_path(os.fspath(path), folders))
        with os.scandir(path) as entries:
            files = [entry.stat() for entry in entries]
    except (OSError, ValueError):
        return Key(name)
    size = sum(file.st_size for file in files)
    latest = max([status.st_mtime_ns, *(file.st_mtime_ns for file in files)])
    return Key(name, size, latest, os.path.realpath(path))


def _real_path(path: str, folders: dict[str, str] | None) -> str:
    """`os.path.realpath`, which looks at every folder above the file. A folder in `folders` is not looked at again."""
    folder, name = os.path.split(path)
    if folders is None or name in ("", ".", ".."):
        return os.path.realpath(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    real = os.path.join(folders[folder], name)
    return os.path.realpath(real) if os.path.islink(real) else real


def keys_of(files: Iterable[tuple[str, str | os.PathLike[str]]], total: int, quiet: bool = False) -> list[Key]:
    """`key_of` every (id, path). Each path is looked at once. Progress is shown unless `quiet`."""
    by_path: dict[str, Key] = {}
    keys = []
    with Progress("looking for new and changed files", total, quiet=quiet) as progress:
        for name, given in files:
            path = os.fspath(given)
            progress.begin(path)
            if path not in by_path:
                by_path[path] = key_of(name, path)
            keys.append(replace(by_path[path], id=name))
            progress.add(name=path)
    return keys
