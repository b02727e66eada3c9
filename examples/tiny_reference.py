"""Answers of an exported tiny checkpoint by transformers. Neither tiny_model.py nor atb_pllava computes them."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from evaluate_tiny_pllava import Answerer
from PIL import Image
from render_shapes import sample_indices
from safetensors.torch import load_file
from tiny_data import decode, normalise, preprocess
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

LORA_ALPHA = 4


def merged(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Tensors in float32 under names without LoRA, with the LoRA weights merged at `alpha`."""
    plain = {k.replace("base_model.model.", "").replace(".base_layer", ""): v.float() for k, v in tensors.items()}
    for name in [key for key in plain if key.endswith("lora_A.default.weight")]:
        stem = name.removesuffix("lora_A.default.weight")
        a = plain.pop(name)
        b = plain.pop(f"{stem}lora_B.default.weight")
        plain[f"{stem}weight"] = plain[f"{stem}weight"] + alpha / len(a) * b @ a
    return plain


class Reference:
    """A checkpoint folder loaded into the classes of transformers."""

    def __init__(self, folder: Path, alpha: float = LORA_ALPHA) -> None:
        config = json.loads((folder / "config.json").read_bytes())
        tensors: dict[str, Tensor] = {}
        for path in sorted(folder.glob("model-0*.safetensors")):
            tensors |= load_file(path)
        plain = merged(tensors, alpha)
        self.config = config
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.image = config["image_token_index"]
        self.size = config["vision_config"]["image_size"]
        self.tower = CLIPVisionModel(CLIPVisionConfig(**config["vision_config"])).eval()
        self.llama = LlamaForCausalLM(LlamaConfig(**{**config["text_config"], "torch_dtype": "float32"})).eval()
        self.projector = {k.removeprefix("multi_modal_projector."): v for k, v in plain.items() if "projector" in k}
        own = self.tower.state_dict()
        prefix = "" if next(iter(own)).startswith("vision_model.") else "vision_model."
        self.tower.load_state_dict({k: plain[f"vision_tower.{prefix}{k}"] for k in own if "position_ids" not in k})
        self.llama.load_state_dict({k: plain[f"language_model.{k}"] for k in self.llama.state_dict()})

    @torch.no_grad()
    def video_embeds(self, frames: np.ndarray) -> Tensor:
        """The embeddings of a video: frames uint8 [16, size, size, 3] to [tokens, hidden]."""
        hidden = self.tower(normalise(frames), output_hidden_states=True).hidden_states[-2][:, 1:]
        p = self.projector
        x = F.gelu(F.linear(hidden, p["linear_1.weight"], p["linear_1.bias"]))
        x = F.linear(x, p["linear_2.weight"], p["linear_2.bias"])
        x = x.unflatten(1, tuple(self.config["frame_shape"])).permute(3, 0, 1, 2)[None]
        return F.adaptive_avg_pool3d(x, self.config["pooling_shape"])[0].flatten(1).T

    def embed(self, prompt: str, video: Tensor | None) -> Tensor:
        """Input embeddings [1, length, hidden] of a prompt with at most one <image>."""
        ids = self.tokenizer.encode(prompt).ids
        table = self.llama.get_input_embeddings()
        if video is None:
            return table(torch.tensor([ids]))
        at = ids.index(self.image)
        return torch.cat([table(torch.tensor(ids[:at])), video, table(torch.tensor(ids[at + 1 :]))])[None]

    @torch.no_grad()
    def generate(self, prompts: list[str], videos: list[Tensor | None], tokens: int) -> list[str]:
        """Greedy answers to prompts of any length, as texts."""
        inputs = [self.embed(prompt, video)[0] for prompt, video in zip(prompts, videos, strict=True)]
        longest = max(len(x) for x in inputs)
        padded = torch.stack([F.pad(x, (0, 0, longest - len(x), 0)) for x in inputs])
        mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in inputs])
        out = self.llama.generate(
            inputs_embeds=padded,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=2,
        )
        texts = []
        for prompt, ids in zip(prompts, out.tolist(), strict=True):
            ids = ids[: ids.index(2)] if 2 in ids else ids
            asked = self.tokenizer.encode(prompt).ids
            whole = self.tokenizer.decode(asked + ids, skip_special_tokens=False)
            before = self.tokenizer.decode(asked, skip_special_tokens=False)
            texts.append(whole[len(before) :])
        return texts


def reference(folder: Path, alpha: float = LORA_ALPHA, batch: int = 32) -> Answerer:
    """A function that answers with transformers, for evaluate_tiny_pllava.evaluate."""
    model = Reference(folder, alpha)
    seen: dict[str, Tensor] = {}

    def look(request: dict) -> Tensor:
        if "frames" in request:
            return model.video_embeds(np.stack([preprocess(Image.fromarray(x), model.size) for x in request["frames"]]))
        path = request["video"]
        if path not in seen:
            frames = decode(path)
            picked = [preprocess(frames[k], model.size) for k in sample_indices(len(frames))]
            seen[path] = model.video_embeds(np.stack(picked))
        return seen[path]

    def answer(requests: list[dict], tokens: int) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(requests), batch):
            part = requests[start : start + batch]
            texts += model.generate([r["prompt"] for r in part], [look(r) for r in part], tokens)
        return texts

    return answer
