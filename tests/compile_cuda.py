"""Compiles each launch of the Triton kernels for an H200 (sm_90), without a device. Prints what each launch takes.

The launches are those of `ops.cuda` for real shapes, on tensors without memory. A kernel gets the types, alignments and
constants that Triton would find at that launch.
"""

import re
import subprocess
import sys
import tempfile
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atb_pllava.ops.cuda import (
    attention_kernels,
    elementwise_kernels,
    int8_dequantise,
    int8_linear,
    kv_cache_kernels,
)
from atb_pllava.ops.int8 import Int8Weight
from atb_pllava.ops.interface import LayerCache

TARGET = GPUTarget("cuda", 90, 32)
MULTIPROCESSORS = 132
PROGRAMS = 4 * MULTIPROCESSORS
ROWS = (1, 4, 8, 32, 64)
# Rows, columns and group size of int8 weights: out and gate_up of 7B, and grouped ones.
INT8_WEIGHTS = ((4096, 4096, 0), (22016, 4096, 0), (4096, 4096, 64), (22016, 4096, 128))
# The kernels that are launched. They call the other functions of a module.
ENTRIES = {
    attention_kernels: ("_attend", "_merge"),
    elementwise_kernels: ("_rms_norm", "_add_layer_norm", "_swiglu", "_quick_gelu"),
    int8_dequantise: ("_dequantise",),
    int8_linear: ("_few_rows", "_dot_rows", "_sum_splits"),
    kv_cache_kernels: ("_write_kv", "_rotary_and_write_kv", "_gather_kv"),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int64: "*i64",
}


class Compiled:
    """Stands in a kernel's place: a launch compiles it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *arguments: Any, **options: int) -> None:
        signature = {}
        constants = {}
        aligned = {}
        for i, (parameter, value) in enumerate(zip(self.kernel.params, arguments, strict=True)):
            fixed = parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not fixed):
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            kind = "fp32" if isinstance(value, float) else "i32"
            signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, Tensor) else kind
            if isinstance(value, Tensor) or (kind == "i32" and value % 16 == 0 and not fixed):
                aligned[(i,)] = [["tt.divisibility", 16]]
        made = triton.compile(ASTSource(self.kernel, signature, constants, aligned), target=TARGET, options=options)
        if options.get("launch_pdl"):
            check_wait(self.kernel.__name__, made.asm["ptx"])
        print(self.kernel.__name__, options, f"shared {made.metadata.shared}", *resources(made.asm["cubin"]))


def check_wait(kernel: str, ptx: str) -> None:
    """Before it waits for the kernel in front of it, a kernel loads int8 weights (".cg") and accesses nothing else."""
    before, waits, _ = ptx.partition("griddepcontrol.wait")
    accesses = re.findall(r"(?:ld|st|red|atom)\.global\S*|cp\.async\.c\S*", before)
    early = [access for access in accesses if not access.startswith("ld.global.cg")]
    if early or not waits:
        sys.exit(f"{kernel}: {early or 'nothing'} in front of griddepcontrol.wait")


def resources(cubin: bytes) -> tuple[str, str]:
    """Registers a thread and bytes of its stack, where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(triton.knobs.nvidia.cuobjdump.path), "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", report)[0]
    return f"registers {registers}", f"stack {stack}"


def compile_launches_of(module: ModuleType) -> None:
    """Make every launch of a kernel of `module` compile the kernel."""
    for name in ENTRIES[module]:
        setattr(module, name, Compiled(getattr(module, name)))


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def compile_attention(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    whole = torch.int64
    for heads, kv_heads, dim, block in ((32, 32, 128, 128), (56, 8, 128, 128), (8, 2, 80, 16)):
        cache: LayerCache = (empty(64, kv_heads, block, dim, dtype=cache_dtype),) * 2
        if cache_dtype == torch.int8:
            cache += (empty(64, kv_heads, block, dtype=torch.float32),) * 2
        rows = empty(8, heads + 2 * kv_heads, dim, dtype=dtype)
        query, keys, values = rows.split((heads, kv_heads, kv_heads), dim=1)
        angles = empty(8, dim // 2, dtype=torch.float32)
        slot_mapping = empty(8, dtype=whole)
        kv_cache_kernels.write_kv(keys, values, cache, slot_mapping)
        kv_cache_kernels.rotary_and_write_kv(query, keys, values, cache, angles, angles, slot_mapping)
        kv_cache_kernels.gather_kv(cache, empty(32, dtype=whole), 1000, dtype)
        for batch in (1, 8):
            tables = empty(batch, 32, dtype=whole)
            lens = empty(batch, dtype=whole)
            attention_kernels.decode_attention(empty(batch, heads, dim, dtype=dtype), cache, tables, lens, PROGRAMS)


def compile_elementwise(dtype: torch.dtype) -> None:
    for width in (4096, 7168):
        x = empty(8, width, dtype=dtype)
        weight = empty(width, dtype=dtype)
        elementwise_kernels.rms_norm(x, weight, 1e-5)
        elementwise_kernels.fused_add_rms_norm(x, x, weight, 1e-5)
        elementwise_kernels.swiglu(empty(8, 5 * width, dtype=dtype))
    x = empty(577, 1024, dtype=dtype)  # of the vision tower
    elementwise_kernels.fused_add_layer_norm(x, x, x[0], x[0], 1e-5)
    elementwise_kernels.quick_gelu(empty(577, 4096, dtype=dtype))


def compile_int8_products(dtype: torch.dtype) -> None:
    for height, columns, group_size in INT8_WEIGHTS:
        with torch.device("meta"):
            weight = Int8Weight.empty(height, columns, dtype, group_size)
        int8_dequantise.dequantise(weight, dtype)
        for rows in ROWS if dtype != torch.float32 else (1, 8):
            x = empty(rows, columns, dtype=dtype)
            int8_linear.int8_linear(x, weight, None, MULTIPROCESSORS, symmetric=not group_size, dependent=True)


def main() -> None:
    for module in ENTRIES:
        compile_launches_of(module)
    compile_int8_products(torch.float16)  # int8 becomes float16 by other instructions than bfloat16
    for dtype in (torch.bfloat16, torch.float32):
        for cache_dtype in (dtype, torch.int8):
            compile_attention(dtype, cache_dtype)
        compile_elementwise(dtype)
        compile_int8_products(dtype)


if __name__ == "__main__":
    main()
