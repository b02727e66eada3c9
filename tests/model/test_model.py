"""Vision tower and decoder against transformers' CLIP and LLaMA with the same random weights."""

import pytest
import torch
from torch.testing import assert_close

from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.forward_batch import ForwardBatch, SequenceBatch
from atb_pllava.ops.reference import TorchBackend
from tests.support import random_model, raw_config

transformers = pytest.importorskip("transformers")


def views(model: Pllava) -> dict[str, torch.Tensor]:
    return {name: part.tensor for name, part in model.weight_map().items()}


def fill(module: torch.nn.Module, views: dict[str, torch.Tensor], prefix: str) -> None:
    """Give a transformers module our weights. Every parameter of the module must be among our weights."""
    state = {name.removeprefix(prefix): view for name, view in views.items() if name.startswith(prefix)}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("post_layernorm" in name or "position_ids" in name or "layers.2." in name for name in missing), missing


def whole_prompt(model: Pllava, ids: list[int], block_size: int) -> torch.Tensor:
    """Logits of every position from one prefill."""
    count = len(ids)
    text = model.config.text
    blocks = -(-count // block_size)
    cache = model.ops.new_kv_cache(
        text.num_hidden_layers, blocks, block_size, text.num_key_value_heads, text.head_dim, model.dtype
    )
    rows = torch.arange(count)
    nobody = SequenceBatch.of([], [], torch.zeros(0, 0, dtype=torch.int64))
    prefill = SequenceBatch.of([count], [count], torch.arange(blocks)[None])
    return model(ForwardBatch(torch.tensor(ids), rows, rows, nobody, prefill, rows), cache)


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 128},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "rope_theta": 5e6},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "intermediate_size": 100},
        {"head_dim": 32, "rms_norm_eps": 1e-6},
    ],
)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 130])
@torch.inference_mode()
def test_decoder_equals_transformers(text: dict, length: int) -> None:
    model = random_model(config_from_json(raw_config(**text)))
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**raw_config(**text)["text_config"], "attn_implementation": "eager"})
    ).eval()
    fill(theirs, views(model), "language_model.")
    ids = torch.randint(0, 304, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    assert_close(whole_prompt(model, ids, 16), theirs(torch.tensor([ids])).logits[0], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.inference_mode()
def test_vision_tower_equals_transformers(act: str) -> None:
    raw = raw_config()
    raw["vision_config"]["hidden_act"] = act
    model = random_model(config_from_json(raw))
    config = transformers.CLIPVisionConfig(**raw["vision_config"])
    theirs = transformers.CLIPVisionModel(config).eval()
    prefix = "vision_tower."
    if not any(name.startswith("vision_model.") for name, _ in theirs.named_parameters()):
        prefix += "vision_model."  # newer releases dropped one level
    fill(theirs, views(model), prefix)
    pixels = torch.randn(3, 3, 56, 56)
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert_close(model.vision(pixels), expected, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_a_repeated_frame_is_encoded_once() -> None:
    model = random_model(config_from_json(raw_config()))
    pixels = torch.randn(2, 3, 56, 56)
    inverse_indices = [0, 0, 1, 1]
    once = model.pool_frames(model.encode_frames(pixels), inverse_indices)
    assert_close(once, model.pool_frames(model.encode_frames(pixels[inverse_indices]), range(4)), atol=1e-5, rtol=1e-4)


def test_the_meta_device_needs_no_memory() -> None:
    big = raw_config(
        hidden_size=7168,
        intermediate_size=20480,
        num_hidden_layers=60,
        num_attention_heads=56,
        num_key_value_heads=8,
        vocab_size=64064,
    )
    with torch.device("meta"):
        model = Pllava(config_from_json(big), TorchBackend(), torch.bfloat16)
    assert sum(view.numel() for view in views(model).values()) > 33e9
