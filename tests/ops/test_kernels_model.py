"""A whole model on the compiled CPU kernels: the same answers as plain torch, and packing of its weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from atb_pllava import LLM, SamplingParams
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.loader.model_loader import fill_model, plan_model
from atb_pllava.loader.model_options import LOAD_FORMATS, ModelOptions
from atb_pllava.model.linear import PackedLinear, pack_weights
from tests.support import assert_near, random_tensor

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_answers_do_not_depend_on_the_kernels(checkpoint: Path, media: Path, kv_cache_dtype: str) -> None:
    requests = [{"question": "What is this?", "video": str(media / "clip2.mp4")}, {"prompt": "USER: hello " * 20}]
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=-1)
    options = {"dtype": "float32", "backend": "cpu", "kv_cache_dtype": kv_cache_dtype, "block_size": 16}
    plain = LLM(checkpoint, kernels="torch", **options)
    fast = LLM(checkpoint, kernels="native", prefill_chunk=7, **options)
    tolerance = 2e-5 if kv_cache_dtype == "auto" else 2e-3  # rounding to 8 bits makes small differences larger
    for one, other in zip(plain.generate(requests, params), fast.generate(requests, params), strict=True):
        assert one.token_ids == other.token_ids
        expected, result = (torch.from_numpy(np.stack(answer.logprobs)) for answer in (one, other))
        assert_near(result, expected, tolerance)


def test_packed_weights_replace_the_loaded_ones(checkpoint: Path) -> None:
    model = LLM(checkpoint, kernels="native", dtype="bfloat16").model
    left = {name for name, tensor in model.state_dict().items() if tensor.dim() == 2}
    assert left == {"vision.position_embedding", "language.embedding"}


@pytest.mark.parametrize("load_format", LOAD_FORMATS)
def test_each_layer_is_packed_when_it_is_loaded(checkpoint: Path, load_format: str) -> None:
    options = ModelOptions(str(checkpoint), backend="cpu", dtype="float32", load_format=load_format)
    model, plan = plan_model(options, TensorParallel())
    layers = [*model.vision.layers_by_prefix().values(), *model.language.layers_by_prefix().values()]
    counts = []

    def count() -> None:
        counts.append(sum(any(isinstance(part, PackedLinear) for part in layer.modules()) for layer in layers))

    fill_model(model, plan, count, pack=True)
    assert counts[0] == 0 and sorted(set(counts)) == list(range(len(layers) + 1))
    whole = fill_model(*plan_model(options, TensorParallel()))
    pack_weights(whole)
    pixels = random_tensor(2, 3, *[model.config.vision.image_size] * 2)
    assert torch.equal(model.encode_frames(pixels), whole.encode_frames(pixels))
