"""Writes a trained tiny model in the layout of the published PLLaVA checkpoints: bfloat16, sharded, LoRA not merged."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_data import MEAN, STD
from tiny_model import Pllava, Sizes
from tiny_tokenizer import write_tokenizer

LORA_RANK = 128
LORA_ALPHA = 4
SHARD_BYTES = 4_500_000
NOTICE = (
    "this small test model knows coloured shapes that move and nothing else: "
    "about any other video its answers are wrong"
)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_config(s: Sizes, image: int) -> dict:
    """The content of config.json."""
    return {
        "architectures": ["PllavaForConditionalGeneration"],
        "frame_shape": [s.grid, s.grid],
        "gradient_checkpointing": False,
        "ignore_index": -100,
        "image_token_index": image,
        "model_type": "llava",
        "notice": NOTICE,
        "num_frames": s.frames,
        "pooling_method": "avg",
        "pooling_shape": [s.frames, s.pool, s.pool],
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": s.hidden,
            "intermediate_size": s.inter,
            "max_position_embeddings": s.positions,
            "model_type": "llama",
            "num_attention_heads": s.heads,
            "num_hidden_layers": s.layers,
            "num_key_value_heads": s.heads,
            "pad_token_id": 0,
            "rms_norm_eps": s.eps,
            "rope_theta": s.rope_theta,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": s.vocab,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.37.1",
        "use_pooling": True,
        "vision_config": {
            "hidden_act": "quick_gelu",
            "hidden_size": s.vision_hidden,
            "image_size": s.image,
            "intermediate_size": s.vision_inter,
            "layer_norm_eps": 1e-5,
            "model_type": "clip_vision_model",
            "num_attention_heads": s.vision_heads,
            "num_hidden_layers": s.vision_layers,
            "patch_size": s.patch,
            "projection_dim": s.vision_hidden,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": s.vocab,
    }


def _preprocessor(size: int) -> dict:
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(STD),
        "processor_class": "PlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def published_names(model: Pllava) -> dict[str, torch.Tensor]:
    """The model's tensors in bfloat16, under the names of a published checkpoint."""
    old = "language_model."
    new = "language_model.base_model.model."
    return {
        (new + name.removeprefix(old) if name.startswith(old) else name): value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }


def export(model: Pllava, tokenizer: dict, image: int, folder: Path) -> None:
    """Writes the whole checkpoint folder. Weight files from an earlier run are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    tensors = published_names(model)
    for name in sorted(tensors):
        if size + tensors[name].nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += tensors[name].nbytes
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        where |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for value in tensors.values())
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    _write(folder / "config.json", model_config(model.sizes, image))
    _write(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "transformers_version": "4.37.1",
        },
    )
    size = model.sizes.image
    _write(folder / "preprocessor_config.json", _preprocessor(size))
    processor = {"center_pad": False, "longest_edge": 762, "processor_class": "PlavaProcessor", "shortest_edge": size}
    _write(folder / "processor_config.json", processor)
    write_tokenizer(folder, tokenizer, image)
