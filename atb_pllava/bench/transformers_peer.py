"""The same model in Hugging Face transformers, with the same random weights, for comparison.

The model is PLLaVA as its authors run it: transformers' CLIP and LLaMA, LLaVA's projector, torch's adaptive pooling.
On an accelerator, transformers is measured in two ways: as `generate` runs it, each operator launched from Python and
the cache growing, and with a static cache and the whole decode step in one graph.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atb_pllava.config import PllavaConfig
from atb_pllava.distributed.tensor_parallel import ShardSpec
from atb_pllava.errors import BackendError, ConfigError
from atb_pllava.loader.dummy_weights import DummyWeights
from atb_pllava.ops.int8 import Int8Weight, QuantConfig
from atb_pllava.ops.interface import Backend

FILL = 0.01  # every key and value of a dummy context
# A graph launches the kernels of the step before it. The bound leaves room for products that are split in another way.
_GRAPH_ERROR = 0.02


class TransformersPeer:
    """The transformers model on the device of `ops`. Weights of layers in `int8` are dequantised.

    Raises ConfigError without transformers.
    """

    def __init__(self, config: PllavaConfig, dtype: torch.dtype, int8: QuantConfig, ops: Backend) -> None:
        try:
            import transformers
        except ImportError:
            raise ConfigError("the comparison needs transformers: pip install transformers") from None
        self.version: str = transformers.__version__
        self._static_cache = transformers.StaticCache
        self._dynamic_cache = transformers.DynamicCache
        self._ops = ops
        self._device = ops.device
        self.config = config
        self.dtype = dtype
        vision = config.vision
        text = config.text
        with torch.device("meta"):
            self.tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vars(vision)))
            self.llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**vars(text)))
            self.projector = nn.Sequential(
                nn.Linear(vision.hidden_size, text.hidden_size),
                nn.GELU(),
                nn.Linear(text.hidden_size, text.hidden_size),
            )
        for module in (self.tower, self.llama, self.projector):
            module.to(dtype).to_empty(device=self._device).eval().requires_grad_(False)
        self._compute_buffers()
        _fill(dict(self._destinations()), int8, dtype)

    def _compute_buffers(self) -> None:
        """Compute the buffers that no checkpoint holds. `to_empty` left them uninitialised."""
        text = self.config.text
        rotary = self.llama.model.rotary_emb
        exponents = torch.arange(0, text.head_dim, 2, device=self._device).float() / text.head_dim
        rotary.inv_freq = rotary.original_inv_freq = 1.0 / text.rope_theta**exponents
        for name, buffer in self.tower.named_buffers():
            assert name.endswith("position_ids"), name
            buffer.copy_(torch.arange(buffer.shape[-1])[None])

    def _destinations(self) -> Iterator[tuple[str, ShardSpec]]:
        """All parameters, by their names in a plain LLaVA checkpoint."""
        for name, parameter in self.tower.named_parameters():
            yield f"vision_tower.vision_model.{name.removeprefix('vision_model.')}", ShardSpec.whole(parameter)
        for name, parameter in self.llama.named_parameters():
            yield f"language_model.{name}", ShardSpec.whole(parameter)
        for index, layer in ((0, "linear_1"), (2, "linear_2")):
            for name, parameter in self.projector[index].named_parameters():
                yield f"multi_modal_projector.{layer}.{name}", ShardSpec.whole(parameter)

    def use_attention(self, name: str) -> None:
        """Use "sdpa" or "eager" attention from now on."""
        self.tower.set_attn_implementation(name)
        self.llama.set_attn_implementation(name)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [T, 3, size, size] to video embeddings [t * h * w, hidden]."""
        side = self.config.vision.grid
        t, h, w = self.config.pooling_shape
        hidden = self.tower(pixels.to(self.dtype), output_hidden_states=True).hidden_states
        grid = self.projector(hidden[self.config.vision_feature_layer][:, 1:]).unflatten(1, (side, side))
        pooled = F.adaptive_avg_pool3d(grid.permute(3, 0, 1, 2), (t, h, w))  # [hidden, t, h, w]
        return pooled.flatten(1).T

    def embed(self, token_ids: list[int], video: Tensor, start: int) -> Tensor:
        """Embeddings [1, L, hidden] of a prompt with the video embeddings at position `start`."""
        x: Tensor = self.llama.get_input_embeddings()(torch.tensor([token_ids], device=self._device))
        x[0, start : start + len(video)] = video
        return x

    @torch.no_grad()
    def prefill(self, embeddings: Tensor) -> Tensor:
        """Embeddings [1, L, hidden] to the last row's logits [vocabulary] in float32, with a new cache.

        The cache is static on a CPU, where that is faster. On an accelerator the cache is the one of `generate`.
        """
        cache = self._dynamic_cache(config=self.llama.config)
        if self._ops.on_host:
            cache = self._static_cache(config=self.llama.config, max_cache_len=embeddings.shape[1] + 1)
        out = self.llama(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[0, -1].float()
        return logits

    @torch.no_grad()
    def static_context(self, batch: int, tokens: int) -> Any:
        """A static cache of `batch` sequences with `tokens` dummy tokens each, and room for one more."""
        cache = self._static_cache(config=self.llama.config, max_cache_len=tokens + 1)
        ids = torch.ones(batch, 1, dtype=torch.int64, device=self._device)
        self.llama(ids, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys.fill_(FILL)
            layer.values.fill_(FILL)
        return cache

    def dynamic_context(self, batch: int, tokens: int) -> Any:
        """A growing cache of `batch` sequences with `tokens` dummy tokens each."""
        text = self.config.text
        cache = self._dynamic_cache(config=self.llama.config)
        shape = (batch, text.num_key_value_heads, tokens, text.head_dim)
        for layer in range(text.num_hidden_layers):
            keys, values = (torch.full(shape, FILL, dtype=self.dtype, device=self._device) for _ in range(2))
            cache.update(keys, values, layer)
        return cache

    def decode_step(self, cache: Any, batch: int, tokens: int) -> Callable[[], Tensor]:
        """A function that runs one decode step and returns its logits [B, vocabulary].

        The cache has `tokens` tokens a sequence before and after each call. With a static cache the step reads nothing
        from the host, so that a graph can capture the step.
        """
        position = torch.tensor([tokens], device=self._device)
        positions = position.repeat(batch, 1)
        ids = torch.ones(batch, 1, dtype=torch.int64, device=self._device)

        @torch.no_grad()
        def step() -> Tensor:
            for layer in cache.layers:
                if hasattr(layer, "cumulative_length"):  # versions without it take the length from the position
                    layer.cumulative_length.fill_(tokens)
            out = self.llama(
                ids, past_key_values=cache, use_cache=True, cache_position=position, position_ids=positions
            )
            if isinstance(cache, self._dynamic_cache):
                cache.crop(tokens)
            logits: Tensor = out.logits[:, -1]
            return logits

        return step

    def captured_decode_step(self, batch: int, tokens: int) -> Callable[[], Tensor]:
        """Like `decode_step`, over a static cache of its own and launched as one graph.

        Raises BackendError if the device cannot capture the step, or if the graph has other logits than the step.
        """
        step = self.decode_step(self.static_context(batch, tokens), batch, tokens)
        step()  # the first step compiles and loads kernels
        graph = self._ops.capture(step)
        lens = [tokens + 1] * batch
        expected = step().float()
        error = float((graph.replay(lens).float() - expected).abs().max() / expected.abs().max())
        if not error <= _GRAPH_ERROR:
            raise BackendError(f"transformers' captured decode step differs from its eager step by {error:.2g}")
        return lambda: graph.replay(lens)


@torch.no_grad()
def _fill(destinations: dict[str, ShardSpec], int8: QuantConfig, dtype: torch.dtype) -> None:
    """Load the same random weights as `LLM` does, under the same names. int8 weights are dequantised."""
    weights = DummyWeights(sum(part.tensor.nbytes for part in destinations.values()))
    for _ in weights.load({name: part for name, part in destinations.items() if name not in int8.names}):
        pass
    for name in sorted(int8.names):
        room = Int8Weight.empty(len(destinations[name].tensor), destinations[name].shape[1], dtype)
        parts = {name: room.values, f"{name}_scale": room.scale, f"{name}_offset": room.zero_point}
        for _ in weights.load({part: ShardSpec.whole(tensor) for part, tensor in parts.items()}):
            pass
        destinations[name].tensor.copy_(room.dequantise())
