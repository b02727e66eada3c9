"""ModelRunner: one rank's model, KV cache and video embeddings. A model runner runs one packed batch a step."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from atb_pllava.config import PreprocessorConfig
from atb_pllava.errors import BackendError
from atb_pllava.executor.graph_runner import GraphRunner
from atb_pllava.executor.model_input import ModelInput
from atb_pllava.model.pllava import Pllava
from atb_pllava.multimodal.transforms import normalization_table
from atb_pllava.ops.forward_batch import ForwardBatch, SequenceBatch
from atb_pllava.ops.interface import Feature, LayerCache

_CLIP = PreprocessorConfig()
_WARM_UP_TOKENS = 128  # more rows than the int8 kernel of CUDA takes, so that dequantising is compiled too


class ModelRunner:
    """Owns the model, the KV cache, and the embeddings of videos by video id.

    The caller has packed the model's weights: `fill_model` with pack=True does so, or `pack_weights`. `preprocessor`
    states how frames become pixels.
    """

    def __init__(
        self,
        model: Pllava,
        blocks: int,
        block_size: int,
        kv_cache_dtype: str = "auto",
        decode_graphs: bool = True,
        preprocessor: PreprocessorConfig = _CLIP,
    ) -> None:
        self.model = model
        self.ops = model.ops
        self.device = model.ops.device
        self.blocks = blocks
        self._block_size = block_size
        text = model.config.text
        self.cache: list[LayerCache] = self.ops.new_kv_cache(
            text.num_hidden_layers,
            blocks,
            block_size,
            model.language.kv_heads,
            text.head_dim,
            torch.int8 if kv_cache_dtype == "int8" else model.dtype,
        )
        element_size = torch.empty(0, dtype=model.dtype).element_size()
        self.bytes_per_video = model.config.num_video_tokens * text.hidden_size * element_size
        self._graphs: GraphRunner | None = None
        if decode_graphs and self.ops.supports(Feature.GRAPH_CAPTURE):
            max_blocks_per_seq = min(blocks, -(-text.max_position_embeddings // block_size))
            self._graphs = GraphRunner(model, self.cache, max_blocks_per_seq)
        table = normalization_table(preprocessor.image_mean, preprocessor.image_std)
        self._normalization_table = torch.from_numpy(table).to(self.device)
        self._features: dict[int, list[Tensor]] = {}
        self._video_embeds: dict[int, Tensor] = {}

    # Not inference_mode, because collectives of torch 2.1 cannot write into its tensors.
    @torch.no_grad()
    def encode_frames(self, video: int, frames: np.ndarray) -> None:
        """Run the vision tower and the projector on some frames of a video, uint8 [frames, size, size, 3].

        Each rank normalises and encodes its share of the frames. The features are kept until `pool_frames`. Calls for
        one video append.
        """
        features = self.model.encode_share(self._pixels(frames), len(frames))
        self._features.setdefault(video, []).append(features)

    def _pixels(self, frames: np.ndarray) -> Tensor:
        """The normalised pixels [share, 3, size, size] of this rank's share of uint8 frames, on the device."""
        mine = self.model.parallel.share(len(frames))
        if mine:
            share = self.ops.upload(frames[mine.start : mine.stop])
            pixels = self.ops.normalize_frames(share, self._normalization_table)
        else:  # there are more ranks than frames, and devices refuse operators on empty tensors
            pixels = torch.empty(0, 3, *frames.shape[1:3], device=self.device)
        self.model.parallel.barrier()  # rank 0 may overwrite frames in shared memory from here on
        return pixels

    @torch.no_grad()
    def pool_frames(self, video: int, inverse_indices: Sequence[int]) -> None:
        """Pool the features of a video to its embeddings, which are kept. See `Pllava.pool_frames`."""
        self._video_embeds[video] = self.model.pool_frames(torch.cat(self._features.pop(video)), inverse_indices)

    def free_video(self, video: int) -> None:
        """Free the features and the embeddings of a video. An unknown video is ignored."""
        self._features.pop(video, None)
        self._video_embeds.pop(video, None)

    def video_embeds(self, video: int) -> Tensor:
        """The embeddings [t * h * w, hidden] of a video that `pool_frames` has made."""
        return self._video_embeds[video]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks in all layers, for each pair (source, destination). See `Backend.copy_blocks`.

        Raises BackendError for a block number outside of the KV cache.
        """
        outside = [block for pair in pairs for block in pair if not 0 <= block < self.blocks]
        if outside:
            raise BackendError(f"block {outside[0]} is outside of the KV cache of {self.blocks} blocks")
        if pairs:
            sources, destinations = zip(*pairs, strict=True)
            self.ops.copy_blocks(self.cache, sources, destinations)

    @torch.no_grad()
    def forward(self, step: ModelInput) -> Tensor:
        """Run a step: float32 logits [L, vocabulary] of the rows in step.logits_indices."""
        if self._graphs is not None and self._graphs.fits(step):
            return self._graphs.forward(step)
        slices = step.embed_slices
        video_positions = [row for piece in slices for row in range(piece.row, piece.row + piece.count)]
        video_embeds = [self._video_embeds[piece.video][piece.first : piece.first + piece.count] for piece in slices]
        batch = ForwardBatch(
            token_ids=self._tensor(step.token_ids),
            positions=self._tensor(step.positions),
            slot_mapping=self._tensor(step.slot_mapping),
            decode=self._sequences(step, slice(0, step.decoding)),
            prefill=self._sequences(step, slice(step.decoding, None)),
            logits_indices=self._tensor(step.logits_indices),
            video_positions=self._tensor(video_positions) if slices else None,
            video_embeds=torch.cat(video_embeds) if slices else None,
        )
        logits: Tensor = self.model(batch, self.cache)
        return logits

    @torch.no_grad()
    def warm_up_prompt(self, frames: int) -> None:
        """Encode frames of zeros and run a prompt, so that the device compiles and loads their kernels.

        The number of frames is a video's, or `frames` if that is less. Nothing is kept. The prompt's slots are -1, so
        no block is written. Backends with Feature.GRAPH_CAPTURE only.
        """
        config = self.model.config
        side = config.vision.image_size
        frames = min(config.num_frames, frames)
        features = self.model.encode_share(self._pixels(np.zeros((frames, side, side, 3), np.uint8)), frames)
        self.model.pool_frames(features, [t % frames for t in range(config.num_frames)])
        tokens = min(_WARM_UP_TOKENS, config.text.max_position_embeddings)
        table = [0] * -(-tokens // self._block_size)
        rows = list(range(tokens))
        self.forward(ModelInput(0, [0] * tokens, rows, [-1] * tokens, [tokens], [tokens], [table], [tokens - 1], []))

    @torch.no_grad()
    def warm_up_decode(self, batch_size: int) -> None:
        """Decode one token of `batch_size` sequences, so that the device compiles the kernels and captures the graph.

        Nothing is kept. Slots are -1, so no block is written. Backends with Feature.GRAPH_CAPTURE only.
        """
        zeros = [0] * batch_size
        ones = [1] * batch_size
        rows = list(range(batch_size))
        self.forward(ModelInput(batch_size, zeros, zeros, [-1] * batch_size, ones, ones, [[0]] * batch_size, rows, []))

    def free_graphs(self) -> None:
        """Drop all captured graphs. Every later step runs without graphs.

        NCCL destroys a communicator only after the graphs that hold its collectives, and waits for them without end
        (ncclCommDestroy, since NCCL 2.26).
        """
        if self._graphs is not None:
            self._graphs.free()
        self._graphs = None

    def _sequences(self, step: ModelInput, which: slice) -> SequenceBatch:
        """The sequences `which` of the step as a SequenceBatch. Block tables are padded with 0 to the longest."""
        tables = step.block_tables[which]
        columns = max(map(len, tables), default=0)
        padded = [table + [0] * (columns - len(table)) for table in tables]
        block_tables = self._tensor(padded).reshape(len(tables), columns)
        return SequenceBatch.of(step.query_lens[which], step.context_lens[which], block_tables)

    def _tensor(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
