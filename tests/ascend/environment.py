"""Where the job finds torch_npu and its stand-in libraries: made once, in .venv-ascend, beside the main environment.

Prints the directory: torch_npu (without its dependencies: torch is the one this Python has) and lib/. Where that cannot
be had (another torch, no wheel, no network, no C compiler) it says why on stderr and ends with status 77.
"""

import hashlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
VERSIONS = ("2.13.0", "2.14.0")  # the torch_npu that is used is that of this Python's torch
SKIPPED = 77


def skip(reason: str) -> None:
    print(f"tests/ascend skipped: {reason}", file=sys.stderr)
    sys.exit(SKIPPED)


def find_version() -> str:
    """The version of torch, and so of torch_npu."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        skip(f"torch-npu has no wheel for {sys.platform} on {platform.machine()}")
    torch = importlib.metadata.version("torch").split("+")[0]
    if torch not in VERSIONS:
        skip(f"this is for torch-npu {' and '.join(VERSIONS)}, with torch of the same version; this Python has {torch}")
    return torch


def install(version: str, target: Path) -> None:
    """Install torch_npu into a directory of its own. Nothing is installed into this Python."""
    wanted = [f"torch-npu=={version}"] + ([] if importlib.util.find_spec("yaml") else ["pyyaml"])
    print(f"installing {' '.join(wanted)} into {target} (once)", file=sys.stderr)
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as partial:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--retries",
            "1",
            "--target",
            f"{partial}/packages",
            *wanted,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            skip(f"torch-npu=={version} cannot be installed: {reason}")
        Path(partial, "packages").rename(target)


def main() -> None:
    version = find_version()
    import build

    if version != VERSIONS[0] and build.has_cuda():
        skip(f"torch-npu {version} ends the process beside a CUDA build of torch; use torch's CPU build")

    if build.compiler() is None:
        skip("no C compiler (cc, gcc, clang, $CC or the ziglang package) to build the stand-in for CANN's libraries")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}"
    target = HERE.parents[1] / ".venv-ascend" / f"torch_npu-{version}-{tag}"
    if not target.is_dir():
        install(version, target)
    sources = b"".join((HERE / name).read_bytes() for name in ("cann.c", "build.py"))
    made = target / "lib" / "made-from"
    wanted = hashlib.sha256(sources).hexdigest()
    if not made.is_file() or made.read_text() != wanted:
        shutil.rmtree(target / "lib", ignore_errors=True)
        build.build(target / "torch_npu", target / "lib")
        made.write_text(wanted)
    print(target)


if __name__ == "__main__":
    main()
