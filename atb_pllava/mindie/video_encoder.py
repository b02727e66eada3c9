"""The part of PLLaVA in front of the language model, on the host's device: vision tower, projector and pooling.

Every rank encodes every frame, as the host does for its own models: its workers have no collectives in Python, ranks
talk only inside of the compiled graph. A second communicator would cost memory and start-up on every card to save a
part of the one time a video is encoded. The operators are plain torch.
"""

import torch
from torch import Tensor, nn

from atb_pllava.config import PllavaConfig, PreprocessorConfig
from atb_pllava.distributed.tensor_parallel import ShardSpec
from atb_pllava.loader.weight_loader import Checkpoint, LoadPlan, unused_vision_layers
from atb_pllava.model.pllava import Pllava
from atb_pllava.multimodal.processor import ProcessedVideo
from atb_pllava.ops.reference import TorchBackend

FRAMES_AT_ONCE = 8  # bounds the memory of the vision tower, whatever the number of videos


class VideoEncoder(nn.Module):
    """Frames to video tokens; every tensor of it comes from the checkpoint or loading fails."""

    def __init__(self, config: PllavaConfig, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        """Compares the names, shapes and types of the whole checkpoint, the host's part included, and loads ours.

        Raises CheckpointError with everything that is wrong.
        """
        super().__init__()
        self.config, self.device = config, device
        with torch.device("meta"):
            model = Pllava(config, TorchBackend(device), dtype, int8=checkpoint.int8)
        shapes = {name: part.shape for name, part in model.weight_map().items()}
        plan = checkpoint.check(shapes, unused=unused_vision_layers(config))
        del model.language
        model.to_empty(device=device)
        views = {**model.vision.weight_views(), **model.projector.weight_views()}
        ours = {name: item for name, item in plan.items.items() if name in views}
        for _ in LoadPlan(plan.where, ours).load({name: ShardSpec.whole(view) for name, view in views.items()}):
            pass
        self.model = model

    @torch.no_grad()
    def forward(self, video: ProcessedVideo) -> Tensor:
        """Video tokens [t * h * w, hidden] of one video, in the model's dtype on its device."""
        starts = range(0, len(video), FRAMES_AT_ONCE)
        features = [self.model.encode_frames(self._pixels(video, start)) for start in starts]
        return self.model.pool_frames(torch.cat(features), video.inverse_indices)

    def warm_up(self) -> None:
        """Encode a video of nothing but grey frames: what the host measures afterwards includes the memory for it."""
        side, frames = self.config.vision.image_size, self.config.num_frames
        grey = torch.full((frames, side, side, 3), 128, dtype=torch.uint8).numpy()
        self(ProcessedVideo(grey, tuple(range(frames)), tuple(range(frames)), PreprocessorConfig(side)))

    def _pixels(self, video: ProcessedVideo, start: int) -> Tensor:
        # Rounded before they travel: half the bytes, and the same values.
        return video.pixel_values(start, start + FRAMES_AT_ONCE).to(self.model.dtype).to(self.device)
