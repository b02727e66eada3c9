"""The shape and the batch sizes of `bench compare` where the user names none: what fits into the device twice."""

from collections.abc import Sequence

from atb_pllava.bench.shapes import shape_config
from atb_pllava.config import PllavaConfig
from atb_pllava.model.costs import Costs
from atb_pllava.ops.interface import Backend

_ON_HOST = (1, 8)
_ON_ACCELERATOR = (1, 8, 32)
_ELEMENT = 2  # bytes of a 16-bit float
_WORKING_BYTES = 8 * 10**9  # on an accelerator: buffers of the peaks (3 GB), activations, graphs, CUDA itself


def default_shape(ops: Backend, text_tokens: int) -> str:
    """The shape "1b" on a CPU. On an accelerator "7b" where memory allows, else "1b"."""
    if ops.on_host:
        return "1b"
    config = shape_config("7b")
    needed = bytes_of_both(config, 1, config.num_video_tokens + text_tokens)
    return "7b" if needed <= ops.free_memory() else "1b"


def default_batches(ops: Backend, config: PllavaConfig, tokens: int) -> Sequence[int]:
    """1 and 8 on a CPU. On an accelerator those of 1, 8 and 32 that fit, and at least 1. tokens: of a context."""
    if ops.on_host:
        return _ON_HOST
    free = ops.free_memory()
    return [batch for batch in _ON_ACCELERATOR if batch == 1 or bytes_of_both(config, batch, tokens) <= free]


def bytes_of_both(config: PllavaConfig, batch: int, tokens: int) -> int:
    """Bytes of weights and KV caches of our model and of transformers', in 16 bits, with room to work."""
    costs = Costs(config, _ELEMENT)
    return 2 * (costs.weight_bytes + batch * tokens * costs.kv_bytes_per_token) + _WORKING_BYTES
