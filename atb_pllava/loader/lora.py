"""LoRA: the scale of a checkpoint's LoRA, and the merge of a LoRA into a weight.

`header_checks.py` pairs the tensors lora_A and lora_B. `adapter_config.py` reads PEFT's settings.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from atb_pllava.loader.adapter_config import AdapterConfig, LoraScale, plain_scale

logger = logging.getLogger(__name__)


def find_lora_scale(ranks: Sequence[int], adapter: AdapterConfig | None, lora_alpha: float | None) -> LoraScale | None:
    """The scale of LoRA tensors with these ranks. None if there are no LoRA tensors.

    `adapter` is the adapter_config.json beside the tensors, None without one. `lora_alpha` is the user's alpha, None
    without one. Raises ConfigError as `AdapterConfig.scale` does.
    """
    if not ranks:
        if lora_alpha is not None:
            logger.debug("the checkpoint has no LoRA: alpha=%g has no effect", lora_alpha)
        return None
    return plain_scale(ranks[0], lora_alpha) if adapter is None else adapter.scale(ranks[0], lora_alpha)


def merge_lora(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B @ A in float32, for W [out, in] of any float dtype, A [r, in] and B [out, r] in float32.

    The caller rounds the sum once, to the dtype of the model.
    """
    return torch.addmm(weight.float(), b, a, alpha=scale)
