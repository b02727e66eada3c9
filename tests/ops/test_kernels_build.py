"""How the CPU kernels are compiled, kept, and replaced by plain torch where there is no library."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atb_pllava.errors import BackendError
from atb_pllava.ops.cpu import build
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.ops.registry import get_backend


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
    assert len(list(folder.glob("*.so"))) == (2 if build.best_level() == "portable" else 3)
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
    names = {build._library_name([fake_compiler], [])}
    for file in files:
        file.write_text(file.read_text() + "// changed\n")
        names.add(build._library_name([fake_compiler], []))
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
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('build', sys.argv[1])\n"
        "build = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(build)\n"
        "build.load_library(sys.argv[2], sys.argv[3])\n"
    )
    command = [sys.executable, "-c", program, build.__file__, fake_compiler, str(tmp_path / "kernels")]
    processes = [subprocess.Popen(command) for _ in range(3)]
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
    monkeypatch.setattr(build, "best_level", lambda: "avx512bf16")
    old = script(tmp_path / "old", 'case "$*" in *-mavx512bf16*) exit 1 ;; esac', f'exec {fake_compiler} "$@"')
    build.load_library(old, tmp_path / "kernels")
    assert compilations(tmp_path) == 1 and len(list((tmp_path / "kernels").glob("*.so"))) == 1


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
