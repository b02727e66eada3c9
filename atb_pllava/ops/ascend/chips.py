"""The table of differences between Ascend chips. `ops.ascend.backend` reads the table. torch_npu is not imported."""

from dataclasses import dataclass

from atb_pllava.errors import BackendError


@dataclass(frozen=True)
class Chip:
    """One family of NPUs. The numbers are documented limits of torch_npu's and ATB's operators.

    soc_versions: the SoC versions of the family (c10_npu's SocVersion). dtypes: of the model, preferred first.
    block_sizes: allowed tokens in a KV block. nz_cache: keys and values are stored as 16-wide fractals (NZ).
    fused_attention: the chip has npu_fused_infer_attention_score.
    row_multiple: unpaged ATB attention needs a multiple of row_multiple rows.
    fused_rotary: the chip has npu_rotary_mul. fused_swiglu: the chip has npu_swiglu.
    int8_groups: npu_weight_quant_batchmatmul takes one scale for each group of columns.
    """

    name: str
    soc_versions: tuple[range, ...]
    dtypes: tuple[str, ...]
    block_sizes: range
    nz_cache: bool
    fused_attention: bool
    row_multiple: int
    fused_rotary: bool
    fused_swiglu: bool
    int8_groups: bool


CHIPS = (
    Chip(
        name="910B", soc_versions=(range(220, 226), range(250, 256)), dtypes=("float16", "bfloat16"),
        block_sizes=range(128, 513, 128), nz_cache=False, fused_attention=True, row_multiple=1,
        fused_rotary=True, fused_swiglu=True, int8_groups=True,
    ),
    Chip(
        name="310P", soc_versions=(range(200, 206),), dtypes=("float16",),
        block_sizes=range(16, 129, 16), nz_cache=True, fused_attention=False, row_multiple=16,
        fused_rotary=False, fused_swiglu=False, int8_groups=False,
    ),
)  # fmt: skip


def chip_of(soc_version: int) -> Chip:
    """The Chip of a SoC version. 910B is Atlas A2 (Atlas 800I A2). A3 has the operators of 910B.

    Raises BackendError for any other chip. The first Ascend 910, 310, 310B and 950 are not supported.
    """
    for chip in CHIPS:
        if any(soc_version in versions for versions in chip.soc_versions):
            return chip
    names = " and ".join(f"Ascend {chip.name}" for chip in CHIPS)
    raise BackendError(
        f"backend 'ascend': this NPU has SoC version {soc_version}; {names} are supported; use --backend cpu"
    )
