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
    int8_groups: npu_weight_quant_batchmatmul takes one scale for each group of columns.
    fused: the operators that replace several of torch's, and that are documented for the chip. CANN's and torch_npu's
    documents disagree about npu_swiglu on 310P.
    unified_buffer: bytes of a vector core's memory that a kernel may use. CANN keeps 256 of the ub_size in its
    platform_config.
    """

    name: str
    soc_versions: tuple[range, ...]
    dtypes: tuple[str, ...]
    block_sizes: range
    nz_cache: bool
    fused_attention: bool
    row_multiple: int
    int8_groups: bool
    fused: frozenset[str]
    unified_buffer: int


CHIPS = (
    Chip(
        name="910B", soc_versions=(range(220, 226), range(250, 256)), dtypes=("float16", "bfloat16"),
        block_sizes=range(128, 513, 128), nz_cache=False, fused_attention=True, row_multiple=1,
        int8_groups=True, unified_buffer=192 * 1024 - 256,
        fused=frozenset(
            {"npu_add_rms_norm", "npu_apply_rotary_pos_emb", "npu_rotary_mul", "npu_swiglu", "npu_fast_gelu"}
        ),
    ),
    Chip(
        name="310P", soc_versions=(range(200, 206),), dtypes=("float16",),
        block_sizes=range(16, 129, 16), nz_cache=True, fused_attention=False, row_multiple=16,
        int8_groups=False, unified_buffer=256 * 1024 - 256,
        fused=frozenset({"npu_add_rms_norm", "npu_apply_rotary_pos_emb"}),
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
