"""Vision tower, projector and pooling on MindIE's device, in plain torch operators.

Every rank encodes every frame, as MindIE does for its own models. MindIE's ranks communicate only inside the compiled
graph. A communicator in Python would cost memory and start-up time on every card, and each video is encoded only once.
"""

import torch
from torch import Tensor, nn

from atb_pllava.config import PllavaConfig, PreprocessorConfig
from atb_pllava.distributed.tensor_parallel import ShardSpec
from atb_pllava.loader.weight_loader import Checkpoint, LoadPlan, unused_vision_layers
from atb_pllava.model.pllava import Pllava
from atb_pllava.multimodal.pixel_values import pixel_values
from atb_pllava.multimodal.processor import ProcessedVideo
from atb_pllava.ops.reference import TorchBackend

FRAMES_AT_ONCE = 8  # bounds the memory of the vision tower, whatever the number of videos


class VideoEncoder(nn.Module):
    """Turns the frames of a video into video embeddings, `video_embeds`."""

    def __init__(self, config: PllavaConfig, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        """Check names, shapes and dtypes of the whole checkpoint, and load vision tower and projector.

        MindIE loads the language model itself. Raises CheckpointError with everything that is wrong.
        """
        super().__init__()
        self.config = config
        self.device = device
        with torch.device("meta"):
            model = Pllava(config, TorchBackend(device), dtype, int8=checkpoint.int8)
        shapes = {name: part.shape for name, part in model.weight_map().items()}
        plan = checkpoint.check(shapes, unused=unused_vision_layers(config))
        del model.language
        model.to_empty(device=device)
        views = {**model.vision.weight_views(), **model.projector.weight_views()}
        wanted = {name: item for name, item in plan.items.items() if name in views}
        for _ in LoadPlan(plan.where, wanted).load({name: ShardSpec.whole(view) for name, view in views.items()}):
            pass
        self.model = model

    @torch.no_grad()
    def forward(self, video: ProcessedVideo) -> Tensor:
        """The video_embeds [t * h * w, hidden] of one video, in the model's dtype on its device."""
        starts = range(0, len(video), FRAMES_AT_ONCE)
        features = [self.model.encode_frames(self._pixels(video, start)) for start in starts]
        return self.model.pool_frames(torch.cat(features), video.inverse_indices)

    def warm_up(self) -> None:
        """Encode a video of grey frames. MindIE measures memory later, and then counts the vision tower's too."""
        side = self.config.vision.image_size
        frames = self.config.num_frames
        grey = torch.full((frames, side, side, 3), 128, dtype=torch.uint8).numpy()
        self(ProcessedVideo(grey, tuple(range(frames)), tuple(range(frames)), PreprocessorConfig(side)))

    def _pixels(self, video: ProcessedVideo, start: int) -> Tensor:
        # Rounded to the model's dtype before the copy to the device: half the bytes, the same values.
        return pixel_values(video, start, start + FRAMES_AT_ONCE).to(self.model.dtype).to(self.device)
