"""What the compiled CPU kernels do when the system grants no memory or no threads, and how they set up malloc."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atb_pllava.errors import OutOfMemoryError
from atb_pllava.ops.cpu import build, levels
from atb_pllava.ops.cpu.backend import NativeBackend, Panels
from atb_pllava.ops.interface import LayerCache
from tests.ops.kernel_support import PLAIN, CacheShape, compiler_with_emulated_tiles, filled_caches
from tests.support import ROOT, assert_near, decode_metadata, prefill_metadata, random_tensor

HUGE = 2**44  # elements: more bytes than the addresses of a process


def huge_linear(fast: NativeBackend) -> None:
    packed = fast.pack(random_tensor(32, 64))
    assert isinstance(packed, Panels)
    packed.matrix.width = HUGE
    fast.linear(random_tensor(1, 64), packed)


def huge_cache() -> LayerCache:
    """One block of 64 * HUGE tokens, all in the same memory. Nothing reads or writes the block."""
    rows = torch.zeros(1, 2, 1, 64).expand(1, 2, 64 * HUGE, 64)
    return rows, rows


def huge_decode(fast: NativeBackend) -> None:
    cache = huge_cache()
    fast.decode_attention(random_tensor(1, 2, 64), cache, decode_metadata(fast, [64 * HUGE], torch.tensor([[0]])))


def huge_prefill(fast: NativeBackend) -> None:
    cache = huge_cache()
    query = random_tensor(1, 2, 64)
    metadata = prefill_metadata(fast, [1], [64 * HUGE], torch.tensor([[0]]))
    fast.prefill_attention(query, query, query, cache, metadata)


def huge_encoder(fast: NativeBackend) -> None:
    x = random_tensor(64)
    frames = 8  # so that the workers allocate the memory, each its own
    fast._call("atb_encoder", *[x.data_ptr()] * 4, frames, HUGE, 1, 64, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("atb_linear", huge_linear),
        ("atb_decode", huge_decode),
        ("atb_prefill", huge_prefill),
        ("atb_encoder", huge_encoder),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failed_allocation_ends_the_call(
    fast: NativeBackend, name: str, call: Callable[[NativeBackend], None]
) -> None:
    for _ in range(2):
        with pytest.raises(OutOfMemoryError, match=rf"{name} could not allocate \d{{8,}}\.\d MB: lower"):
            call(fast)
    assert_still_works(fast)


def assert_still_works(fast: NativeBackend) -> None:
    """A product, decoding over several splits, and attention in threads have right results."""
    weight = random_tensor(37, 130)
    x = random_tensor(13, 130, seed=1)
    assert_near(fast.linear(x, fast.pack(weight)), PLAIN.linear(x, weight))
    lengths = [1500, 1]
    caches = filled_caches(fast, lengths, CacheShape(128, 2, 128, torch.float32, torch.float32))
    query = random_tensor(len(lengths), 2, 128)
    result = fast.decode_attention(query, caches.native, decode_metadata(fast, lengths, caches.block_tables))
    metadata = decode_metadata(PLAIN, lengths, caches.block_tables)
    assert_near(result, PLAIN.decode_attention(query, caches.plain, metadata))
    frames = random_tensor(2, 77, 3, 80)
    assert_near(fast.encoder_attention(frames, frames, frames), PLAIN.encoder_attention(frames, frames, frames))


LIMITED_MEMORY = """
import resource, torch
from atb_pllava.errors import OutOfMemoryError
from atb_pllava.ops.cpu.backend import NativeBackend
from atb_pllava.ops.cpu.build import load_library
from tests.support import prefill_metadata

fast = NativeBackend(load_library())
torch.set_num_threads(2)
(cache,) = fast.new_kv_cache(1, 1, 2**17, 4, 64, torch.float32)
x = torch.ones(1, 4, 64)
metadata = prefill_metadata(fast, [1], [2**17], torch.tensor([[0]]))
for part in cache:
    part.fill_(0.5)
used = 4096 * int(open('/proc/self/statm').read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, -1))
try:
    fast.prefill_attention(x, x, x, cache, metadata)
except OutOfMemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(fast.prefill_attention(x, x, x, cache, metadata).unique().tolist())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.usefixtures("compiled")
def test_a_limit_on_memory() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED_MEMORY], capture_output=True, text=True, cwd=ROOT)
    asked = 2 * 4 * 2**17 * 64 * 4 / 1e6  # MB: keys and values of four heads, packed
    assert done.stdout == (
        f"atb_prefill could not allocate {asked:.1f} MB: lower --prefill_chunk, --vision_batch or --max_batch_size, "
        "or free memory\n[0.5]\n"
    ), done.stderr


LIMITED_THREADS = """
import ctypes, os, resource, sys

resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))  # less than the stack of a thread
library = ctypes.CDLL(sys.argv[1])
count = 2**18
x = (ctypes.c_float * count)(*[1.0] * count)
out = (ctypes.c_float * count)()
library.atb_quick_gelu(x, out, ctypes.c_int64(count), ctypes.c_int64(0), 4)
print(len(os.listdir('/proc/self/task')), {round(value, 4) for value in out})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.usefixtures("compiled")
def test_the_caller_works_alone_if_no_thread_can_be_started() -> None:
    command = [sys.executable, "-c", LIMITED_THREADS, str(build.find_library())]
    with_large_stacks = ["sh", "-c", 'ulimit -s 8388608 && exec "$@"', "sh"]
    done = subprocess.run([*with_large_stacks, *command], capture_output=True, text=True)
    if "ulimit" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == "1 {0.8458}\n", done.stderr


OLD_MALLOPT = r"""
#include <cstdio>
extern "C" int mallopt(int name, int value) {
    const int taken = name != -3 || value <= 32 << 20;
    if (taken) printf("%d %d\n", name, value);
    return taken;
}
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
@pytest.mark.usefixtures("compiled")
def test_a_glibc_that_refuses_a_large_threshold(tmp_path: Path) -> None:
    source = tmp_path / "old.cpp"
    source.write_text(OLD_MALLOPT)
    library = tmp_path / "old.so"
    compiler, _ = build.try_compiler(None, tmp_path)
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    program = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).atb_keep_freed_memory()"
    command = [sys.executable, "-c", program, str(build.find_library())]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == f"-3 {32 << 20}\n-1 {1 << 30}\n", done.stderr  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


# Sanitizers, and the level that is compiled with them. AVX2 has another conversion of int8 weights than AVX-512 VBMI.
SANITIZERS = [("address,undefined", "best"), ("thread", "avx2")]


@pytest.mark.parametrize(("sanitizers", "level"), SANITIZERS)
def test_kernels_and_emulated_tiles_under_sanitizers(sanitizers: str, level: str, tmp_path: Path) -> None:
    """check_kernels.cpp compares bfloat16 products and attention with float64, on four threads."""
    level = levels.best_level() if level == "best" else level
    if not levels.cpu_features().issuperset(levels.LEVELS[level]):
        pytest.skip(f"this CPU has no {level}")
    program = tmp_path / "check_kernels"
    options = [*levels.compiler_options(level), "-std=c++17", "-O0", "-g1", "-pthread", f"-fsanitize={sanitizers}"]
    source = Path(__file__).with_name("check_kernels.cpp")
    try:
        build._run([*compiler_with_emulated_tiles(), *options, str(source), "-o", str(program)], "failed")
    except build.CompilerError as error:
        if "san" not in str(error):
            raise
        pytest.skip(f"a compiler without sanitizers: {error}")
    except build.BuildError as error:
        pytest.skip(str(error))
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([str(program), "4"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("0 failures\n"), done.stdout + done.stderr
    assert not done.stderr
