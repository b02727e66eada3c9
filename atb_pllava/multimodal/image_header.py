"""Tells a still image from an animation by the file's structure alone. No pixels and no sizes are read.

The server process may look at untrusted files this way. Whether the content can be decoded is for a media worker.
"""

import struct
from typing import BinaryIO

from atb_pllava.multimodal.media_file import is_image

_PNG_START = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")  # length of the data, and type (PNG specification, 5.3)
_MOST_CHUNKS = 1000
_WEBP_ANIMATION = 0x02  # in the flags of the VP8X chunk (WebP container specification)


def is_still_image(file: BinaryIO) -> bool:
    """Whether the file begins as a JPEG, PNG, WebP, BMP or TIFF image without animation. Rewinds the file."""
    if not is_image(file):
        return False
    head = file.read(21)
    animated = _has_animation_chunk(file) if head.startswith(_PNG_START) else _is_animated_webp(head)
    file.seek(0)
    return not animated


def _is_animated_webp(head: bytes) -> bool:
    return head[12:16] == b"VP8X" and len(head) > 20 and bool(head[20] & _WEBP_ANIMATION)


def _has_animation_chunk(file: BinaryIO) -> bool:
    """Whether a PNG has an acTL chunk. The chunk stands before the first IDAT chunk (PNG specification, 11.3.6)."""
    position = len(_PNG_START)
    for _ in range(_MOST_CHUNKS):
        file.seek(position)
        head = file.read(_CHUNK.size)
        if len(head) < _CHUNK.size:
            return False
        length, kind = _CHUNK.unpack(head)
        if kind in (b"acTL", b"IDAT"):
            return bool(kind == b"acTL")
        position += _CHUNK.size + length + 4  # 4: the checksum
    return False
