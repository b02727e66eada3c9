"""Dummy weights of real sizes: the same on every number of ranks, the right types, refused if they do not fit."""

import pytest
import torch

from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.errors import ConfigError
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.loader.dummy_weights import dummy_quant_config, plan_dummy_weights
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.int8 import QuantConfig
from atb_pllava.ops.reference import TorchBackend
from tests.support import load_all, raw_config

CONFIG = config_from_json(raw_config(intermediate_size=97, vocab_size=305))


def parts(parallel: TensorParallel, int8: bool = False):
    layers = dummy_quant_config(CONFIG) if int8 else QuantConfig()
    with torch.device("meta"):
        model = Pllava(CONFIG, TorchBackend(), torch.bfloat16, parallel, layers)
    model.to_empty(device="cpu")
    found = model.weight_map()
    load_all(plan_dummy_weights(found, parallel.size, 2**30), found)
    return found


@pytest.mark.parametrize("int8", [False, True])
def test_ranks_hold_slices_of_the_same_weights(int8: bool) -> None:
    whole = parts(TensorParallel(), int8)
    for rank in range(2):
        for name, part in parts(TensorParallel(rank, 2), int8).items():
            assert torch.equal(part.tensor, whole[name].tensor[part.span]), name


def test_values_keep_activations_around_1() -> None:
    for name, part in parts(TensorParallel(), int8=True).items():
        values = part.tensor.float()
        assert values.isfinite().all()
        if part.tensor.dtype == torch.int8:
            values = values * parts_scale(name)
        if part.tensor.dim() > 1 and not name.endswith(("_scale", "_offset")):
            gain = values.std() * values[0].numel() ** 0.5
            assert 0.8 < gain < 1.25, name


def parts_scale(name: str) -> torch.Tensor:
    return parts(TensorParallel(), int8=True)[f"{name}_scale"].tensor.float()


def test_tensors_differ_and_the_decoder_is_int8() -> None:
    found = parts(TensorParallel(), int8=True)
    first, second = (found[f"language_model.model.layers.{i}.mlp.up_proj.weight"].tensor for i in range(2))
    assert first.dtype == torch.int8 and not torch.equal(first, second)
    assert found["language_model.lm_head.weight"].tensor.dtype == torch.bfloat16
    assert not found["language_model.model.layers.0.mlp.up_proj.weight_offset"].tensor.any()


def test_what_does_not_fit_is_refused() -> None:
    with torch.device("meta"):
        model = Pllava(CONFIG, TorchBackend(), torch.bfloat16)
    found = model.weight_map()
    size = sum(part.tensor.nbytes for part in found.values())
    assert plan_dummy_weights(found, 1, size).bytes_total == size
    with pytest.raises(ConfigError, match="smaller shape"):
        plan_dummy_weights(found, 2, 2 * size - 1)
