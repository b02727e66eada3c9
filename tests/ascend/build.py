"""Builds the stand-in for CANN's libraries that lets the real torch_npu start on a machine without NPU.

`python build.py TORCH_NPU OUT` finds every symbol that the shared objects of the package directory TORCH_NPU leave
undefined and nothing here defines, adds them to cann.c as functions that fail, and writes libascendcl.so and CANN's
other library names into OUT. Needs a C compiler: $CC, cc, gcc, clang, or the ziglang package.
"""

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("cann.c")
NAMES = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "fmk_parser", "ascend_protobuf", "atb")
_DYNSYM = 11
_UNDEFINED = 0
_WEAK = 2


def dynamic_symbols(path: Path) -> tuple[set[str], set[str]]:
    """Names that a 64-bit little-endian ELF file defines, and those it needs (weak ones may be missing)."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return set(), set()
    (start,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQII", data, start + i * size) for i in range(count)]
    defined = set()
    needed = set()
    for _, kind, _, _, offset, length, link, _ in sections:
        if kind != _DYNSYM:
            continue
        strings = sections[link][4]
        for position in range(offset, offset + length, 24):
            name_at, info, _, section = struct.unpack_from("<IBBH", data, position)
            name = data[strings + name_at : data.index(b"\0", strings + name_at)].decode()
            if section != _UNDEFINED:
                defined.add(name)
            elif info >> 4 != _WEAK:
                needed.add(name)
    return defined, needed


def missing_symbols(torch_npu: Path) -> list[str]:
    """What torch_npu needs beyond torch, Python and the system's libraries."""
    own = [*torch_npu.glob("_C*.so"), *torch_npu.glob("lib/*.so"), *torch_npu.glob("dynamo/torchair/core/*.so")]
    assert own, f"{torch_npu} holds no shared objects"
    import torch  # noqa: F401 - loads what torch_npu finds loaded

    with open("/proc/self/maps", encoding="utf-8") as maps:
        loaded = {Path(line.split(maxsplit=5)[5].strip()) for line in maps if ".so" in line}
    defined: set[str] = set()
    for path in (*own, *sorted(loaded)):
        defined |= dynamic_symbols(path)[0]
    needed = set[str]().union(*(dynamic_symbols(path)[1] for path in own)) - defined
    return sorted(name for name in needed if name and not name.startswith(("Py", "_Py")))


def has_cuda() -> bool:
    """Whether this Python's torch was built for CUDA."""
    import torch

    return torch.version.cuda is not None


def compiler() -> list[str] | None:
    """The command of a C compiler."""
    if os.environ.get("CC"):
        return os.environ["CC"].split()
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found:
        return [found]
    return [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") else None


def build(torch_npu: Path, out: Path) -> None:
    text = SOURCE.read_text(encoding="utf-8")
    here = set(re.findall(r"^\w[\w ]*[ *](\w+)\(.*\{", text, re.MULTILINE))
    text += "".join(
        f'long {name}(void) {{ return stand_in_missing("{name}"); }}\n'
        for name in missing_symbols(torch_npu)
        if name not in here
    )
    out.mkdir(parents=True, exist_ok=True)
    whole = out / "whole.c"
    empty = out / "empty.c"
    whole.write_text(text)
    empty.write_text("static int unused;\n")
    command = compiler()
    assert command, "no C compiler"
    shared = [*command, "-shared", "-fPIC", "-O1", "-w"]
    subprocess.run([*shared, "-Wl,-soname,libascendcl.so", "-o", out / "libascendcl.so", whole], check=True)
    for name in NAMES:
        subprocess.run(
            [
                *shared,
                f"-Wl,-soname,lib{name}.so",
                "-Wl,--no-as-needed",
                "-o",
                out / f"lib{name}.so",
                empty,
                f"-L{out}",
                "-lascendcl",
                "-Wl,-rpath,$ORIGIN",
            ],
            check=True,
        )


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
