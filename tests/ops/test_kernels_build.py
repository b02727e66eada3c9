"""How the CPU kernels are compiled, kept, and replaced by plain torch where there is no library."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atb_pllava.errors import BackendError
from atb_pllava.ops.cpu import build, levels
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.ops.registry import get_backend
from tests.support import ROOT


@pytest.fixture
def fake_compiler(compiled: None, tmp_path: Path) -> str:
    """A compiler that takes half a second, writes a line to `log`, and copies an existing library."""
    library = tmp_path / "library.so"
    shutil.copy(str(build.find_library()), library)
    return script(
        tmp_path / "fake_compiler",
        '[ "$1" = --version ] && exec echo 1',
        f"echo run >> {tmp_path}/log",
        "sleep 0.5",
        "for last; do :; done",
        f'cp {library} "$last"',
    )


def script(path: Path, *lines: str) -> str:
    """Write an executable shell script, and return its path."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def compilations(tmp_path: Path) -> int:
    """How often fake_compiler has compiled."""
    return len((tmp_path / "log").read_text().split())


def test_a_library_is_compiled_once_and_kept(fake_compiler: str, tmp_path: Path) -> None:
    folder = tmp_path / "caches" / "kernels"
    for _ in range(2):
        build.load_library(fake_compiler, folder)
    assert compilations(tmp_path) == 1 and folder.stat().st_mode & 0o777 == 0o700
    build.load_library(f"{fake_compiler} -DOTHER", folder)
    build.load_library(fake_compiler, folder, level="portable")
    assert len(list(folder.glob("*.so"))) == (2 if levels.best_level() == "portable" else 3)
    assert not list(folder.glob("*.partial"))


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernels' sources, which is compiled instead of them."""
    folder = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, folder)
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "TRANSLATION_UNIT", folder / build.TRANSLATION_UNIT.name)
    return folder


def test_a_change_of_any_source_is_compiled_anew(fake_compiler: str, sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    library = build.find_library(fake_compiler, folder)
    files = sorted(path for path in sources.iterdir() if path.suffix in (".h", ".cpp"))
    assert library is None and len(files) > 10
    names = {build._library_name([fake_compiler], "portable")}
    for file in files:
        file.write_text(file.read_text() + "// changed\n")
        names.add(build._library_name([fake_compiler], "portable"))
    assert len(names) == len(files) + 1
    build.load_library(fake_compiler, folder)
    files[0].rename(sources / "renamed.h")
    build.load_library(fake_compiler, folder)
    assert compilations(tmp_path) == 2


def test_an_error_message_names_the_source(compiled: None, sources: Path, tmp_path: Path) -> None:
    header = sources / "types.h"
    header.write_text("#error broken\n" + header.read_text())
    with pytest.raises(build.CompilerError, match=r"failed with status 1: .*/csrc/types\.h:1:.* error: .*broken"):
        build.load_library(directory=tmp_path / "kernels", level="portable")


def test_every_source_is_part_of_an_installed_package() -> None:
    # pyproject.toml packs csrc/*: there are no folders in it, and no generated files.
    assert {path.suffix for path in build.SOURCES.iterdir() if not path.name.startswith(".")} == {".h", ".cpp"}
    assert build.TRANSLATION_UNIT.exists()


def test_processes_that_start_together_compile_once(fake_compiler: str, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from atb_pllava.ops.cpu import build\n"
        "assert 'torch' not in sys.modules\n"
        "build.load_library(sys.argv[1], sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, fake_compiler, str(tmp_path / "kernels")]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0] and compilations(tmp_path) == 1


def test_a_directory_that_others_can_write_is_not_used(
    fake_compiler: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(0o777)
    build.load_library(fake_compiler, folder)
    assert "permissions 0700, not 0777" in caplog.text and not list(folder.iterdir())


def test_a_directory_that_cannot_be_written(
    fake_compiler: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    build.load_library(fake_compiler, tmp_path / "file" / "kernels")
    assert "every start compiles the kernels anew" in caplog.text


def test_a_library_that_others_can_write_is_not_loaded(fake_compiler: str, tmp_path: Path) -> None:
    build.load_library(fake_compiler, tmp_path / "kernels")
    (library,) = (tmp_path / "kernels").glob("*.so")
    library.chmod(0o722)
    with pytest.raises(build.BuildError, match="only this user can write"):
        build.load_library(fake_compiler, tmp_path / "kernels")


def test_a_compiler_that_fails_or_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = script(
        tmp_path / "broken", '[ "$1" = --version ] && exit 0', 'echo "api.cpp:1: error: no room" >&2', "exit 3"
    )
    for compiler, reason in [(broken, "status 3: api.cpp:1: error: no room"), ("/no/c++", "was not found")]:
        with pytest.raises(BackendError, match=reason):
            get_backend("cpu", kernels="native", compiler=compiler, kernel_dir=str(tmp_path / "kernels"))
        caplog.clear()
        backend = get_backend("cpu", kernels="auto", compiler=compiler, kernel_dir=str(tmp_path / "kernels"))
        assert type(backend) is TorchBackend and reason in caplog.text and "plain torch is used" in caplog.text
    assert not list((tmp_path / "kernels").glob("*.so")) and not list((tmp_path / "kernels").glob("*.partial"))


def test_a_compiler_older_than_the_cpu(fake_compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "best_level", lambda: "avx512bf16")
    old = script(tmp_path / "old", 'case "$*" in *-mavx512bf16*) exit 1 ;; esac', f'exec {fake_compiler} "$@"')
    build.load_library(old, tmp_path / "kernels")
    assert compilations(tmp_path) == 1 and len(list((tmp_path / "kernels").glob("*.so"))) == 1


def test_a_compiler_without_tile_registers(
    fake_compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(levels, "best_level", lambda: "amx")
    error = "echo 'unrecognized option' >&2; exit 1"
    old = script(tmp_path / "old", f'case "$*" in *-mamx-tile*) {error} ;; esac', f'exec {fake_compiler} "$@"')
    build.load_library(old, tmp_path / "kernels")
    assert [path.name.rpartition("-")[0] for path in (tmp_path / "kernels").glob("*.so")] == ["kernels-avx512bf16"]
    assert "tile registers (AMX)" in caplog.text and "unrecognized option" in caplog.text
    assert "install g++ 11 or later" in caplog.text


class Kernel:
    """The C library of a system that grants tile registers, or refuses them. `calls` are the system calls."""

    def __init__(self, grants: bool) -> None:
        self.grants = grants
        self.calls: list[tuple[int, ...]] = []

    def syscall(self, *arguments: int) -> int:
        self.calls.append(arguments)
        ctypes.set_errno(0 if self.grants else 95)
        return 0 if self.grants else -1


@pytest.mark.parametrize("grants", [True, False])
def test_the_system_is_asked_once_for_tile_registers(
    grants: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Kernel(grants)
    monkeypatch.setattr(levels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(levels, "cpu_features", lambda: frozenset(levels.LEVELS["amx"]))
    monkeypatch.setattr(levels.ctypes, "CDLL", lambda *_, **__: kernel)
    levels.may_use_tile_registers.cache_clear()
    try:
        found = [levels.levels_from_best()[0] for _ in range(3)]
    finally:
        levels.may_use_tile_registers.cache_clear()
    assert found == ["amx" if grants else "avx512bf16"] * 3
    assert kernel.calls == [(158, 0x1023, 18)]
    assert caplog.text.count(f"refuses them ({os.strerror(95)}); AVX-512 is used") == (0 if grants else 1)


def test_the_numbers_of_the_request_are_those_of_the_headers() -> None:
    headers = [Path("/usr/include/x86_64-linux-gnu/asm") / name for name in ("prctl.h", "unistd_64.h")]
    if not all(header.exists() for header in headers):
        pytest.skip("no headers of Linux")
    text = "".join(header.read_text() for header in headers)
    wanted = {"ARCH_REQ_XCOMP_PERM": levels._ARCH_REQ_XCOMP_PERM, "__NR_arch_prctl": levels._ARCH_PRCTL}
    for name, number in wanted.items():
        found = re.search(rf"#define {name}\s+(\w+)", text)
        if found is None:
            pytest.skip(f"headers older than {name}")
        assert int(found[1], 0) == number


@pytest.mark.skipif(platform.machine() != "x86_64", reason="about an instruction set of x86-64")
def test_the_compiler_makes_tile_instructions(tmp_path: Path) -> None:
    """The real instructions, which this CPU may not have, are in the machine code of the level "amx"."""
    library = tmp_path / "amx.so"
    try:
        command = build._find_compiler(None)
        build._run([*command, *build._flags("amx"), str(build.TRANSLATION_UNIT), "-o", str(library)], "failed")
    except build.CompilerError as error:
        if "option" not in str(error):
            raise
        pytest.skip(f"a compiler without AMX: {error}")
    except build.BuildError as error:
        pytest.skip(str(error))
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    text = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    for name in ("ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored"):
        assert re.search(rf"\t{name}\b", text), name
    products = re.findall(r"\ttdpbf16ps +(%tmm\d),(%tmm\d),(%tmm\d)", text)
    # A product has four sums, each of one of two registers of the input and one of two registers of the panel.
    assert len({sums for *_, sums in products}) == 4
    assert {("%tmm6", "%tmm4", "%tmm0"), ("%tmm7", "%tmm5", "%tmm3")} <= set(products)


def test_a_compiler_that_is_no_command() -> None:
    with pytest.raises(BackendError, match='compiler "c.. \'x" is no command: No closing quotation'):
        get_backend("cpu", kernels="native", compiler="c++ 'x")


def test_files_that_cannot_be_locked(
    fake_compiler: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(build.fcntl, "flock", refuse)
    backend = get_backend("cpu", kernels="auto", compiler=fake_compiler, kernel_dir=str(tmp_path / "kernels"))
    assert type(backend) is TorchBackend and "No locks available; plain torch is used" in caplog.text


def test_a_user_without_a_home(
    fake_compiler: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    build.load_library(fake_compiler)
    assert "kept (Could not determine home directory.); every start compiles the kernels anew" in caplog.text


def test_no_compiler_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert type(get_backend("cpu", kernels="auto")) is TorchBackend
    with pytest.raises(BackendError, match="no C.. compiler.*--kernels torch"):
        get_backend("cpu", kernels="native")
