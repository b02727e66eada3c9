"""An int8 weight that CUDA kernels may read early. No Triton here."""

from dataclasses import dataclass

from atb_pllava.ops.int8 import Int8Weight
from atb_pllava.ops.interface import PackedWeight


@dataclass(frozen=True)
class CompleteInt8Weight(PackedWeight):
    """An int8 weight that the device has finished to write, so that kernels in flight cannot change it.

    A product may load the weight before the kernel in front of the product has ended. symmetric: all zero points are 0.
    """

    weight: Int8Weight
    symmetric: bool

    @classmethod
    def of(cls, weight: Int8Weight) -> "CompleteInt8Weight":
        """Wait until the device has written `weight`. The tensors are shared."""
        symmetric = weight.is_symmetric  # the host waits for the answer, and so for all kernels launched before
        return cls((weight.shape[0], weight.shape[1]), weight, symmetric)
