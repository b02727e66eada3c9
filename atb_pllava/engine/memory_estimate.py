"""The memory that a model will need, computed from its configuration: download, weights, KV cache, activations.

Nothing is loaded. Weights, keys and values are counted as in `model.costs`. The memory of activations is estimated from
the largest tensors that exist at the same time.
"""

import math
from dataclasses import dataclass, replace

from atb_pllava.config import EngineConfig, PllavaConfig
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.engine.block_manager import blocks_for
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.model.costs import Costs
from atb_pllava.ops.int8 import QuantConfig
from atb_pllava.ops.interface import Backend

PROCESS_BYTES = 400_000_000  # Python, torch and its libraries: resident after the imports, measured on x86-64 Linux
TEXT_TOKENS = 512  # for the template, a question and an answer, besides one video


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes in one memory: a device's memory, or the main memory that all ranks of a CPU model share.

    clip: keys and values of one video with a question and an answer. batch: keys and values of a full batch of the
    longest requests, which is the default size of the KV cache if memory allows. working: activations and the process.
    caches: embeddings and frames of earlier videos, which accumulate in long runs.
    """

    weights: int
    clip: int
    batch: int
    working: int
    caches: int

    @property
    def least(self) -> int:
        """For one video at a time. The KV cache gets at most half of the memory beside the weights (`plan_blocks`)."""
        return self.weights + self.clip + max(self.clip, self.working)

    @property
    def default(self) -> int:
        """For a full batch of the longest requests, and full caches."""
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
    """The memory that the engine needs, with floats of `element` bytes.

    together=False: on the device of rank 0, which has the largest share. together=True: of all ranks. vision_batch:
    frames encoded at once where `engine` names no number.
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
    """Tokens of the longest request that the KV cache is planned for, including the answer."""
    if engine.max_input_length is not None:
        return engine.max_input_length + (engine.max_output_length or SamplingParams.max_tokens)
    return max(config.text.max_position_embeddings, config.num_video_tokens + 1024)


def kv_cache_tokens(config: PllavaConfig, engine: EngineConfig) -> int:
    """Tokens of a full batch of the longest requests, with one block more each, since lengths fill whole blocks."""
    return engine.max_batch_size * (longest_request(config, engine) + engine.block_size)


def working_bytes(config: PllavaConfig, tokens_at_once: int, world_size: int) -> int:
    """Estimated bytes of activations at their peak in 16 bits: the larger of the vision tower and a full prefill.

    Vision, for all frames: one MLP-sized and four hidden-sized tensors, attention weights in 32 bits (without a fused
    kernel), three projected tensors. Prefill, for all tokens: three MLP-sized and six hidden-sized tensors.
    """
    vision = config.vision
    text = config.text
    frames = config.num_frames
    patches = vision.grid**2 + 1
    tower = 2 * frames * patches * (vision.intermediate_size + 4 * vision.hidden_size)
    scores = 4 * frames * vision.num_attention_heads * patches**2
    projected = 3 * 2 * frames * patches * text.hidden_size
    prefill = 2 * tokens_at_once * (3 * math.ceil(text.intermediate_size / world_size) + 6 * text.hidden_size)
    return max(tower + scores + projected, prefill)


def published_bytes(config: PllavaConfig, lora_rank: int, element: int = 2) -> int:
    """Bytes of the tensors in a published directory, as PLLaVA saves them with PEFT.

    The directory holds all layers of the vision tower and the norm behind them, the projector, the decoder, and LoRA of
    `lora_rank` for every q_proj and v_proj. The tokenizer and the headers, about 2 MB, are not counted.
    """
    text = config.text
    whole = replace(config, vision_feature_layer=-1)
    query_width = text.num_attention_heads * text.head_dim
    value_width = text.num_key_value_heads * text.head_dim
    lora = lora_rank * text.num_hidden_layers * (2 * text.hidden_size + query_width + value_width)
    last_norm = 2 * config.vision.hidden_size
    return Costs(whole, element).weight_bytes + (lora + last_norm) * element
