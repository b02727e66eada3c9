"""MediaHeader: what a medium's file says about itself, without its sampled frames. `inspect` shows it."""

import os
import time
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image

from atb_pllava.multimodal.image import is_animation, open_image
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media_file import is_image, open_media
from atb_pllava.multimodal.packet_index import index_packets
from atb_pllava.multimodal.rgb_frame import orientation
from atb_pllava.multimodal.video_stream import VideoFile, check_threads, open_stream

_FLAT = 0.01  # a pixel this much wider or higher than a square is seen as one
_ORIENTATION = 0x0112  # the Exif tag
# Degrees clockwise after an optional mirror, by Exif orientation (Exif 3.0, table 10). 1 is upright.
_TURNS = {
    2: (0, True),
    3: (180, False),
    4: (180, True),
    5: (270, True),
    6: (90, False),
    7: (90, True),
    8: (270, False),
}


@dataclass(frozen=True)
class MediaHeader:
    """The kind and form of a medium.

    `container` is FFmpeg's name of the format, or Pillow's of an image. `codec` is FFmpeg's name, None for an image.
    `width` and `height` are stored pixels. A picture that `is_mirrored` is flipped left to right before it is shown.
    Then every picture is turned by `rotation` degrees clockwise. `warnings` are one sentence each.
    """

    kind: str  # video, animation or image
    container: str
    codec: str | None
    width: int
    height: int
    rotation: int
    is_mirrored: bool
    warnings: tuple[str, ...] = ()


def read_media_header(
    source: str | os.PathLike[str] | bytes,
    limits: MediaLimits = MediaLimits(),  # noqa: B008 -- frozen
) -> MediaHeader:
    """The header of a video, an animation or an image. At most one frame is decoded.

    Raises VideoError for a medium that `read_media` cannot open, or that is larger than `limits`.
    """
    with open_media(source, limits) as (file, name):
        if not is_image(file):
            return _of_video(file, name, limits)
        with open_image(file, name, limits) as image:
            return _of_image(image)


def _of_image(image: Image.Image) -> MediaHeader:
    rotation, is_mirrored = _TURNS.get(image.getexif().get(_ORIENTATION, 1), (0, False))
    kind = "animation" if is_animation(image) else "image"
    return MediaHeader(kind, image.format or "", None, image.width, image.height, rotation, is_mirrored)


def _of_video(file: BinaryIO, name: str, limits: MediaLimits) -> MediaHeader:
    video = VideoFile(file, name, limits, time.monotonic() + limits.max_decode_seconds, check_threads(1))
    index = index_packets(video)
    with open_stream(video) as stream:
        codec = stream.codec
        first = next(stream.decode_all(), None)
        rotation, is_mirrored = (0, False) if first is None else orientation(first)
        warnings = []
        if index.is_truncated:
            warnings.append("the file is truncated: its header announces more frames than there are")
        if index.seek is None:
            warnings.append("the times in the file do not order its frames, so the whole file is decoded")
        ratio = codec.sample_aspect_ratio
        if ratio and abs(ratio - 1) > _FLAT:
            warnings.append(
                f"its pixels are not square ({ratio.numerator}:{ratio.denominator}), and the model sees them as squares"
            )
        return MediaHeader(
            kind="video",
            container=stream.info.container.format.name,
            codec=_codec_name(codec),
            width=codec.width,
            height=codec.height,
            rotation=rotation,
            is_mirrored=is_mirrored,
            warnings=tuple(warnings),
        )


def _codec_name(codec: Any) -> str:
    """FFmpeg's name of the codec. The name of its decoder, such as libdav1d, where PyAV (before 14) has no other."""
    return str(getattr(codec.codec, "canonical_name", codec.name))
