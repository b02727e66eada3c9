"""What a model takes before it is there: bytes to download, to hold, and to answer with. Nothing is loaded.

Weights, keys and values are counted as in `costs`. Working memory is an estimate from the largest tensors that exist at
once.
"""

import math
from dataclasses import dataclass, replace

from atb_pllava.config import EngineConfig, PllavaConfig
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.engine.block_manager import blocks_for
from atb_pllava.engine.request import SamplingParams
from atb_pllava.model.costs import Costs
from atb_pllava.ops.int8 import QuantConfig
from atb_pllava.ops.interface import Backend

PROCESS_BYTES = 400_000_000  # Python, torch and its libraries: resident after the imports, measured on x86-64 Linux
TEXT_TOKENS = 512  # of a template, a question and an answer beside one video


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes in one memory: a device's, or for all ranks together that of a machine whose CPU they share.

    `clip` are the keys and values of one video with a question and an answer. `batch` are those of a full batch of the
    longest requests, which the KV cache holds by default where memory allows. `caches` fill up in long runs: tokens and
    frames of videos seen before.
    """

    weights: int
    clip: int
    batch: int
    working: int
    caches: int

    @property
    def least(self) -> int:
        """One video at a time. The KV cache is given at most half of what weights leave (`kv_cache.plan_blocks`)."""
        return self.weights + self.clip + max(self.clip, self.working)

    @property
    def default(self) -> int:
        """A full batch of longest requests and full caches."""
        return self.weights + self.batch + self.working + self.caches


def memory_need(
    config: PllavaConfig,
    element: int,
    int8: QuantConfig,
    world_size: int = 1,
    *,
    together: bool = False,
    vision_batch: int = Backend.preferred_vision_batch,
    engine: EngineConfig | None = None,
) -> MemoryNeed:
    """What the engine needs with floats of `element` bytes: on rank 0, which has the largest share, or all together.

    vision_batch: frames encoded at once where `engine` names no number.
    """
    engine = engine or EngineConfig()
    ranks = range(world_size if together else 1)
    int8_kv = engine.kv_cache_dtype == "int8"
    costs = [Costs(config, element, int8, TensorParallel(rank, world_size), int8_kv=int8_kv) for rank in ranks]
    per_token = sum(cost.kv_bytes_per_token for cost in costs)
    tokens = config.num_video_tokens + TEXT_TOKENS
    frames = config.with_video(min(config.num_frames, engine.vision_batch or vision_batch))
    working = PROCESS_BYTES + working_bytes(frames, tokens, world_size) * element // 2
    return MemoryNeed(
        weights=sum(cost.weight_bytes for cost in costs),
        clip=(tokens + engine.block_size) * per_token,
        batch=blocks_for(kv_cache_tokens(config, engine), engine.block_size) * engine.block_size * per_token,
        working=working * len(costs),
        caches=2 * engine.video_cache_bytes,
    )


def longest_request(config: PllavaConfig, engine: EngineConfig) -> int:
    """Tokens of the longest request that the KV cache makes room for, the answer included."""
    if engine.max_input_length is not None:
        return engine.max_input_length + (engine.max_output_length or SamplingParams.max_tokens)
    return max(config.text.max_position_embeddings, config.num_video_tokens + 1024)


def kv_cache_tokens(config: PllavaConfig, engine: EngineConfig) -> int:
    """Tokens of a full batch of longest requests. Each takes a block more: lengths are rounded up to whole blocks."""
    return engine.max_batch_size * (longest_request(config, engine) + engine.block_size)


def working_bytes(config: PllavaConfig, tokens_at_once: int, world_size: int) -> int:
    """An estimate of activations at their peak, in 16 bits: all frames in the vision tower, or a full prefill.

    Vision: the MLP's and four hidden-sized tensors of all frames, attention weights in 32 bits where no fused kernel
    avoids them, three projected tensors. Prefill: three MLP-sized and six hidden-sized tensors of every token.
    """
    vision, text, frames = config.vision, config.text, config.num_frames
    patches = vision.grid**2 + 1
    tower = 2 * frames * patches * (vision.intermediate_size + 4 * vision.hidden_size)
    scores = 4 * frames * vision.num_attention_heads * patches**2
    projected = 3 * 2 * frames * patches * text.hidden_size
    prefill = 2 * tokens_at_once * (3 * math.ceil(text.intermediate_size / world_size) + 6 * text.hidden_size)
    return max(tower + scores + projected, prefill)


def published_bytes(config: PllavaConfig, lora_rank: int, element: int = 2) -> int:
    """Bytes of the tensors in a published directory, as PLLaVA saves them with PEFT.

    These are all layers of the vision tower with the norm behind them, projector and decoder, and LoRA of `lora_rank`
    for every q_proj and v_proj. Tokenizer and headers, about 2 MB, are left out.
    """
    text = config.text
    whole = replace(config, vision_feature_layer=-1)
    heads, kv_heads = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    lora = lora_rank * text.num_hidden_layers * (2 * text.hidden_size + heads + kv_heads)
    last_norm = 2 * config.vision.hidden_size
    return Costs(whole, element).weight_bytes + (lora + last_norm) * element
