"""Scales that make a decoder easier to round to 8 bits, found on real clips (AWQ, arXiv 2306.00978).

A column of a weight whose input is large matters more than others; multiplied by s > 1 it gets finer steps, and the
layer before is divided by s, so that the float model stays the same: the norm for q, k, v and for gate, up; up for
down; v for o where every query head has its own values. One decoder layer is in memory at a time, in float32.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from atb_pllava.config import PllavaConfig, PreprocessorConfig
from atb_pllava.loader.checkpoint import DTYPES
from atb_pllava.loader.weight_loader import LoadPlan
from atb_pllava.model.llama import DecoderLayer, rotary_tables
from atb_pllava.model.pllava import Pllava
from atb_pllava.multimodal.processor import Media, VideoProcessor
from atb_pllava.ops.int8 import Int8Weight
from atb_pllava.ops.interface import ForwardBatch, SequenceBatch
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.prompt.chat_template import choose_conversation, render
from atb_pllava.prompt.placeholders import expand_placeholders
from atb_pllava.prompt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

QUESTION = "Describe the video in details."
SAMPLED_ROWS = 512  # tokens of all clips together on which scales are compared
EXPONENTS = [i / 10 for i in range(11)]  # 0 keeps the weight as it is
BLOCK = 128

Rounding = Callable[[Tensor], Int8Weight]


@dataclass(frozen=True)
class Smoothing:
    """Float32 factors by tensor name: columns [in] multiply a weight's columns, rows [out] divide a tensor's rows."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Write a whole file or none."""
        partial = file.with_name(f".{file.name}.partial")
        kinds = {"columns": self.columns, "rows": self.rows}
        save_file({f"{kind}:{name}": t.clone() for kind, found in kinds.items() for name, t in found.items()}, partial)
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> "Smoothing":
        smoothing = cls()
        for key, tensor in load_file(file).items():
            kind, _, name = key.partition(":")
            {"columns": smoothing.columns, "rows": smoothing.rows}[kind][name] = tensor
        return smoothing

    def apply(self, name: str, values: Tensor, rows: range) -> Tensor:
        """The rows `rows` of a tensor, in float32, with its factors; the tensor itself where it has none."""
        if name in self.columns:
            values = values * self.columns[name]
        if name in self.rows:
            divisor = self.rows[name][rows.start : rows.stop]
            values = values / divisor.reshape(-1, *[1] * (values.dim() - 1))
        return values


@torch.no_grad()
def find_smoothing(
    plan: LoadPlan, config: PllavaConfig, model_dir: str, clips: Sequence[Media], rounding: Rounding
) -> Smoothing:
    """The factors for every decoder layer of a checkpoint, from what the float model makes of the clips.

    Of each layer's inputs SAMPLED_ROWS are kept; `rounding` is the quantisation that will be used. Raises what reading
    a clip raises.
    """
    with torch.device("meta"):
        # One decoder layer, which the layers of the checkpoint take turns in.
        model = Pllava(config.with_layers(1), TorchBackend(), torch.float32)
    model.to_empty(device="cpu")
    parts = model.weight_map()
    for name, part in parts.items():
        if ".layers.0." not in name or not name.startswith("language_model."):
            part.tensor.copy_(_read(plan, name))
    hidden = list(_embeddings(model, model_dir, clips))
    layer = model.language.layers[0]
    assert isinstance(layer, DecoderLayer)
    smoothing = Smoothing()
    layers = config.text.num_hidden_layers
    for i in range(layers):
        prefix = f"language_model.model.layers.{i}."
        for name, part in layer.weight_map(prefix).items():
            part.tensor.copy_(_read(plan, name))
        inputs, hidden = _run(layer, hidden)
        _smooth_layer(smoothing, plan, layer, prefix, inputs, rounding)
        logger.info("calibrating layer %d of %d", i + 1, layers)
    return smoothing


def _read(plan: LoadPlan, name: str) -> Tensor:
    return plan.read_rows(name, range(plan.items[name].weight.shape[0]), torch.float32)


def _embeddings(model: Pllava, model_dir: str, clips: Sequence[Media]) -> Iterator[Tensor]:
    """What enters the decoder for a question about each clip: [N, hidden]."""
    config = model.config
    tokenizer = Tokenizer.from_dir(model_dir, config.image_token_index)
    reader = VideoProcessor(config.num_frames, PreprocessorConfig.from_dir(model_dir, config.vision.image_size))
    conversation = choose_conversation(None, chatml=tokenizer.is_chatml)
    ids = tokenizer.encode_pieces(render(conversation, QUESTION, videos=1))
    expanded, spans = expand_placeholders(ids, config.image_token_index, 1, config.num_video_tokens)
    for clip in clips:
        video = reader.prepare([clip])[0]
        tokens = model.pool_frames(model.encode_frames(video.pixels), video.inverse_indices)
        x = model.language.embed(torch.tensor(expanded))
        x[spans[0].start : spans[0].start + spans[0].length] = tokens
        yield x


def _run(layer: DecoderLayer, hidden: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Sampled inputs [rows, in] of the layer's matrices by attribute name, and the layer's output for each clip."""
    seen: dict[str, list[Tensor]] = {name: [] for name in ("qkv", "out", "gate_up", "down")}
    per_clip = max(1, SAMPLED_ROWS // len(hidden))

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[Tensor]) -> None:
            x = arguments[0]
            seen[name].append(x[torch.linspace(0, len(x) - 1, min(per_clip, len(x))).long()])

        return hook

    hooks = [getattr(layer, name).register_forward_pre_hook(keep(name)) for name in seen]
    outputs = [_forward(layer, x) for x in hidden]
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}, outputs


def _forward(layer: DecoderLayer, x: Tensor) -> Tensor:
    """One prompt [N, hidden] through one layer."""
    tokens, blocks = len(x), -(-len(x) // BLOCK)
    positions = torch.arange(tokens)
    cos, sin = rotary_tables(positions, layer.head_dim, layer.config.rope_theta)
    cache = layer.ops.new_kv_cache(1, blocks, BLOCK, layer.kv_heads, layer.head_dim, x.dtype)[0]
    prompt = SequenceBatch((0, tokens), (tokens,), torch.arange(blocks)[None])
    nothing = SequenceBatch((0,), (), torch.zeros(0, 0, dtype=torch.int64))
    batch = ForwardBatch(positions, positions, positions, nothing, prompt, positions[-1:])
    out: Tensor = layer(x, cos, sin, cache, batch)
    return out


def _smooth_layer(
    smoothing: Smoothing,
    plan: LoadPlan,
    layer: DecoderLayer,
    prefix: str,
    inputs: dict[str, Tensor],
    rounding: Rounding,
) -> None:
    """Add the factors of one decoder layer to `smoothing`."""
    best = {name: _best_factors(x, getattr(layer, name).weights[0], rounding) for name, x in inputs.items()}
    for norm, norm_weight, matrix in [
        ("input_layernorm", layer.attn_norm, "qkv"),
        ("post_attention_layernorm", layer.mlp_norm, "gate_up"),
    ]:
        name = f"{prefix}{norm}.weight"
        smoothing.rows[name] = best[matrix]
        # The norm is stored in few bits: the weight takes the factor that its rounded norm leaves.
        stored = (norm_weight / best[matrix]).to(DTYPES[plan.items[name].weight.dtype]).float()
        factors = torch.where((stored == 0) | (norm_weight == 0), best[matrix], norm_weight / stored)
        for linear in getattr(layer, matrix).rows:
            smoothing.columns[f"{prefix}{linear}.weight"] = factors
    smoothing.rows[f"{prefix}mlp.up_proj.weight"] = best["down"]
    smoothing.columns[f"{prefix}mlp.down_proj.weight"] = best["down"]
    if layer.heads == layer.kv_heads:
        smoothing.rows[f"{prefix}self_attn.v_proj.weight"] = best["out"]
        smoothing.columns[f"{prefix}self_attn.o_proj.weight"] = best["out"]


def _best_factors(x: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
    """Factors [in] for which inputs [rows, in] times the rounded weight [out, in] come closest to the float product.

    Candidates are powers of the mean size of each input, as in AWQ.
    """
    expected = F.linear(x, weight)
    size = x.abs().mean(0).clamp(min=1e-6)
    best, least = torch.ones_like(size), float("inf")
    for exponent in EXPONENTS:
        factors = size**exponent
        factors = (factors / (factors.max() * factors.min()).sqrt()).clamp(1e-3, 1e3)
        error = F.linear(x / factors, rounding(weight * factors).dequantise()) - expected
        if (loss := float(error.square().mean())) < least:
            best, least = factors, loss
    return best
