"""Normalised float pixels of a processed video on the host, for callers whose device does not normalise uint8."""

import torch
from torch import Tensor

from atb_pllava.multimodal.processor import ProcessedVideo
from atb_pllava.multimodal.transforms import normalize


def pixel_values(video: ProcessedVideo, first: int = 0, last: int | None = None) -> Tensor:
    """Pixels of the distinct frames first .. last - 1, float32 [last - first, 3, S, S]. `last` None means all frames.

    float32 pixels take four times the memory of the frames, so callers convert a few frames at a time.
    """
    config = video.preprocessor
    return torch.from_numpy(normalize(video.frames[first:last], config.image_mean, config.image_std))
