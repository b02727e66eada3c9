"""AWQ (arXiv 2306.00978): scales that reduce the rounding error of int8 weights, found on real clips.

Errors in a weight's column matter more if the column's input is large. Such a column is multiplied by s > 1 and gets
finer steps. The layer before is divided by s, so the float model stays the same. For q, k, v and for gate, up the layer
before is the norm. For down it is up. For o it is v, if every query head has its own KV head.

One decoder layer is in memory at a time, in float32.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from atb_pllava.config import PllavaConfig
from atb_pllava.convert.options import QuantScheme
from atb_pllava.loader.checkpoint import FLOAT_DTYPES
from atb_pllava.loader.checkpoint_config import read_preprocessor_config
from atb_pllava.loader.weight_loader import LoadPlan
from atb_pllava.model.llama import DecoderLayer, rotary_tables
from atb_pllava.model.pllava import Pllava
from atb_pllava.multimodal.pixel_values import pixel_values
from atb_pllava.multimodal.processor import Media, VideoProcessor
from atb_pllava.ops.forward_batch import ForwardBatch, SequenceBatch
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.prompt.chat_template import choose_conversation, render
from atb_pllava.prompt.placeholders import expand_placeholders
from atb_pllava.prompt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

QUESTION = "Describe the video in details."
SAMPLED_TOKENS = 512  # of all clips together; the rounding error is measured on the inputs of these tokens
EXPONENTS = [i / 10 for i in range(11)]  # 0 keeps the weight as it is
KV_BLOCK_SIZE = 128


@dataclass(frozen=True)
class AwqScales:
    """Float32 scales by tensor name.

    `columns` [in] multiply the columns of a weight. `rows` [out] divide the rows of a tensor.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Write the whole file or none."""
        tensors = {f"columns:{name}": scales.clone() for name, scales in self.columns.items()}
        tensors |= {f"rows:{name}": scales.clone() for name, scales in self.rows.items()}
        partial = file.with_name(f".{file.name}.partial")
        save_file(tensors, partial)
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> "AwqScales":
        """Read a file that `save` wrote."""
        awq_scales = cls()
        by_kind = {"columns": awq_scales.columns, "rows": awq_scales.rows}
        for key, scales in load_file(file).items():
            kind, _, name = key.partition(":")
            by_kind[kind][name] = scales
        return awq_scales

    def apply(self, name: str, values: Tensor, rows: range) -> Tensor:
        """`values`, which are the rows `rows` of a tensor, with the tensor's scales applied.

        The result is float32, or `values` itself if the tensor has no scales.
        """
        if name in self.columns:
            values = values * self.columns[name]
        if name in self.rows:
            divisor = self.rows[name][rows.start : rows.stop]
            values = values / divisor.reshape(-1, *[1] * (values.dim() - 1))
        return values


@torch.no_grad()
def find_awq_scales(
    plan: LoadPlan, config: PllavaConfig, model_dir: str, clips: Sequence[Media], scheme: QuantScheme
) -> AwqScales:
    """The scales of every decoder layer of a checkpoint, from the activations of the float model on the clips.

    `scheme` is the rounding that the weights will get. Raises the errors of reading a clip.
    """
    with torch.device("meta"):
        # One decoder layer. The weights of each layer of the checkpoint are copied into it in turn.
        model = Pllava(config.with_layers(1), TorchBackend(), torch.float32)
    model.to_empty(device="cpu")
    for name, part in model.weight_map().items():
        if ".layers.0." not in name or not name.startswith("language_model."):
            part.tensor.copy_(_read(plan, name))
    hidden = list(embed_prompts(model, model_dir, clips))
    layer = model.language.layers[0]
    assert isinstance(layer, DecoderLayer)
    awq_scales = AwqScales()
    layers = config.text.num_hidden_layers
    for i in range(layers):
        prefix = f"language_model.model.layers.{i}."
        for name, part in layer.weight_map(prefix).items():
            part.tensor.copy_(_read(plan, name))
        inputs, hidden = _run(layer, hidden)
        _add_layer_scales(awq_scales, plan, layer, prefix, inputs, scheme)
        logger.info("calibrating layer %d of %d", i + 1, layers)
    return awq_scales


def _read(plan: LoadPlan, name: str) -> Tensor:
    return plan.read_rows(name, range(plan.items[name].weight.shape[0]), torch.float32)


def embed_prompts(model: Pllava, model_dir: str, clips: Sequence[Media]) -> Iterator[Tensor]:
    """The decoder's input [N, hidden] for a question about each clip."""
    config = model.config
    tokenizer = Tokenizer.from_dir(model_dir, config.image_token_index)
    reader = VideoProcessor(config.num_frames, read_preprocessor_config(model_dir, config.vision.image_size))
    conversation = choose_conversation(None, chatml=tokenizer.is_chatml)
    ids = tokenizer.encode_pieces(render(conversation, QUESTION, videos=1))
    expanded, spans = expand_placeholders(ids, config.image_token_index, 1, config.num_video_tokens)
    for clip in clips:
        video = reader.prepare([clip])[0]
        video_embeds = model.pool_frames(model.encode_frames(pixel_values(video)), video.inverse_indices)
        x = model.language.embed(torch.tensor(expanded))
        x[spans[0].start : spans[0].start + spans[0].length] = video_embeds
        yield x


def _run(layer: DecoderLayer, hidden: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Run a decoder layer on the prompt [N, hidden] of each clip.

    Returns sampled inputs [tokens, in] of the layer's matrices by attribute name, and the output for each clip.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
    per_clip = max(1, SAMPLED_TOKENS // len(hidden))

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[Tensor]) -> None:
            x = arguments[0]
            seen[name].append(x[torch.linspace(0, len(x) - 1, min(per_clip, len(x))).long()])

        return hook

    hooks = [getattr(layer, name).register_forward_pre_hook(keep(name)) for name in seen]
    outputs = [forward_layer(layer, x) for x in hidden]
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(samples) for name, samples in seen.items()}, outputs


def forward_layer(layer: DecoderLayer, x: Tensor) -> Tensor:
    """The output [N, hidden] of a decoder layer for one prompt [N, hidden]."""
    tokens = len(x)
    blocks = -(-tokens // KV_BLOCK_SIZE)
    positions = torch.arange(tokens)
    cos, sin = rotary_tables(positions, layer.head_dim, layer.config.rope_theta)
    cache = layer.ops.new_kv_cache(1, blocks, KV_BLOCK_SIZE, layer.kv_heads, layer.head_dim, x.dtype)[0]
    prompt = SequenceBatch.of([tokens], [tokens], torch.arange(blocks)[None])
    nothing = SequenceBatch.of([], [], torch.zeros(0, 0, dtype=torch.int64))
    batch = ForwardBatch(positions, positions, positions, nothing, prompt, positions[-1:])
    out, residual = layer(x, None, cache, layer.ops.prepare(batch, cos, sin))
    total: Tensor = residual + out
    return total


def _add_layer_scales(
    awq_scales: AwqScales,
    plan: LoadPlan,
    layer: DecoderLayer,
    prefix: str,
    inputs: dict[str, Tensor],
    scheme: QuantScheme,
) -> None:
    """Add the scales of one decoder layer, whose tensor names begin with `prefix`, to `awq_scales`."""
    best = {name: _best_scales(x, getattr(layer, name).matrices[0].weight, scheme) for name, x in inputs.items()}
    for norm, norm_weight, matrix in [
        ("input_layernorm", layer.attn_norm, "qkv_proj"),
        ("post_attention_layernorm", layer.mlp_norm, "gate_up_proj"),
    ]:
        name = f"{prefix}{norm}.weight"
        awq_scales.rows[name] = best[matrix]
        # The divided norm is rounded to the stored dtype. The columns get the scale that the rounded norm implies.
        stored = (norm_weight / best[matrix]).to(FLOAT_DTYPES[plan.items[name].weight.dtype]).float()
        scales = torch.where((stored == 0) | (norm_weight == 0), best[matrix], norm_weight / stored)
        for linear in getattr(layer, matrix).sizes:
            awq_scales.columns[f"{prefix}{linear}.weight"] = scales
    awq_scales.rows[f"{prefix}mlp.up_proj.weight"] = best["down_proj"]
    awq_scales.columns[f"{prefix}mlp.down_proj.weight"] = best["down_proj"]
    if layer.heads == layer.kv_heads:
        awq_scales.rows[f"{prefix}self_attn.v_proj.weight"] = best["o_proj"]
        awq_scales.columns[f"{prefix}self_attn.o_proj.weight"] = best["o_proj"]


def _best_scales(x: Tensor, weight: Tensor, scheme: QuantScheme) -> Tensor:
    """The scales [in] with the least rounding error of the product of inputs [tokens, in] and a weight [out, in].

    The candidates are powers of the mean magnitude of each input, as in AWQ. The error is the mean squared difference
    from the float product.
    """
    expected = F.linear(x, weight)
    magnitude = x.abs().mean(0).clamp(min=1e-6)
    best = torch.ones_like(magnitude)
    least_error = float("inf")
    for exponent in EXPONENTS:
        scales = magnitude**exponent
        scales = (scales / (scales.max() * scales.min()).sqrt()).clamp(1e-3, 1e3)
        difference = F.linear(x / scales, scheme.quantise(weight * scales).dequantise()) - expected
        error = float(difference.square().mean())
        if error < least_error:
            best = scales
            least_error = error
    return best
