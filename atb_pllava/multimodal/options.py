"""MultimodalOptions: the user's choice of frame sampler, resize mode, media limits and media workers."""

from dataclasses import dataclass, field

from atb_pllava.config import check_choice, option
from atb_pllava.errors import ConfigError, check_whole_number
from atb_pllava.multimodal.frame_sampling import FRAME_SAMPLERS
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.transforms import RESIZE_MODES

MOST_WORKERS = 256


@dataclass(frozen=True)
class MultimodalOptions:
    """How a VideoProcessor reads media.

    `frame_sampler`: see `frame_sampling.sample_frame_indices`. `resize`: see `transforms.resize_frames`. `limits` None
    means `MediaLimits()`. `media_workers`: see `media_pool.MediaPool`. 0 reads media in this process, which a
    damaged file may then crash. `media_worker_at_load` starts the first worker while the model loads. Otherwise it
    starts with the first request that has media.
    """

    frame_sampler: str = field(
        default="demo",
        metadata=option(
            "which frames: demo (default), the middle of each of T equal parts; eval, the same but for GIFs; npu, the "
            "beginning of each part",
            metavar="NAME",
            choices=FRAME_SAMPLERS,
        ),
    )
    resize: str = field(
        default="clip",
        metadata=option(
            "frames to squares: clip (default), scale the short side and crop; res672, first scale it to 672; squash, "
            "stretch",
            metavar="NAME",
            choices=RESIZE_MODES,
        ),
    )
    limits: MediaLimits | None = None
    media_workers: int | None = field(
        default=None,
        metadata=option("processes that read media (default: cores, at most 8; 0: none)"),
    )

    media_worker_at_load: bool = False

    def __post_init__(self) -> None:
        check_choice("frame_sampler", self.frame_sampler, FRAME_SAMPLERS)
        check_choice("resize", self.resize, RESIZE_MODES)
        if self.limits is not None and not isinstance(self.limits, MediaLimits):
            raise ConfigError(f"limits is a {type(self.limits).__name__}; it must be a MediaLimits")
        if self.media_workers is not None:
            check_whole_number("media_workers", self.media_workers, 0, MOST_WORKERS)
