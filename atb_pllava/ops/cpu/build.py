"""From kernels.cpp to a loaded library: compiled once for this machine, kept in a directory only its owner can write.

The name of a library says what it was made of (source, compiler, flags), so nothing stale is ever loaded. Called by
`ops.native`; knows nothing of what is in the library.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("csrc") / "kernels.cpp"
COMPILERS = ("c++", "g++", "clang++")
COMMON_FLAGS = ("-O2", "-ftree-vectorize", "-std=c++17", "-fPIC", "-shared", "-pthread")
# From the best to what every CPU has; each with the words of /proc/cpuinfo it needs.
LEVELS = {
    "avx512bf16": ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512vbmi"),
    "avx512": ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx2": ("avx2", "fma"),
    "portable": (),
}
_SECONDS_TO_COMPILE = 600
_TRIAL = """#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>
extern "C" std::int64_t trial(std::int64_t n) { return std::vector<std::int64_t>(n).size(); }
"""


class BuildError(Exception):
    """Why there is no library; the caller decides whether that is an error."""


class CompilerError(BuildError):
    """The compiler ended with an error."""


def default_directory() -> Path:
    """In the home directory; OSError for a user without one."""
    try:
        return Path.home() / ".cache" / "atb_pllava"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def best_level() -> str:
    """The first of LEVELS that this CPU has."""
    here = cpu_words() if platform.machine() in ("x86_64", "AMD64") else frozenset()
    return next(level for level, words in LEVELS.items() if here.issuperset(words))


def levels_from_best() -> list[str]:
    """The levels that this CPU has, best first."""
    names = list(LEVELS)
    return names[names.index(best_level()) :]


def cpu_words() -> frozenset[str]:
    """What /proc/cpuinfo says this CPU can do; nothing where there is no such file."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return frozenset(word for line in file if line.startswith(("flags", "Features")) for word in line.split())
    except OSError:
        return frozenset()


def load_library(
    compiler: str | None = None, directory: str | os.PathLike[str] | None = None, level: str | None = None
) -> ctypes.CDLL:
    """The kernels, compiled now unless a former run did.

    compiler is a command, possibly with options (None: the first of COMPILERS on the PATH); directory is where
    libraries are kept (None: `default_directory()`); one that cannot be used is replaced by a temporary one; level is
    one of LEVELS (None: the best of this CPU that the compiler can make).
    Raises BuildError, and OSError where files cannot be made or locked.
    """
    if level is None:
        *better, last = levels_from_best()
        for name in better:
            try:
                return load_library(compiler, directory, name)
            except CompilerError as error:  # perhaps older than the CPU
                logger.info("no CPU kernels for %s: %s", name, error)
        return load_library(compiler, directory, last)
    command = _find_compiler(compiler)
    flags = _flags(level)
    name = _library_name(command, flags)
    try:
        folder = _private_directory(Path(directory) if directory is not None else default_directory())
    except OSError as error:
        logger.warning("CPU kernels cannot be kept (%s); they are compiled anew by every start", error)
        with tempfile.TemporaryDirectory(prefix="atb_pllava_") as temporary:
            return _open(_compile(command, flags, Path(temporary) / name))
    path = folder / name
    if not path.exists():
        with _one_at_a_time(folder / f"{name}.lock"):
            if not path.exists():
                _compile(command, flags, path)
    return _open(path)


def find_library(compiler: str | None = None, directory: str | os.PathLike[str] | None = None) -> Path | None:
    """The library that `load_library` would load without compiling; None where it would compile first.

    Raises BuildError where there is no compiler: the name of a library says what compiled it.
    """
    command = _find_compiler(compiler)
    folder = Path(directory) if directory is not None else default_directory()
    for level in levels_from_best():
        path = folder / _library_name(command, _flags(level))
        if path.exists():
            return path
    return None


def try_compiler(compiler: str | None, directory: str | os.PathLike[str]) -> list[str]:
    """The compiler's command line, after it has made a small library in `directory` with the flags of the kernels.

    Raises BuildError where there is none, or where it cannot: its headers or its linker may be missing.
    """
    command = _find_compiler(compiler)
    source, library = Path(directory) / "try.cpp", Path(directory) / "try.so"
    source.write_text(_TRIAL, encoding="utf-8")
    *better, last = levels_from_best()
    for level in better:
        with suppress(CompilerError):  # perhaps older than the CPU
            _run([*command, *_flags(level), str(source), "-o", str(library)], "failed")
            return command
    _run([*command, *_flags(last), str(source), "-o", str(library)], "failed")
    return command


def _flags(level: str) -> list[str]:
    return [*COMMON_FLAGS, *(f"-m{word.replace('_', '')}" for word in LEVELS[level])]


def _find_compiler(given: str | None) -> list[str]:
    """The compiler as a command line, its first word a full path."""
    try:
        words = shlex.split(given) if given else []
    except ValueError as error:
        raise BuildError(f"compiler {given!r} is no command: {error}") from None
    names = words[:1] or list(COMPILERS)
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        were = "was" if len(names) == 1 else "were"
        raise BuildError(f"no C++ compiler: {' and '.join(names)} {were} not found")
    return [found, *words[1:]]


def _library_name(command: Sequence[str], flags: Sequence[str]) -> str:
    """Different for every source, compiler and set of flags."""
    version = _run([*command, "--version"], "does not run").stdout
    parts = [SOURCE.read_text(encoding="utf-8"), *command, version, *flags]
    return f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.so"


def _private_directory(path: Path) -> Path:
    """`path`, made if need be; OSError unless it is ours and nobody else may write there (or swap it for another)."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = path.resolve()
    status = path.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise OSError(f"{path} must belong to this user with permissions 0700, not {stat.S_IMODE(status.st_mode):04o}")
    if not os.access(path, os.W_OK | os.X_OK):
        raise OSError(f"{path} cannot be written")
    return path


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when the process ends, however it does."""
    with open(path, "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(command: Sequence[str], flags: Sequence[str], path: Path) -> Path:
    """Compile to `path`, which appears whole or not at all."""
    logger.info("compiling the CPU kernels with %s, once for this machine (about 10 s)", command[0])
    began = time.perf_counter()
    descriptor, partial = tempfile.mkstemp(suffix=".partial", dir=path.parent)
    os.close(descriptor)
    try:
        _run([*command, *flags, str(SOURCE), "-o", partial], "failed")
        os.chmod(partial, 0o700)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
    logger.info("compiled the CPU kernels in %.1f s: %s", time.perf_counter() - began, path)
    return path


def _run(command: Sequence[str], what: str) -> "subprocess.CompletedProcess[str]":
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS_TO_COMPILE,
            errors="replace")  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} {what}: {error}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        shown = next((line for line in lines if "error" in line), lines[-1])
        raise CompilerError(f"{command[0]} {what} with status {done.returncode}: {shown}")
    return done


def _open(path: Path) -> ctypes.CDLL:
    """Load a library that belongs to us and that nobody else can have written."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise BuildError(f"{path} is not a file that only this user can write; delete it")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from None
