"""Reads the images of an ImageSequence as the frames of one video."""

import time
from itertools import groupby

import numpy as np

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.clip import Clip
from atb_pllava.multimodal.frame_sampling import FrameSelection
from atb_pllava.multimodal.image import read_image
from atb_pllava.multimodal.image_sequence import ImageSequence
from atb_pllava.multimodal.limits import MediaLimits, check_deadline


def read_image_sequence(sequence: ImageSequence, selection: FrameSelection, limits: MediaLimits) -> list[Clip]:
    """The selected images. A run of the same image is one clip, whose frames share the memory of one frame.

    Frame k is image k. Without frame_indices, `num_frames` images are all selected. Of another number of images, the
    frame sampler selects as among the frames of a video. Images that are not selected are not opened.
    The images keep their own sizes. `transforms.resize_frames` brings all frames of a request to one size, as PLLaVA's
    processor does with a list of images.
    Raises VideoError that names the image, for an image that `read_image` cannot read. Raises VideoError for time
    bounds, and for images that together exceed max_clip_bytes or max_decode_seconds.
    """
    if selection.start_seconds is not None or selection.end_seconds is not None:
        raise VideoError(
            f"{sequence.name}: start_seconds and end_seconds do not apply to images, which have no times", "bad_request"
        )
    total = len(sequence)
    if selection.frame_indices is None and selection.num_frames == total:
        indices = list(range(total))
    else:
        indices = selection.resolve(total, 0.0, sequence.name)
    images = _read_images(sequence, sorted(set(indices)), limits)
    clips = []
    for index, run in groupby(indices):
        repeats = list(run)
        frames = np.broadcast_to(images[index], (len(repeats), *images[index].shape))
        clips.append(Clip(frames, repeats, total, 0.0, sequence.name))
    return clips


def _read_images(sequence: ImageSequence, indices: list[int], limits: MediaLimits) -> dict[int, np.ndarray]:
    """The pixels uint8 [H, W, 3] of each image by its number."""
    deadline = time.monotonic() + limits.max_decode_seconds
    images: dict[int, np.ndarray] = {}
    for index in indices:
        check_deadline(deadline, sequence.name, limits)
        try:
            images[index] = read_image(sequence.images[index], limits).frames[0]
        except VideoError as error:
            raise VideoError(f"image {index + 1} of {len(sequence)}: {error}", error.kind) from None
        needed = sum(image.nbytes for image in images.values())
        if needed > limits.max_clip_bytes:
            limit = f"{limits.max_clip_bytes} (MediaLimits.max_clip_bytes)"
            raise VideoError(f"{sequence.name}: they need {needed} bytes, the limit is {limit}", "too_large")
    return images
