"""The published models: their names on the Hugging Face Hub, and the sizes in their config.json.

Nothing is downloaded. Benchmarks without a checkpoint use the sizes. `doctor` uses the sizes before a download.
"""

from typing import Any

LORA_RANK = 128

_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def sizes_json(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **text: Any
) -> dict[str, Any]:
    """The contents of a config.json with PLLaVA's vision tower, frames and pooling. text: more keys of text_config."""
    return {
        "model_type": "llava",
        "torch_dtype": "bfloat16",
        "num_frames": 16,
        "pooling_shape": [16, 12, 12],
        "image_token_index": 32000 if vocab < 64000 else 64002,
        "vision_config": _CLIP_L_336,
        "text_config": {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            **text,
        },
    }


PUBLISHED = {
    "7b": sizes_json(4096, 11008, 32, 32, 32, 32064),
    "13b": sizes_json(5120, 13824, 40, 40, 40, 32064),
    "34b": sizes_json(7168, 20480, 60, 56, 8, 64064, rope_theta=5e6),
}


def published_size(name: str) -> str | None:
    """The size in a model's name: "7b" for `ermu2001/pllava-7b` and for any path or URL that ends in `pllava-7b`.

    None for names of other models.
    """
    last = name.rstrip("/").rpartition("/")[2].lower()
    size = last.removeprefix("pllava-")
    return size if size != last and size in PUBLISHED else None
