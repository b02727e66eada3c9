"""ImageSequence: two or more still images that are the frames of one video, in their order.

One image alone is a still: give the image itself, and `image.py` repeats it. `image_frames.py` reads the images.
"""

import os
from dataclasses import dataclass

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.limits import MediaLimits


@dataclass(frozen=True)
class ImageSequence:
    """The images of one video: paths, or the contents of files as bytes.

    Raises VideoError for fewer than two images, and for anything that is no path and no bytes.
    """

    images: tuple[str | os.PathLike[str] | bytes, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(self.images))
        for image in self.images:
            if not isinstance(image, str | bytes | os.PathLike):
                kind = type(image).__name__
                raise VideoError(f"an image of a sequence is {kind}; it must be a path or bytes", "bad_request")
        if len(self) < 2:
            raise VideoError(f"{self.name}: a sequence needs two or more; give one image itself", "bad_request")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def name(self) -> str:
        """The name of the whole sequence in messages."""
        return f"a sequence of {len(self)} images"

    def check(self, limits: MediaLimits) -> None:
        """Raises VideoError for more images than max_images."""
        if len(self) > limits.max_images:
            limit = f"{limits.max_images} (MediaLimits.max_images)"
            raise VideoError(f"{self.name}, the limit is {limit}", "too_many_frames")
