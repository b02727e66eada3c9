"""Reads a medium of any kind, and lists the media of folders.

`read_media` opens a file once and passes the open file to the reader for its kind. The first bytes decide the kind. The
readers are `video.py`, `image.py` and `animation.py`. `list_media` finds the media of folders by the file endings.
"""

import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from atb_pllava.errors import VideoError
from atb_pllava.files import IMAGE_ENDINGS, REFUSED_ENDINGS, VIDEO_ENDINGS
from atb_pllava.multimodal.animation import read_animation
from atb_pllava.multimodal.clip import Clip
from atb_pllava.multimodal.frame_sampling import FrameSelection
from atb_pllava.multimodal.image import is_animation, open_image, repeat_image
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media_file import explain_failure, is_image, open_media
from atb_pllava.multimodal.video import read_open_video

_NUMBER = "\0"
_TEXT = "\1"
_MOST_DIGITS = 4096  # of a path on Linux (PATH_MAX)
_LISTED = IMAGE_ENDINGS | VIDEO_ENDINGS | REFUSED_ENDINGS


def read_media(
    source: str | os.PathLike[str] | bytes,
    num_frames: int | None = 16,
    *,
    frame_sampler: str = "demo",
    frame_indices: Sequence[int] | None = None,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    limits: MediaLimits = MediaLimits(),  # noqa: B008 -- frozen
    threads: int | None = None,
) -> Clip:
    """Reads a video, an animated PNG or WebP, or an image. An image becomes a clip of `num_frames` equal frames.

    The content decides the kind, not the file name. The options are those of `read_video`.
    Raises VideoError as `read_video` and `read_image` do, and for time bounds given with an image.
    """
    selection = FrameSelection(num_frames, frame_sampler, frame_indices, start_seconds, end_seconds)
    selection.check(limits)
    with open_media(source, limits) as (file, name):
        if not is_image(file):
            return read_open_video(file, name, selection, limits, threads)
        with open_image(file, name, limits) as image:
            if not is_animation(image):
                return repeat_image(image, name, selection, limits)
        return read_animation(file, name, selection, limits)


def list_media(*paths: str | os.PathLike[str]) -> list[str]:
    """The named files, and the images and videos of the named folders and their subfolders. No path is listed twice.

    A folder's media are listed in natural order (2 before 10) of their paths. Names that begin with a dot are left out.
    Every folder is entered once. A link to a folder is followed, unless the walk enters that folder under its own name,
    or the folder contains the named folder.
    Unreadable subfolders are listed, so that reading them raises an error. So are broken links, pipes and sockets with
    a medium's ending, and broken links without an ending.
    Raises VideoError for a path that does not exist, and for a folder without media.
    """
    return list(dict.fromkeys(file for path in paths for file in iter_media(path)))


def iter_media(path: str | os.PathLike[str]) -> Iterator[str]:
    """The media of one file or folder, as `list_media` lists them. The names of a million files take about 100 MB.

    The whole folder is walked before the first path comes. Raises VideoError as `list_media` does.
    """
    root = os.fspath(path)
    walk: _FolderWalk | None = None
    try:
        if os.path.isdir(root):
            walk = _FolderWalk(root)
            walk.run()
        else:
            os.stat(root)
    except (OSError, ValueError) as error:
        raise explain_failure(root, error) from None
    if walk is None:
        yield root
        return
    if not walk.found:
        accepted = " ".join(sorted(IMAGE_ENDINGS | VIDEO_ENDINGS))
        others = _summary(walk.others)
        raise VideoError(f"{root}: holds no image or video, {others}; accepted are {accepted}", "unreadable")
    yield from walk.in_natural_order()


def is_media_name(path: str) -> bool:
    """Whether the media of folders include files with the ending of this one."""
    return os.path.splitext(path)[1].lower() in _LISTED


class _FolderWalk:
    """Walks through a folder and its subfolders, and through linked folders after them."""

    def __init__(self, root: str) -> None:
        self.found = 0  # media, and paths that cannot be read
        self.others: Counter[str] = Counter()  # other files, by their ending
        self._root = root
        self._names: dict[str, list[str]] = {}  # of the media and the folders in each folder
        self._folders = [root]
        self._links: deque[str] = deque()  # to folders
        # The parents of the root count as entered: a link to a parent would list the root and its siblings again.
        parents = Path(os.path.realpath(root)).parents
        self._entered = {_identity(parent) for parent in parents if os.path.exists(parent)}

    def run(self) -> None:
        """Walks through all folders, and fills `found` and `others`. Raises OSError when the root cannot be listed."""
        while self._folders or self._links:
            folder = self._folders.pop() if self._folders else self._links.popleft()
            try:
                self._enter(folder)
            except OSError:
                if folder == self._root:
                    raise
                self.found += 1

    def in_natural_order(self) -> Iterator[str]:
        """The media, and the paths that cannot be read, in natural order of their paths.

        The names of a folder are sorted when the folder's turn comes, so that no list of all paths is held.
        """
        waiting = [iter([self._root])]  # for each folder on the way to the current one, the paths still to come
        while waiting:
            path = next(waiting[-1], None)
            if path is None:
                waiting.pop()
            elif path in self._names:
                names = sorted(self._names.pop(path), key=natural_order)
                waiting.append(map(partial(os.path.join, path), names))
            else:
                yield path

    def _enter(self, folder: str) -> None:
        """Takes in the folder's entries. A folder that was entered before has none."""
        identity = _identity(folder)
        if identity in self._entered:
            self._names[folder] = []
            return
        self._entered.add(identity)
        folders: list[str] = []
        links: list[str] = []
        with os.scandir(folder) as scan:
            self._names[folder] = [entry.name for entry in scan if self._is_taken(entry, folders, links)]
        self._folders += sorted(folders)
        self._links += sorted(links)

    def _is_taken(self, entry: os.DirEntry[str], folders: list[str], links: list[str]) -> bool:
        """Whether the entry is a folder, a link to one, a medium, or a path that cannot be read. Counts all others."""
        ending = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            self.others["hidden"] += 1
        elif entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
            return True
        elif _leads_to_folder(entry):
            links.append(entry.path)
            return True
        elif ending in _LISTED or (not ending and not os.path.exists(entry.path)):
            self.found += 1
            return True
        else:
            self.others[ending or "without an ending"] += 1
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    """Device and inode, which are the same under all names of a folder."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a loop of links, or no permission
        return False


def _summary(others: Counter[str]) -> str:
    """`but 9 other files (5 .txt, 3 .json, 1 hidden)`, with the five most common endings."""
    if not others:
        return "nor any other file"
    named = [f"{count} {ending}" for ending, count in others.most_common(5)]
    more = ["..."] if len(others) > len(named) else []
    files = "1 other file" if others.total() == 1 else f"{others.total()} other files"
    return f"but {files} ({', '.join(named + more)})"


def natural_order(name: str) -> str:
    """A sort key of a file name that compares runs of digits as numbers, and puts them before other characters.

    The key is one short string, since a folder may hold a million names. A file name holds no character below _TEXT.
    A run of digits becomes _NUMBER, the count of its digits without leading zeros, these digits, and the zeros: names
    with more leading zeros come first.
    """
    return re.sub("[0-9]+|[^0-9]+", _natural_part, name)


def _natural_part(part: re.Match[str]) -> str:
    text = part[0]
    if not text[0].isdigit() or not text.isascii():
        return f"{_TEXT}{text}"
    digits = text.lstrip("0")
    return f"{_NUMBER}{chr(len(digits))}{digits}{chr(_MOST_DIGITS - len(text) + len(digits))}"
