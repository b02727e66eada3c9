"""Compiles the CPU kernels once on each machine, keeps the shared library, and loads the library.

Libraries are kept in a directory that only its owner can read and write. The name of a library is a hash of its
sources, its compiler and its flags, so a library of other sources is never loaded. `backend.py` declares the functions
of the library.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from atb_pllava.ops.cpu.levels import compiler_options, levels_from_best

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("csrc")
TRANSLATION_UNIT = SOURCES / "api.cpp"  # includes all other sources
COMPILERS = ("c++", "g++", "clang++")
COMMON_FLAGS = ("-O2", "-ftree-vectorize", "-std=c++17", "-fPIC", "-shared", "-pthread")
_SECONDS_TO_COMPILE = 600
_TRIAL = """#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>
extern "C" std::int64_t trial(std::int64_t n) { return std::vector<std::int64_t>(n).size(); }
"""


class BuildError(Exception):
    """The kernels cannot be compiled or loaded, for the reason in the message. Callers may fall back to plain torch."""


class CompilerError(BuildError):
    """The compiler exited with an error."""


def default_directory() -> Path:
    """The directory in the user's home where libraries are kept. Raises OSError for a user without a home."""
    try:
        return Path.home() / ".cache" / "atb_pllava"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def load_library(
    compiler: str | None = None, directory: str | os.PathLike[str] | None = None, level: str | None = None
) -> ctypes.CDLL:
    """Load the kernels. Compile them first if no earlier run did.

    compiler: a command, which may have options. None: the first of COMPILERS on the PATH.
    directory: where libraries are kept. None: `default_directory()`. If the directory cannot be used, the library is
        compiled into a temporary directory and not kept, with a warning.
    level: one of LEVELS. None: the best level of this CPU that the compiler supports.
    Raises BuildError, and OSError if a file cannot be written or locked.
    """
    if level is None:
        *better, last = levels_from_best()
        for name in better:
            try:
                return load_library(compiler, directory, name)
            except CompilerError as error:  # the compiler may be older than the CPU
                _report_old_compiler(name, error)
        return load_library(compiler, directory, last)
    command = _find_compiler(compiler)
    flags = _flags(level)
    name = _library_name(command, level)
    try:
        folder = _private_directory(Path(directory) if directory is not None else default_directory())
    except OSError as error:
        logger.warning("the compiled CPU kernels cannot be kept (%s); every start compiles the kernels anew", error)
        with tempfile.TemporaryDirectory(prefix="atb_pllava_") as temporary:
            return _open(_compile(command, flags, Path(temporary) / name))
    path = folder / name
    if not path.exists():
        with _one_at_a_time(folder / f"{name}.lock"):
            if not path.exists():
                _compile(command, flags, path)
    return _open(path)


def find_library(compiler: str | None = None, directory: str | os.PathLike[str] | None = None) -> Path | None:
    """The library that `load_library` would load without compiling. None if `load_library` would compile.

    Raises BuildError without a compiler, because the name of a library depends on the compiler.
    """
    command = _find_compiler(compiler)
    folder = Path(directory) if directory is not None else default_directory()
    for level in levels_from_best():
        path = folder / _library_name(command, level)
        if path.exists():
            return path
    return None


def try_compiler(compiler: str | None, directory: str | os.PathLike[str]) -> tuple[list[str], str]:
    """Compile a small library in `directory` with the flags of the kernels.

    Returns the compiler's command line, and the best of LEVELS that the compiler supports on this CPU.
    Raises BuildError if there is no compiler, or if the compilation fails, for example without headers or linker.
    """
    command = _find_compiler(compiler)
    source = Path(directory) / "try.cpp"
    library = Path(directory) / "try.so"
    source.write_text(_TRIAL, encoding="utf-8")
    *better, last = levels_from_best()
    for level in better:
        with suppress(CompilerError):  # the compiler may be older than the CPU
            _run([*command, *_flags(level), str(source), "-o", str(library)], "failed")
            return command, level
    _run([*command, *_flags(last), str(source), "-o", str(library)], "failed")
    return command, last


def _flags(level: str) -> list[str]:
    return [*COMMON_FLAGS, *compiler_options(level)]


def _report_old_compiler(level: str, error: CompilerError) -> None:
    if level == "amx":
        logger.warning(
            "no CPU kernels for this CPU's tile registers (AMX): %s; prefill and vision will be several times slower "
            "than they could be; install g++ 11 or later, or name a newer compiler in CXX",
            error,
        )
    else:
        logger.info("no CPU kernels for %s: %s", level, error)


def _find_compiler(given: str | None) -> list[str]:
    """The compiler's command line. Its first word is a full path."""
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


def _library_name(command: Sequence[str], level: str) -> str:
    """A file name with the level, that differs for other sources, compilers and flags."""
    version = _run([*command, "--version"], "does not run").stdout
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    sources = [f"{file.name}\n{file.read_text(encoding='utf-8')}" for file in files]
    parts = [*sources, *command, version, *_flags(level)]
    return f"kernels-{level}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.so"


def _private_directory(path: Path) -> Path:
    """The real path of a directory. A missing directory is created with permissions 0700.

    Raises OSError unless the directory belongs to this user, has permissions 0700, and is writable.
    """
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
    """A lock that one process holds at a time. The system releases the lock when the process ends, even by a crash."""
    with open(path, "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(command: Sequence[str], flags: Sequence[str], path: Path) -> Path:
    """Compile the kernels to `path` and return `path`. Other processes see no file or the complete file."""
    logger.info("compiling the CPU kernels with %s, once for this machine (about 10 s)", command[0])
    began = time.perf_counter()
    descriptor, partial = tempfile.mkstemp(suffix=".partial", dir=path.parent)
    os.close(descriptor)
    try:
        _run([*command, *flags, str(TRANSLATION_UNIT), "-o", partial], "failed")
        os.chmod(partial, 0o700)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
    logger.info("compiled the CPU kernels in %.1f s: %s", time.perf_counter() - began, path)
    return path


def _run(command: Sequence[str], failure: str) -> "subprocess.CompletedProcess[str]":
    """Run a command and capture its output. `failure` is the verb of error messages, "failed" for example.

    Raises CompilerError with the first error line if the exit status is not 0. Raises BuildError if the command cannot
    be started or takes longer than _SECONDS_TO_COMPILE.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS_TO_COMPILE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} {failure}: {error}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        shown = next((line for line in lines if "error:" in line), lines[-1])
        raise CompilerError(f"{command[0]} {failure} with status {done.returncode}: {shown}")
    return done


def _open(path: Path) -> ctypes.CDLL:
    """Load a library. Raises BuildError if another user owns or can write the file, or if loading fails."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise BuildError(f"{path} is not a file that only this user can write; delete it")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from None
    logger.debug("CPU kernels: %s", path)
    return library
