"""What a user may name as media: a video, an image, an animation, or a folder of them.

`read_media` opens a file once, looks at its first bytes, and hands the open file to the reader for that kind.
The readers are `video.py`, `image.py` and `animation.py`. `list_media` finds the media of folders by the usual endings.
"""

import os
import re
from collections import Counter, deque
from collections.abc import Sequence
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
) -> Clip:
    """Reads a video, an animated PNG or WebP, or an image as a video of one frame that is repeated `num_frames` times.

    The content decides, not the name. The options are those of `read_video`.
    Raises VideoError as `read_video` and `read_image` do, and for time bounds given with an image.
    """
    selection = FrameSelection(num_frames, frame_sampler, frame_indices, start_seconds, end_seconds)
    selection.check(limits)
    with open_media(source, limits) as (file, name):
        if not is_image(file):
            return read_open_video(file, name, selection, limits)
        with open_image(file, name, limits) as image:
            if not is_animation(image):
                return repeat_image(image, name, selection, limits)
        return read_animation(file, name, selection, limits)


def list_media(*paths: str | os.PathLike[str]) -> list[str]:
    """The files named, and the images and videos of the folders named, their subfolders included; none twice.

    A folder's media come in natural order (2 before 10) of their paths. Names that begin with a dot are left out. Every
    folder is entered once: a link to a folder is followed when that was not entered under its own name and does not
    hold this one.
    What cannot be read stays in the list, for its reader to say why: a name with a medium's ending that is a link to
    nothing, a pipe or a socket, a link without an ending that leads nowhere, a subfolder that cannot be listed.
    Raises VideoError for a path that is not there, and for a folder without media.
    """
    return list(dict.fromkeys(file for path in paths for file in _media_at(os.fspath(path))))


def _media_at(path: str) -> list[str]:
    try:
        if not os.path.isdir(path):
            os.stat(path)
            return [path]
        found, others = _walk(path)
    except (OSError, ValueError) as error:
        raise explain_failure(path, error) from None
    if not found:
        accepted = " ".join(sorted(IMAGE_ENDINGS | VIDEO_ENDINGS))
        raise VideoError(f"{path}: holds no image or video, {_summary(others)}; accepted are {accepted}")
    return sorted(found, key=lambda file: [_natural_order(part) for part in file.split(os.sep)])


def _walk(root: str) -> tuple[list[str], Counter[str]]:
    """The media below a folder, in no order, and how many other files have which ending."""
    found: list[str] = []
    others: Counter[str] = Counter()
    folders = [root]
    links: deque[str] = deque()  # to folders; after all that lie in the tree themselves
    # A link to a folder that holds this one would bring in this one again, and all around it.
    entered = {_identity(parent) for parent in Path(os.path.realpath(root)).parents if os.path.exists(parent)}
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        try:
            identity = _identity(folder)
            if identity in entered:
                continue
            entered.add(identity)
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError:
            if folder == root:
                raise
            found.append(folder)
            continue
        for entry in entries:
            ending = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                others["hidden"] += 1
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif _leads_to_folder(entry):
                links.append(entry.path)
            elif ending in _LISTED or (not ending and not os.path.exists(entry.path)):
                found.append(entry.path)
            else:
                others[ending or "without an ending"] += 1
    return found, others


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a loop, or a place that may not be looked at
        return False


def _summary(others: Counter[str]) -> str:
    """`but 9 other files (5 .txt, 3 .json, 1 hidden)`; the five most common endings."""
    if not others:
        return "nor any other file"
    named = [f"{count} {ending}" for ending, count in others.most_common(5)]
    more = ["..."] if len(others) > len(named) else []
    files = "1 other file" if others.total() == 1 else f"{others.total()} other files"
    return f"but {files} ({', '.join(named + more)})"


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key that compares runs of digits as numbers."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), part) if part[0].isdigit() and part.isascii() else (1, 0, part) for part in parts]
