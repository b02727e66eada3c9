"""The same model in Hugging Face transformers, with the same random weights, for comparison.

The model is PLLaVA as its authors run it: transformers' CLIP and LLaMA, LLaVA's projector, torch's adaptive pooling.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atb_pllava.config import PllavaConfig
from atb_pllava.distributed.tensor_parallel import ShardSpec
from atb_pllava.errors import ConfigError
from atb_pllava.loader.dummy_weights import DummyWeights
from atb_pllava.ops.int8 import Int8Weight, QuantConfig

FILL = 0.01  # every key and value of a dummy context


class TransformersPeer:
    """The transformers model. Weights of layers in `int8` are dequantised. Raises ConfigError without transformers."""

    def __init__(self, config: PllavaConfig, dtype: torch.dtype, int8: QuantConfig) -> None:
        try:
            import transformers
        except ImportError:
            raise ConfigError("the comparison needs transformers: pip install transformers") from None
        self.version: str = transformers.__version__
        self._static_cache = transformers.StaticCache
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
            module.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
        self._compute_buffers()
        _fill(dict(self._destinations()), int8, dtype)

    def _compute_buffers(self) -> None:
        """Compute the buffers that no checkpoint holds. `to_empty` left them uninitialised."""
        text = self.config.text
        rotary = self.llama.model.rotary_emb
        exponents = torch.arange(0, text.head_dim, 2).float() / text.head_dim
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
        x: Tensor = self.llama.get_input_embeddings()(torch.tensor([token_ids]))
        x[0, start : start + len(video)] = video
        return x

    @torch.no_grad()
    def prefill(self, embeddings: Tensor) -> Tensor:
        """Embeddings [1, L, hidden] to the last row's logits [vocabulary] in float32, with a new cache."""
        cache = self._static_cache(config=self.llama.config, max_cache_len=embeddings.shape[1] + 1)
        out = self.llama(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[0, -1].float()
        return logits

    @torch.no_grad()
    def context(self, batch: int, tokens: int) -> Any:
        """A static cache of `batch` sequences with `tokens` dummy tokens each."""
        cache = self._static_cache(config=self.llama.config, max_cache_len=tokens + 1)
        self.llama(torch.ones(batch, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys.fill_(FILL)
            layer.values.fill_(FILL)
        return cache

    @torch.no_grad()
    def decode(self, cache: Any, batch: int, tokens: int) -> Tensor:
        """Logits [B, vocabulary] of one decode step. The cache has `tokens` tokens a sequence before and after it."""
        for layer in cache.layers:
            if hasattr(layer, "cumulative_length"):  # versions without it take the length from the position
                layer.cumulative_length.fill_(tokens)
        position = torch.tensor([tokens])
        ids = torch.ones(batch, 1, dtype=torch.int64)
        out = self.llama(
            ids,
            past_key_values=cache,
            use_cache=True,
            cache_position=position,
            position_ids=position.expand(batch, 1),
        )
        logits: Tensor = out.logits[:, -1]
        return logits


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
