"""Rotation of queries and keys by torch_npu's operators, in the dtype of the model.

cos and sin are computed in float32 and rounded to the model's dtype, as transformers' LlamaRotaryEmbedding does.
npu_apply_rotary_pos_emb multiplies and adds float16 in float16, and bfloat16 in float32. Source:
op_kernel/apply_rotary_pos_emb_small.h of CANN's ops-transformer.

A component of a rotated pair of length r so differs from the exact rotation by at most 3 u r in float16, and by at
most 2 u r in bfloat16. u is the dtype's rounding, 2^-11 and 2^-8. A rotation in float32 differs by at most u r, and
takes 4 operators more, which cast queries and keys. `tests/ascend/test_rotary.py` measures against float64.
"""

import torch
from torch import Tensor

_HEAD_DIM = 128  # aclnnApplyRotaryPosEmb of CANN 8 takes no other. Its later documents add 64, which no PLLaVA has
_MOST_HEADS = 255  # queries' and keys' heads together are the 8-bit repeat count of the kernel's products


class RotaryTables:
    """The rotary tables of a step in the form of the operators. The first layer makes them for all layers.

    cos, sin: [N, D / 2] float32.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._cos = cos
        self._sin = sin
        self._made: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def of(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [1, N, 1, D] of layout BSND in `dtype`. Both halves of D have the same angles."""
        if dtype not in self._made:
            halves = torch.cat((self._cos, self._sin)).to(dtype)
            cos, sin = torch.cat((halves, halves), dim=-1)[None, :, None].chunk(2, dim=1)
            self._made[dtype] = (cos, sin)
        return self._made[dtype]


def fits_one_call(query: Tensor, keys: Tensor, unified_buffer: int) -> bool:
    """Whether npu_apply_rotary_pos_emb can rotate query [N, H, D] and keys [N, K, D].

    unified_buffer: bytes of a vector core's memory, which must hold all heads of a token. The formula is that of
    aclnnApplyRotaryPosEmb's document. The kernel computes bfloat16 in float32, and float16 in float16.
    """
    dim = query.shape[2]
    heads = query.shape[1] + keys.shape[1]
    is_cast = query.dtype == torch.bfloat16
    computed = 4 if is_cast else query.element_size()
    tables = 4 * dim * query.element_size() + (2 * dim * computed if is_cast else 0)
    return dim == _HEAD_DIM and heads <= _MOST_HEADS and 5 * heads * dim * computed + tables <= unified_buffer
