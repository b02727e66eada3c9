"""PLLaVA in plain torch, small enough to train on a CPU, with the parameter names of the published checkpoints.

Training packs several questions about one video into a row. The prefix with the video is computed once. Every question
attends to the prefix and to itself, not to other questions, at the positions of a prompt of its own.
`B` clips, `P` prefix tokens, `Q` tokens of questions.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model. Lengths are in pixels, patches or tokens."""

    image: int = 112
    patch: int = 14
    frames: int = 16
    pool: int = 4
    vision_hidden: int = 128
    vision_inter: int = 384
    vision_heads: int = 4
    vision_layers: int = 4
    hidden: int = 256
    inter: int = 512
    layers: int = 4
    heads: int = 8
    vocab: int = 1024
    positions: int = 4096
    rope_theta: float = 10000.0
    eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Patches per side of a frame."""
        return self.image // self.patch

    @property
    def video_tokens(self) -> int:
        """Number of tokens that replace <image>."""
        return self.frames * self.pool * self.pool


def _cosines(count: int, patch: int) -> Tensor:
    """The smoothest `count` cosine patterns of a patch, [count, 3, patch, patch].

    Three fifths of the patterns are in brightness, the others in two opponent colours.
    """
    line = torch.arange(patch) + 0.5
    waves = torch.stack([torch.cos(math.pi / patch * k * line) for k in range(patch)])
    waves = waves / waves.norm(dim=1, keepdim=True)
    order = sorted((a * a + b * b, a, b) for a in range(patch) for b in range(patch))
    mixes = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
    mixes = mixes / mixes.norm(dim=1, keepdim=True)
    colour = count // 5
    out = []
    for mix, number in zip(mixes, (count - 2 * colour, colour, colour), strict=True):
        out += [mix[:, None, None] * torch.outer(waves[a], waves[b]) for _, a, b in order[:number]]
    return torch.stack(out)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, **options: Tensor | bool) -> Tensor:
    """Softmax attention in float32 of [batch, heads, length, size], to [batch, length, heads * size]."""
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    return out.transpose(1, 2).flatten(2).to(q.dtype)


class VisionAttention(nn.Module):
    """Self-attention of a CLIP layer."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.heads = s.vision_heads
        self.q_proj = nn.Linear(s.vision_hidden, s.vision_hidden)
        self.k_proj = nn.Linear(s.vision_hidden, s.vision_hidden)
        self.v_proj = nn.Linear(s.vision_hidden, s.vision_hidden)
        self.out_proj = nn.Linear(s.vision_hidden, s.vision_hidden)

    def forward(self, x: Tensor) -> Tensor:
        q = _heads(self.q_proj(x), self.heads)
        k = _heads(self.k_proj(x), self.heads)
        v = _heads(self.v_proj(x), self.heads)
        return self.out_proj(_attend(q, k, v))


class VisionMlp(nn.Module):
    """Feed-forward part of a CLIP layer, with quick GELU."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(s.vision_hidden, s.vision_inter)
        self.fc2 = nn.Linear(s.vision_inter, s.vision_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionLayer(nn.Module):
    """One CLIP layer, with a layer norm before attention and before the feed-forward part."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.self_attn = VisionAttention(s)
        self.mlp = VisionMlp(s)
        self.layer_norm1 = nn.LayerNorm(s.vision_hidden, eps=1e-5)
        self.layer_norm2 = nn.LayerNorm(s.vision_hidden, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionModel(nn.Module):
    """CLIP vision transformer up to hidden_states[-2]. The last layer and post_layernorm are stored but not used."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.patch = s.patch
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.randn(s.vision_hidden) * 0.02)
        self.embeddings.patch_embedding = nn.Conv2d(3, s.vision_hidden, s.patch, s.patch, bias=False)
        self.embeddings.position_embedding = nn.Embedding(s.grid**2 + 1, s.vision_hidden)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.2)
        self.pre_layrnorm = nn.LayerNorm(s.vision_hidden, eps=1e-5)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(s) for _ in range(s.vision_layers))
        self.post_layernorm = nn.LayerNorm(s.vision_hidden, eps=1e-5)

    def forward(self, pixels: Tensor, early: list[Tensor] | None = None) -> Tensor:
        """Pixels float [frames, 3, image, image] to patches [frames, grid^2, vision_hidden].

        The output of each layer is appended to `early`.
        """
        p = self.patch
        grid = pixels.shape[-1] // self.patch
        patches = pixels.unflatten(3, (grid, p)).unflatten(2, (grid, p))  # n c gy py gx px
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = F.linear(patches, self.embeddings.patch_embedding.weight.flatten(1))
        first = self.embeddings.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + self.embeddings.position_embedding.weight
        x = self.pre_layrnorm(x)
        for layer in self.encoder.layers[:-1]:
            x = layer(x)
            if early is not None:
                early.append(x[:, 1:])
        return x[:, 1:]


class RMSNorm(nn.Module):
    """LLaMA's RMS normalisation, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in LLaMA's layout (halves, not pairs)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class LlamaAttention(nn.Module):
    """The projections of LLaMA's self-attention."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.heads = s.heads
        self.q_proj = nn.Linear(s.hidden, s.hidden, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.hidden, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.hidden, bias=False)
        self.o_proj = nn.Linear(s.hidden, s.hidden, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys, and values, each [batch, heads, length, size]."""
        q = _heads(self.q_proj(x), self.heads)
        k = _heads(self.k_proj(x), self.heads)
        v = _heads(self.v_proj(x), self.heads)
        return rotate(q.float(), *rope), rotate(k.float(), *rope), v.float()


class LlamaMlp(nn.Module):
    """Feed-forward part of a LLaMA layer."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.inter, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.inter, bias=False)
        self.down_proj = nn.Linear(s.inter, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    """One LLaMA layer."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(s)
        self.mlp = LlamaMlp(s)
        self.input_layernorm = RMSNorm(s.hidden, s.eps)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.eps)

    def forward(self, p: Tensor, q: Tensor, rope_p: tuple, rope_q: tuple, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix p [B, P, hidden], questions q [B, Q, hidden], mask [B, 1, Q, P + Q] (True: may attend).

        The prefix attends to itself causally. The questions attend to prefix and questions as the mask says.
        """
        attn = self.self_attn
        qp, kp, vp = attn.project(self.input_layernorm(p), rope_p)
        qq, kq, vq = attn.project(self.input_layernorm(q), rope_q)
        p = p + attn.o_proj(_attend(qp, kp, vp, is_causal=True))
        q = q + attn.o_proj(_attend(qq, torch.cat([kp, kq], 2), torch.cat([vp, vq], 2), attn_mask=mask))
        return p + self.mlp(self.post_attention_layernorm(p)), q + self.mlp(self.post_attention_layernorm(q))


class LlamaModel(nn.Module):
    """Embeddings and layers of a LLaMA decoder."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(LlamaLayer(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.hidden, s.eps)


class LlamaForCausalLM(nn.Module):
    """LLaMA decoder with its output head."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.model = LlamaModel(s)
        self.lm_head = nn.Linear(s.hidden, s.vocab, bias=False)
        size = s.hidden // s.heads
        inverse = s.rope_theta ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.arange(s.positions).float()[:, None] * inverse.repeat(2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, p: Tensor, q: Tensor, places: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states of prefix and questions after every layer. `places` [B, Q] are the questions' positions."""
        rope_p = (self.cos[: p.shape[1]], self.sin[: p.shape[1]])
        rope_q = (self.cos[places][:, None], self.sin[places][:, None])
        prefix = []
        questions = []
        for layer in self.model.layers:
            p, q = layer(p, q, rope_p, rope_q, mask)
            prefix.append(p)
            questions.append(q)
        return prefix, questions


class Projector(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(s.vision_hidden, s.hidden)
        self.linear_2 = nn.Linear(s.hidden, s.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Lora(nn.Module):
    """A linear layer with a LoRA adapter, under PEFT's names.

    The adapter starts as the strongest `rank` directions of the weight, which are taken out of the frozen base (PiSSA).
    The base plus `scale` times the adapter is at first the original weight.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = scale
        self.lora_A = nn.Module()
        self.lora_B = nn.Module()
        self.lora_A.default = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B.default = nn.Linear(rank, base.out_features, bias=False)
        with torch.no_grad():
            u, sigma, v = torch.linalg.svd(base.weight, full_matrices=False)
            root = (sigma[:rank] / scale).sqrt()
            self.lora_A.default.weight.copy_(root[:, None] * v[:rank])
            self.lora_B.default.weight.copy_(u[:, :rank] * root)
            base.weight -= scale * self.lora_B.default.weight @ self.lora_A.default.weight
        base.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scale * self.lora_B.default(self.lora_A.default(x))


class Pllava(nn.Module):
    """Vision tower, projector, pooling and decoder."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.sizes = s
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = VisionModel(s)
        self.multi_modal_projector = Projector(s)
        self.language_model = LlamaForCausalLM(s)

    def initialise(self) -> None:
        """Sets normal weights, smaller ones where a layer adds to the residual stream, and cosine patch embeddings."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
                if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
                    weight.data.mul_(0.35)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        patches = self.vision_tower.vision_model.embeddings.patch_embedding.weight
        patches.data.copy_(_cosines(len(patches), self.sizes.patch))
        nn.init.normal_(self.language_model.model.embed_tokens.weight, std=0.5)
        nn.init.normal_(self.language_model.lm_head.weight, std=0.02)

    def add_lora(self, rank: int, scale: float) -> None:
        """Freezes the decoder and gives q_proj and v_proj of every layer a trainable LoRA adapter."""
        self.language_model.requires_grad_(False)
        for layer in self.language_model.model.layers:
            layer.self_attn.q_proj = Lora(layer.self_attn.q_proj, rank, scale)
            layer.self_attn.v_proj = Lora(layer.self_attn.v_proj, rank, scale)

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Pixels float [B, T, 3, image, image] to video embeddings [B, T * pool^2, hidden]."""
        s = self.sizes
        x = self.multi_modal_projector(self.vision_tower.vision_model(pixels.flatten(0, 1)))
        x = x.unflatten(1, (s.grid, s.grid)).permute(0, 3, 1, 2).float()
        x = F.adaptive_avg_pool2d(x, s.pool).flatten(2).transpose(1, 2)
        return x.unflatten(0, (-1, s.frames)).flatten(1, 2)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [..., hidden] of ids."""
        return self.language_model.model.embed_tokens(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of the last layer's hidden states."""
        return self.language_model.lm_head(self.language_model.model.norm(hidden))
