"""The model's stages one by one, without the engine: vision encoding, prefill, a decode step over a dummy context."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from atb_pllava.engine.block_manager import blocks_for
from atb_pllava.errors import ConfigError
from atb_pllava.executor.model_input import EmbedSlice, ModelInput
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.llm import LLM

_VIDEO = 2**40  # a video id that no request has


class StageRunner:
    """Runs stages of a loaded model. The stages overwrite the KV cache, so no request may run meanwhile."""

    def __init__(self, llm: LLM) -> None:
        self.executor = llm.engine.core.executor
        self.config = llm.engine.config
        self.encoder_chunk = llm.engine.core.encoder_chunk
        self.model = llm.model

    def encode(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 [T, size, size, 3] to video embeddings [t * h * w, hidden], in the engine's batches."""
        self.executor.free_video(_VIDEO)
        for start in range(0, len(frames), self.encoder_chunk):
            chunk = frames[start : start + self.encoder_chunk]
            self.executor.call(ModelRunner.encode_frames, _VIDEO, chunk)
        self.executor.call(ModelRunner.pool_frames, _VIDEO, list(range(len(frames))))
        return self.executor.runner.video_embeds(_VIDEO)

    def prefill(self, token_ids: Sequence[int], start: int, length: int) -> Tensor:
        """Logits [1, vocabulary] of a whole prompt in one step. The embeddings of `encode` replace `length` tokens."""
        count = len(token_ids)
        step = ModelInput(
            decoding=0,
            token_ids=list(token_ids),
            positions=list(range(count)),
            slot_mapping=list(range(count)),
            query_lens=[count],
            context_lens=[count],
            block_tables=[list(range(self._blocks(count)))],
            logits_indices=[count - 1],
            embed_slices=[EmbedSlice(_VIDEO, 0, length, start)] if length else [],
        )
        return self.executor.call(ModelRunner.forward, step)

    def fill_cache(self, value: float) -> None:
        """Write every cached key and value. Linux maps unwritten pages to one page of zeros, which is read too fast."""
        for layer in self.executor.runner.cache:
            for tensor in layer:
                tensor.fill_(value if tensor.is_floating_point() else 1)

    def decode(self, batch: int, tokens: int) -> Tensor:
        """Logits [B, vocabulary] of one decode step with `tokens` cached tokens a sequence.

        Raises ConfigError if the KV cache has too few blocks: a device would read outside of it.
        """
        blocks = self._blocks(tokens + 1)
        room = self.executor.runner.blocks
        if batch * blocks > room:
            raise ConfigError(
                f"a batch of {batch} needs {batch * blocks} KV blocks, and memory was planned for {room}: leave larger "
                f"batch sizes than {room // blocks} out, or raise --kv_cache_bytes"
            )
        size = self.config.block_size
        tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(batch)]
        step = ModelInput(
            decoding=batch,
            token_ids=[1] * batch,
            positions=[tokens] * batch,
            slot_mapping=[table[tokens // size] * size + tokens % size for table in tables],
            query_lens=[1] * batch,
            context_lens=[tokens + 1] * batch,
            block_tables=tables,
            logits_indices=list(range(batch)),
            embed_slices=[],
        )
        return self.executor.call(ModelRunner.forward, step)

    def _blocks(self, tokens: int) -> int:
        return blocks_for(tokens, self.config.block_size)


def random_frames(llm: LLM) -> np.ndarray:
    """Random uint8 frames [T, size, size, 3] with the model's number of frames."""
    side = llm.config.vision.image_size
    return np.random.default_rng(0).integers(0, 256, (llm.config.num_frames, side, side, 3), dtype=np.uint8)
