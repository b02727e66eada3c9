"""Turns frames into pixels of the vision tower: the two resizes, the centre crop and the normalisation of PLLaVA.

The pixels are bit-exact with the original's, which resizes 8-bit images with Pillow.
`T` frames, `H` x `W` source size, `S` crop size.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from atb_pllava.errors import VideoError

RESIZE_MODES = ("clip", "res672", "squash")
LONGEST_EDGE = 640  # of the first resize, a constant of the original's processor


def resize_frames(
    videos: Sequence[np.ndarray], *, mode: str = "clip", crop_size: int = 336, shortest_edge: int = 336
) -> list[np.ndarray]:
    """Resizes and crops the videos of one request: uint8 [T, H, W, 3] each, to uint8 [T, S, S, 3] each.

    "clip": PLLaVA's processor. A bicubic resize comes first, to a size that all videos of the request decide, with a
    short edge of at least `shortest_edge`. CLIP's bicubic resize of the short edge to S and its centre crop follow.
    "res672": a bilinear resize of the short edge to 672, as in the published evaluation, then the same as "clip".
    "squash": one bilinear resize to S x S that changes the aspect ratio.
    Raises VideoError for an unknown mode.
    """
    if mode not in RESIZE_MODES:
        raise VideoError(f"resize mode is {mode!r}; allowed are {', '.join(RESIZE_MODES)}", "bad_request")
    if mode == "squash":
        return [_each_frame(v, lambda f: f.resize((crop_size, crop_size), Image.Resampling.BILINEAR)) for v in videos]
    if mode == "res672":
        videos = [_each_frame(v, lambda f: _resize_short_edge(f, 672, Image.Resampling.BILINEAR)) for v in videos]
    short, long = _common_size([(v.shape[2], v.shape[1]) for v in videos], shortest_edge)

    def crop(frame: Image.Image) -> Image.Image:
        frame = _crop_long_edge(_resize_short_edge(frame, short, Image.Resampling.BICUBIC), long)
        return _crop_centre(_resize_short_edge(frame, crop_size, Image.Resampling.BICUBIC), crop_size)

    return [_each_frame(video, crop) for video in videos]


def normalize(frames: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised pixels, uint8 [T, S, S, 3] to contiguous float32 [T, 3, S, S], by `normalization_table`."""
    tables = normalization_table(mean, std)
    pixels = np.empty((frames.shape[0], 3, *frames.shape[1:3]), np.float32)
    for channel in range(3):
        np.take(tables[:, channel], frames[..., channel], out=pixels[:, channel])
    return pixels


def normalization_table(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """The pixel of each byte and channel, float32 [256, 3]: (byte / 255 - mean) / std.

    Order and dtypes are those of transformers' CLIPImageProcessor. byte * (1 / 255) is computed in float64 and rounded
    to float32, and the rest is float32.
    """
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    table: np.ndarray = (scaled[:, None] - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return table


def _each_frame(video: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Applies `change` (Pillow image to Pillow image) to every frame. Repeats of one still image are changed once."""
    if video.strides[0] == 0:  # one frame in memory, repeated by np.broadcast_to
        one = np.asarray(change(Image.fromarray(video[0])))
        return np.broadcast_to(one, (len(video), *one.shape))
    return np.stack([np.asarray(change(Image.fromarray(frame))) for frame in video])


def _common_size(sizes: Sequence[tuple[int, int]], shortest_edge: int) -> tuple[int, int]:
    """Short and long edge that all videos of a request have after the first resize. `sizes` are (width, height).

    The formula is that of PLLaVA `processing_pllava.py` (`resize_crop_longshort`). The least elongated video decides
    the ratio of the edges.
    """
    ratio = min(max(size) / min(size) for size in sizes)
    short = max(min(size) for size in sizes)
    longest = min(LONGEST_EDGE, max(max(size) for size in sizes))
    short = max(min(short, int(longest / ratio)), shortest_edge)
    return short, int(short * ratio)


def _resize_short_edge(frame: Image.Image, edge: int, resample: Image.Resampling) -> Image.Image:
    """Resizes the short edge to `edge` pixels and the long edge to int(edge * long / short), as transformers does."""
    width, height = frame.size
    if width <= height:
        return frame.resize((edge, int(edge * height / width)), resample)
    return frame.resize((int(edge * width / height), edge), resample)


def _crop_long_edge(frame: Image.Image, long: int) -> Image.Image:
    """Crops the long edge to `long` pixels."""
    # As in the original, the crop is not centred: a quarter of the excess is cut off at the start. Only requests with
    # videos of different aspect ratios are cropped here.
    start = ((max(frame.size) - long) // 2) // 2
    if frame.height > frame.width:
        return frame.crop((0, start, frame.width, start + long))
    return frame.crop((start, 0, start + long, frame.height))


def _crop_centre(frame: Image.Image, size: int) -> Image.Image:
    left = (frame.width - size) // 2
    top = (frame.height - size) // 2
    return frame.crop((left, top, left + size, top + size))
