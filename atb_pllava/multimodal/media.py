"""What a user may name as media: a video, an image, an animation, or a folder of them.

`read_media` decides by content, `list_media` by the usual endings. Videos are read in `video.py`, pictures in
`pictures.py`.
"""

import os
import re
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from atb_pllava.errors import VideoError
from atb_pllava.files import IMAGE_ENDINGS, REFUSED_ENDINGS, VIDEO_ENDINGS
from atb_pllava.multimodal.animation import count_frames, is_animation, open_picture, play, still_pixels, to_pixels
from atb_pllava.multimodal.limits import (
    MediaLimits,
    check_clip_bytes,
    check_deadline,
    check_length,
    explain_failure,
    is_image,
    open_media,
)
from atb_pllava.multimodal.video import Clip, FrameChoice, read_open_video

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

    Raises VideoError as `read_video` and `read_image` do, and for time bounds given with an image.
    """
    choice = FrameChoice(num_frames, frame_sampler, frame_indices, start_seconds, end_seconds)
    choice.check(limits)
    with open_media(source, limits) as (file, name):
        if not is_image(file):
            return read_open_video(file, name, choice, limits)
        with open_picture(file, name, limits) as picture:
            if not is_animation(picture):
                return _read_still(picture, name, choice, limits)
        return _read_animation(file, name, choice, limits)


def read_image(
    source: str | os.PathLike[str] | bytes,
    limits: MediaLimits = MediaLimits(),  # noqa: B008 -- frozen
) -> Clip:
    """Reads a still image as a clip of one frame, turned upright by its EXIF orientation; transparency is dropped.

    Raises VideoError for anything that is not a readable still image or is larger than `limits`.
    """
    with open_media(source, limits) as (file, name), open_picture(file, name, limits) as picture:
        pixels = still_pixels(picture, name)
    return Clip(pixels[None], [0], 1, 0.0, name)


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


def _read_still(picture: Image.Image, name: str, choice: FrameChoice, limits: MediaLimits) -> Clip:
    """The image as a clip of one frame that repeats."""
    if choice.start_seconds is not None or choice.end_seconds is not None:
        raise VideoError(f"{name}: start_seconds and end_seconds do not apply to an image")
    indices = [0] * int(choice.num_frames or 0) if choice.frame_indices is None else choice.of(1, 0.0, name)
    pixels = still_pixels(picture, name)
    check_clip_bytes(1, pixels.shape[1], pixels.shape[0], name, limits)
    return Clip(np.broadcast_to(pixels, (len(indices), *pixels.shape)), indices, 1, 0.0, name)


def _read_animation(file: BinaryIO, name: str, choice: FrameChoice, limits: MediaLimits) -> Clip:
    """The chosen frames of an animation, as Pillow draws them.

    It is decoded twice, for its length and for its frames, and opened anew: Pillow loses the palette when it rewinds.
    """
    expires = time.monotonic() + limits.max_decode_seconds
    milliseconds = 0.0
    with open_picture(file, name, limits) as animation:
        total = count_frames(animation)
        check_length(0.0, total, name, limits)
        for frame in play(animation):
            check_deadline(expires, name, limits)
            milliseconds += frame.info.get("duration", 0)
        check_length(milliseconds / 1000, total, name, limits)
        fps = 1000 * total / milliseconds if milliseconds else 0.0
        indices = choice.of(total, fps, name)
        check_clip_bytes(len(indices), animation.width, animation.height, name, limits)
    pixels: dict[int, np.ndarray] = {}
    with open_picture(file, name, limits) as animation:
        for number, frame in enumerate(play(animation)):
            check_deadline(expires, name, limits)
            if number in indices:
                pixels[number] = to_pixels(frame)
    return Clip(np.stack([pixels[number] for number in indices]), indices, total, fps, name)


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key that compares runs of digits as numbers."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), part) if part[0].isdigit() and part.isascii() else (1, 0, part) for part in parts]
