"""msModelSlim as the quantizer, one decoder layer at a time.

The package msmodelslim (github.com/Ascend/msit, `pip install msmodelslim transformers`) is optional and imported here
only. msModelSlim quantises whole models of transformers, so each decoder layer is put into a LLaMA of one layer. The
memory needed is a few times that of a layer in float32.
"""

import contextlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from atb_pllava.config import TextConfig
from atb_pllava.errors import ConfigError
from atb_pllava.ops.int8 import Int8Weight

_LAYER = "model.layers.0."


class MsModelSlim:
    """Quantises decoder layers of one model. Raises ConfigError if msmodelslim or transformers cannot be imported."""

    def __init__(self, config: TextConfig, *, symmetric: bool, group_size: int) -> None:
        try:
            import transformers
            from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
        except ImportError as error:
            raise ConfigError(
                f"-quantizer msmodelslim cannot be used here ({error}); run `pip install msmodelslim transformers`, or "
                "leave the option out: the builtin quantizer writes the same files"
            ) from None
        self.group_size = group_size
        self._model_class = transformers.LlamaForCausalLM
        self._calibrator = Calibrator
        self._model_config = transformers.LlamaConfig(
            vocab_size=8,
            num_hidden_layers=1,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )
        options: dict[str, Any] = {"act_method": 3}
        if group_size:
            options = {"act_method": 1, "is_lowbit": True, "open_outlier": False, "group_size": group_size}
        self._options = QuantConfig(
            w_bit=8, a_bit=16, dev_type="cpu", w_sym=symmetric, mm_tensor=False, disable_names=["lm_head"], **options
        )

    def quantise_layer(self, weights: Mapping[str, Tensor]) -> dict[str, Int8Weight]:
        """The int8 weights for the float32 weights [out, in] of one layer's linears, by their names below the layer."""
        # The package prints to stdout, which is for results: its lines go to stderr.
        with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as directory:
            model = self._model_class(self._model_config).eval().to(torch.float32)
            missing, unexpected = model.load_state_dict({_LAYER + n: w for n, w in weights.items()}, strict=False)
            assert not unexpected and not any("_proj" in name for name in missing), (missing, unexpected)
            model.config._name_or_path = directory
            calibrator = self._calibrator(model, self._options, calib_data=[], disable_level="L0")
            calibrator.run()
            calibrator.save(directory, save_type=["ascendV1"])
            files = Path(directory).glob("[!.]*.safetensors")
            stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
        return {name: self._weight(stored, _LAYER + name) for name in weights}

    def _weight(self, stored: Mapping[str, Tensor], name: str) -> Int8Weight:
        rows = len(stored[name])
        scale = stored[f"{name}_scale"].float().reshape(rows, -1)
        offset = stored[f"{name}_offset"].float().reshape(rows, -1)
        return Int8Weight(stored[name], scale, offset, self.group_size)
