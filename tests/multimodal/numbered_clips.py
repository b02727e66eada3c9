"""Clips whose frames show their number: the number in binary, as two rows of six black or white blocks."""

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

BITS = 12
BLOCK = 16  # pixels of a block's side
X264_LONG = {"g": "250", "bf": "3", "preset": "veryfast"}
X264_SHORT = {"g": "12", "bf": "2", "preset": "veryfast"}
OPEN_GOP = {"g": "12", "bf": "2", "preset": "veryfast", "x264-params": "open-gop=1:scenecut=0:b-pyramid=normal"}
DURATIONS = [40, 60, 100, 100, 100, 100, 200, 100]  # milliseconds, for 10 frames a second on average


def numbered_frame(number: int, height: int = 2 * BLOCK, width: int = 6 * BLOCK) -> np.ndarray:
    """A frame that shows its number, uint8 [height, width, 3]."""
    frame = np.full((height, width, 3), 128, np.uint8)
    for bit in range(BITS):
        top = BLOCK * (bit // 6)
        left = BLOCK * (bit % 6)
        frame[top : top + BLOCK, left : left + BLOCK] = 235 if number >> bit & 1 else 20
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number that a frame shows."""
    centres = [frame[BLOCK * (b // 6) + 4 :, BLOCK * (b % 6) + 4 :][:8, :8].mean() for b in range(BITS)]
    return sum(1 << bit for bit, grey in enumerate(centres) if grey > 128)


def write_clip(
    path,
    count=60,
    codec="libx264",
    *,
    fps=25,
    pix_fmt="yuv420p",
    size=(96, 32),
    pts=None,
    options=None,
    container_options=None,
    gop=None,
):
    """Writes `count` numbered frames. `pts` gives the time of each frame in milliseconds."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if gop:
            stream.codec_context.gop_size = gop
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_frame(k, size[1], size[0]), format="rgb24")
            if pts is not None:
                frame.pts = pts[k]
                frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(clip):
    """The numbers that a clip's frames show."""
    return [number_of(frame) for frame in clip.frames]


def pictures(count=8, mode="RGB"):
    """The first `count` numbered frames as Pillow images."""
    return [Image.fromarray(numbered_frame(k)).convert(mode) for k in range(count)]


def animation(ending, frames=None, **options):
    """The content of an animated WebP or PNG of `frames`, by default of the first 8 numbered ones."""
    first, *others = frames or pictures()
    options = {"duration": DURATIONS[: len(others) + 1], **({"lossless": True} if ending == "webp" else {}), **options}
    content = io.BytesIO()
    first.save(content, "WEBP" if ending == "webp" else "PNG", save_all=True, append_images=others, **options)
    return content.getvalue()
