"""doctor: no problem on a complete machine, a problem with a remedy that works for each thing that is missing."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from atb_pllava.__main__ import main
from atb_pllava.cli import doctor as command
from atb_pllava.cli.doctor import mindie_doctor, native_doctor
from atb_pllava.doctor import ascend_folders, machine, native, packages, required_packages
from atb_pllava.doctor.check import Check
from atb_pllava.doctor.machine import Room
from atb_pllava.doctor.native import NativeSetting
from atb_pllava.doctor.npu_smi import device_files
from atb_pllava.doctor.packages import Gpu, Torch
from atb_pllava.doctor.required_packages import PLUGIN_REQUIRED, REQUIRED
from atb_pllava.files import write_json
from atb_pllava.loader.checkpoint_config import config_from_json, read_config
from atb_pllava.loader.dummy_weights import dummy_quant_config
from atb_pllava.mindie import doctor, install, service_config
from atb_pllava.mindie.doctor import MindieSetting
from atb_pllava.mindie.host_files import host_config
from atb_pllava.model.published_sizes import PUBLISHED
from atb_pllava.ops.cpu.build import BuildError, load_library
from atb_pllava.ops.cpu.levels import best_level
from atb_pllava.ops.cuda.torch_builds import Driver
from atb_pllava.ops.host_memory import HostMemory
from atb_pllava.ops.int8 import QuantConfig
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.ops.registry import choose_dtype
from tests.host_sources import write_host
from tests.support import ROOT, TINY, raw_config, run_main, write_checkpoint

laptop = pytest.mark.skipif(bool(device_files()), reason="this machine has NPUs")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run_main(capsys, main, *arguments)


@laptop
def test_a_laptop_is_fine_for_the_native_engine(capsys, monkeypatch) -> None:
    monkeypatch.delenv("ATB_SPEED_HOME_PATH", raising=False)
    status, out, err = run(capsys, "doctor", "--model_path", TINY)
    assert status == 0 and "for the native engine:" in out and "no NPU found" in out and "FAIL" not in out and err == ""
    assert out.splitlines()[-1].startswith("the native engine can run here")


@laptop
@pytest.mark.parametrize("arguments", [("mindie", "doctor"), ("doctor", "--engine", "mindie")])
def test_a_laptop_is_not_for_mindie(capsys, monkeypatch, tmp_path, arguments) -> None:
    for name in ascend_folders.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ascend_folders, "DEFAULT", tmp_path / "Ascend")
    status, out, _ = run(capsys, *arguments)
    lines = out.splitlines()
    assert status == 1 and lines[-1] == "1 problem"
    assert lines[1].startswith("FAIL  machine") and "this is no Ascend machine" in lines[1] and "remedy: " in lines[2]
    assert not any(line.startswith("FAIL") for line in lines[2:])
    # What is prepared on a laptop is looked at all the same.
    _, out, _ = run(capsys, *arguments, "--model_path", "/nowhere", "--config", "/nowhere.json")
    assert "FAIL  model" in out and "FAIL  config" in out


def test_json_says_the_same(capsys) -> None:
    status, out, _ = run(capsys, "doctor", "--engine", "native", "--json", "--model_path", "/nowhere")
    answer = json.loads(out)
    rows = {row["check"]: row for row in answer["checks"]}
    assert status == 1 and answer["usable"] is False and answer["engine"] == "native"
    assert rows["model"]["status"] == "problem" and "/nowhere" in rows["model"]["found"]
    assert rows["Python"]["status"] == "ok" and "remedy" not in rows["Python"]


def test_a_reader_that_goes_away_is_no_error() -> None:
    arguments = [sys.executable, "-m", "atb_pllava", "mindie", "doctor", "--json"]
    running = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    with running:
        assert running.stderr.read() == "" and running.wait(timeout=120) == 141


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--world_size", "9"], "--world_size is 9"), (["--atb_llm", "/nowhere"], "'/nowhere' is no atb_llm")],
)
def test_a_wrong_question_is_status_2(capsys, arguments, message) -> None:
    status, out, err = run(capsys, "doctor", *arguments)
    assert status == 2 and message in err and out == ""


NPU_SMI = """#!/bin/sh
case "$*" in
"info -m") printf 'NPU ID Chip ID Chip Logic ID Chip Name\\n0 0 0 Ascend 910B4\\n1 0 1 Ascend 910B4\\n' ;;
*memory*) printf '\\tHBM Capacity(MB)   : 32768\\n' ;;
*usages*) printf '\\tHBM Usage Rate(%%)   : 5\\n' ;;
esac
"""
VERSIONS = {
    "torch": "2.6.0",
    "torch_npu": "2.6.0",
    "numpy": "1.26.4",
    "safetensors": "0.4.5",
    "tokenizers": "0.21.0",
    "av": "13.1.0",
    "pillow": "11.0.0",
    "cachetools": "5.5.0",
    "huggingface_hub": "0.30.0",
    "msgspec": "0.19.0",
    "tabulate": "0.9.0",
    "tqdm": "4.67.0",
}


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MindieSetting:
    """A MindIE machine with everything in its place, as files that the checks read."""
    cann = tmp_path / "cann"
    atb = tmp_path / "atb"
    for name, text in (
        ("Ascend/driver/version.info", "Version=24.1.0\n"),
        ("cann/x86_64-linux/ascend_toolkit_install.info", "version=8.2.RC1\n"),
        ("atb/lib/libatb.so", ""),
        ("host/lib/libatb_speed_torch.so", ""),
        ("bin/npu-smi", NPU_SMI),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bin" / "npu-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(ascend_folders, "DEFAULT", tmp_path / "Ascend")
    monkeypatch.setattr(ascend_folders, "INSTALL_INFO", tmp_path / "ascend_install.info")
    monkeypatch.setattr(packages, "installed", VERSIONS.get)
    monkeypatch.setattr(command, "look_at_torch", lambda on_npu: Torch("2.6.0"))
    monkeypatch.setattr(doctor, "_shared_memory", lambda: Check("shared memory", True, "1024 MiB"))
    host = write_host(tmp_path / "host")
    install.install(host, "link", [tmp_path])
    raw = {**raw_config(), "torch_dtype": "float16"}
    model = write_checkpoint(tmp_path / "small", raw)
    write_json(model / "config.json", host_config(raw, {}, config_from_json(raw), quantised=False), 0o640)
    lengths = service_config.plan_lengths(read_config(model), 1, None, None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = service_config.CachePlan(1, 2, 1)
    config = service_config.make_config(model, "pllava", lengths, cache, 1, port=min(port, 65000))
    write_json(tmp_path / "config.json", config, 0o640)
    for file in (model, *model.iterdir()):
        file.chmod(0o750 if file.is_dir() else 0o640)
    work = tmp_path / "work"
    work.mkdir(mode=0o755)
    monkeypatch.chdir(work)
    variables = {"ASCEND_TOOLKIT_HOME": str(cann), "ATB_HOME_PATH": str(atb), "ATB_SPEED_HOME_PATH": str(host.parent)}
    return MindieSetting(
        variables,
        str(model),
        devices=["/dev/davinci0", "/dev/davinci1"],
        atb_llm=host,
        sites=[tmp_path],
        config=str(tmp_path / "config.json"),
    )


def red(setting: MindieSetting) -> list[Check]:
    return [check for check in mindie_doctor(setting) if check.good is False]


def test_a_complete_machine_is_green(complete: MindieSetting) -> None:
    checks = {check.name: check for check in mindie_doctor(complete)}
    assert red(complete) == []
    assert checks["driver"].found.startswith("24.1.0") and checks["CANN"].found.startswith("8.2.RC1")
    assert "2.6.0" in checks["CANN and torch_npu"].found and checks["CANN and torch_npu"].good
    assert "card 1: Ascend 910B4, 31129 of 32768 MiB free" in checks["card"].found
    assert "a video's 8 tokens fit" in checks["config"].found


@pytest.mark.parametrize(
    ("variables", "name", "found", "remedy"),
    [
        ({"ATB_HOME_PATH": "/nowhere"}, "ATB", "/nowhere/lib/libatb.so is not there", "nnal/atb/set_env.sh"),
        ({"ASCEND_TOOLKIT_HOME": "/nowhere"}, "CANN", "/nowhere is not there", "set_env.sh"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,7"}, "visible cards", "0,7 of 0,1", "ASCEND_RT_VISIBLE_DEVICES"),
    ],
)
def test_a_variable_that_is_wrong(complete: MindieSetting, variables, name, found, remedy) -> None:
    (check,) = red(replace(complete, variables={**complete.variables, **variables}))
    assert check.name == name and found in check.found and remedy in check.remedy


def test_things_that_are_missing(complete: MindieSetting, monkeypatch, tmp_path) -> None:
    (check,) = red(replace(complete, devices=[]))
    assert check.name == "NPU" and check.found == "no NPU found"
    monkeypatch.setattr(packages, "installed", {**VERSIONS, "torch_npu": "2.5.1.post1"}.get)
    (check,) = red(complete)
    assert check.name == "torch_npu" and "2.5.1.post1 with torch 2.6.0" in check.found and "2.6.0" in check.remedy
    monkeypatch.setattr(packages, "installed", {**VERSIONS, "av": None}.get)
    (check,) = red(complete)
    assert check.name == "packages" and check.found.startswith("av missing in ") and "pip install av" in check.remedy
    monkeypatch.setattr(packages, "installed", VERSIONS.get)
    install.uninstall(complete.atb_llm, complete.sites)
    (check,) = red(complete)
    assert check.name == "plugin" and check.remedy == "python -m atb_pllava mindie install"


def test_a_config_that_is_too_small(complete: MindieSetting) -> None:
    assert complete.config is not None
    config = json.loads(Path(complete.config).read_text())
    config["BackendConfig"]["ModelDeployConfig"]["maxInputTokenLen"] = 70
    write_json(complete.config, config, 0o640)
    (check,) = red(complete)
    assert check.name == "config" and "one video alone is 8 tokens" in check.found and "72" in check.remedy
    Path(complete.config).write_text("{")
    assert "not valid JSON" in red(complete)[0].found


def test_the_chmod_it_prints_is_the_one_that_helps(complete: MindieSetting, tmp_path) -> None:
    assert complete.model_path is not None and complete.config is not None
    odd = Path(complete.model_path, "it's odd.json")
    odd.write_text("{}")
    for path in (Path(complete.model_path), odd, Path(complete.config), Path.cwd()):
        path.chmod(0o777)
    found = red(complete)
    assert len(found) == 4 and {check.name for check in found} == {"permissions"}
    assert f"chmod 640 {shlex.quote(complete.config)}" in [check.remedy for check in found]
    for check in found:
        subprocess.run(check.remedy, shell=True, check=True)
    assert red(complete) == []
    off = {**complete.variables, "MINDIE_CHECK_INPUTFILES_PERMISSION": "0"}
    odd.chmod(0o777)
    assert red(replace(complete, variables=off)) == []


def test_a_port_that_is_taken(complete: MindieSetting) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (check,) = red(replace(complete, port=port))
    assert check.name == "ports" and check.found == f"{port}: in use" and "--port" in check.remedy


def test_a_torch_that_cannot_be_imported_is_explained(tmp_path, monkeypatch) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('Failed to load the backend extension: torch_npu.')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = packages.torch_check(packages.look_at_torch(on_npu=False))
    assert check.good is False and "backend extension" in check.found
    assert "set_env.sh" in check.remedy and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in check.remedy


def test_doctor_runs_where_torch_does_not(tmp_path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('broken')\n")
    done = subprocess.run(
        [sys.executable, "-m", "atb_pllava", "doctor", "--engine", "native"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 1 and "FAIL  import torch" in done.stdout and done.stderr == ""


# Custom folders of Ascend's


@pytest.mark.parametrize("way", ["install_info", "variable", "library_path"])
def test_a_driver_in_another_folder(complete: MindieSetting, tmp_path, way) -> None:
    (tmp_path / "Ascend").rename(tmp_path / "elsewhere")
    (check,) = red(complete)
    assert check.name == "driver" and str(tmp_path / "Ascend" / "driver") in check.found
    variables = {**complete.variables}
    if way == "install_info":
        ascend_folders.INSTALL_INFO.write_text(f"UserName=HwHiAiUser\nDriver_Install_Path_Param={tmp_path}/elsewhere\n")
    elif way == "variable":
        variables["ASCEND_HOME_PATH"] = f"{tmp_path}/elsewhere/ascend-toolkit/latest"
    else:
        variables["LD_LIBRARY_PATH"] = f":/lib:{tmp_path}/elsewhere/driver/lib64/common"
    assert red(replace(complete, variables=variables)) == []


def test_the_remedy_names_the_script_that_is_there(complete: MindieSetting, tmp_path) -> None:
    without = {name: value for name, value in complete.variables.items() if name != "ASCEND_TOOLKIT_HOME"}
    (check,) = red(replace(complete, variables=without))
    assert check.name == "CANN" and f"not found in {tmp_path / 'Ascend'}" in check.remedy
    assert "--install-path=DIR it is DIR/ascend-toolkit/set_env.sh or DIR/cann/set_env.sh" in check.remedy
    for home, script in (("user", "user/Ascend/ascend-toolkit/set_env.sh"), (".", "Ascend/cann/set_env.sh")):
        (tmp_path / script).parent.mkdir(parents=True)
        (tmp_path / script).write_text("")
        (check,) = red(replace(complete, variables={**without, "HOME": str(tmp_path / home)}))
        assert check.remedy == f"source {tmp_path / script}"


# The native engine


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> NativeSetting:
    """A machine without NPU and GPU."""
    monkeypatch.setattr(command, "look_at_torch", lambda on_npu: Torch("2.13.0+cpu"))
    monkeypatch.setattr(native, "sees_nvidia_gpu", lambda: False)
    return NativeSetting({}, devices=[])


def named(setting: NativeSetting, name: str) -> list[Check]:
    return [check for check in native_doctor(setting) if check.name == name]


def shape(size: str, int8: bool = False) -> machine.Model:
    config = config_from_json(PUBLISHED[size])
    return machine.Model(config, dummy_quant_config(config) if int8 else QuantConfig(), Path(f"/models/pllava-{size}"))


def memory(free: float, model: machine.Model, world_size: int = 1, **more: object) -> Check:
    """The line about memory with `free` of 64 GB free. A GB is 10^9 bytes."""
    room = replace(Room("memory", int(free * 1e9), 64 * 10**9, "cpu"), **more)  # type: ignore[arg-type]
    return next(machine.memory_checks(room, model, world_size))


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_native_bfloat16", lambda: True)


@pytest.mark.usefixtures("with_bfloat16")
def test_memory_is_compared_with_the_checkpoint() -> None:
    enough = memory(17.3, shape("7b"))
    short = memory(17.0, shape("7b"))
    assert enough.good and "14.1 for weights in bfloat16" in enough.found and "17.3 of 64.0 GB" in enough.found
    assert short.good is False and "about 17.2 GB needed for one video at a time" in short.found
    assert "end other programs: 0.2 GB more must be free" in short.remedy
    assert "8-bit weights need 10.7 GB" in short.remedy
    assert "-src /models/pllava-7b -dst /models/pllava-7b-w8a16 -type pllava_w8a16" in short.remedy
    assert memory(10.8, shape("7b", int8=True)).good and not memory(10.5, shape("7b", int8=True)).good
    assert "W8A16" in memory(10.5, shape("7b", int8=True)).found
    never = memory(60, shape("34b"), total=10**10)
    assert not never.good and never.remedy == "a machine with 71.2 GB free"


def test_a_cpu_without_bfloat16_needs_twice_the_memory(monkeypatch) -> None:
    monkeypatch.setattr(machine, "has_native_bfloat16", lambda: False)
    short = memory(20, shape("7b"))
    assert not short.good and "28.2 for weights in float32" in short.found
    assert "--dtype bfloat16 needs 17.2 GB; this CPU computes it slowly" in short.remedy


def test_the_dtype_is_the_one_that_auto_takes() -> None:
    config = config_from_json(PUBLISHED["7b"])
    chosen = choose_dtype("auto", "float16", TorchBackend())
    assert machine.auto_dtype(config, "cpu") == str(chosen).removeprefix("torch.")
    assert machine.auto_dtype(config, "cuda") == machine.auto_dtype(config, "ascend") == "bfloat16"
    wide = replace(config, dtype="float32")
    assert (machine.auto_dtype(wide, "cuda"), machine.auto_dtype(wide, "ascend")) == ("float32", "float16")


@pytest.mark.usefixtures("with_bfloat16")
def test_devices_divide_a_model_and_ranks_on_a_cpu_do_not() -> None:
    assert not memory(17.0, shape("7b"), 4).good  # a CPU's ranks share its memory
    card = {"where": "card 0", "backend": "ascend"}
    alone = memory(12, shape("7b"), **card)
    assert not alone.good and "--world_size 2" in alone.remedy and "end other programs" in alone.remedy
    split = memory(12, shape("7b"), 2, **card)
    assert split.good and "on each of 2 devices" in split.found


@pytest.mark.usefixtures("with_bfloat16")
def test_the_limit_of_a_container_is_named() -> None:
    check = memory(3, shape("7b"), total=4 * 10**9, limited_by="/sys/fs/cgroup/memory.max")
    assert "limit of this container: /sys/fs/cgroup/memory.max" in check.found
    assert "docker run --memory=17g" in check.remedy and "end other programs" not in check.remedy


@pytest.mark.usefixtures("with_bfloat16")
def test_a_full_batch_that_does_not_fit_is_said_and_no_problem() -> None:
    room = Room("memory", 20 * 10**9, 64 * 10**9, "cpu")
    _, full = machine.memory_checks(room, shape("7b"), 1)
    assert full.status == "info" and "34.7 GB for 8 requests" in full.found and "the others wait" in full.found
    _, full = machine.memory_checks(replace(room, free=40 * 10**9), shape("7b"), 1)
    assert full.status == "ok"


def test_memory_without_a_model_is_what_there_is(on_cpu: NativeSetting, monkeypatch) -> None:
    monkeypatch.setattr(native, "host_memory", lambda: HostMemory(8 * 10**9, 5 * 10**9))
    (check,) = named(on_cpu, "memory")
    assert check.status == "info" and check.found.startswith("5.0 of 8.0 GB of memory free; --model_path")
    (check,) = named(replace(on_cpu, model_path=str(TINY)), "memory")
    assert check.status == "ok"
    monkeypatch.setattr(native, "host_memory", lambda: HostMemory(8 * 10**9, 10**8))
    (check,) = named(replace(on_cpu, model_path=str(TINY)), "memory")
    assert check.status == "problem" and "end other programs" in check.remedy


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false", "echo 'not closed"])
def test_no_compiler_is_a_warning(on_cpu: NativeSetting, compiler: str) -> None:
    (check,) = named(replace(on_cpu, compiler=compiler), "CPU kernels")
    assert check.status == "warning" and "several times slower" in check.found and "CXX" in check.remedy


def test_a_compiler_without_headers_or_linker_is_found_out(on_cpu: NativeSetting, tmp_path) -> None:
    compiler = tmp_path / "c++"
    lines = ("#!/bin/sh", '[ "$1" = --version ] && exit 0', "echo 'fatal error: atomic: No such file' >&2", "exit 1")
    compiler.write_text("\n".join(lines) + "\n")
    compiler.chmod(0o755)
    (check,) = named(replace(on_cpu, compiler=str(compiler), kernel_dir=str(tmp_path)), "CPU kernels")
    assert check.status == "warning" and "fatal error: atomic: No such file" in check.found
    assert list(tmp_path.iterdir()) == [compiler]


def test_a_compiler_that_is_older_than_the_cpu(on_cpu: NativeSetting, tmp_path) -> None:
    best = best_level()
    real = shutil.which("c++") or shutil.which("g++")
    if best == "portable" or real is None:
        pytest.skip("every compiler supports this CPU, or there is none")
    compiler = tmp_path / "c++"
    lines = ("#!/bin/sh", 'case "$*" in *-mavx2*) exit 1 ;; esac', f'exec {real} "$@"')
    compiler.write_text("\n".join(lines) + "\n")
    compiler.chmod(0o755)
    (check,) = named(replace(on_cpu, compiler=str(compiler), kernel_dir=str(tmp_path / "kernels")), "CPU kernels")
    assert check.status == "warning" and "install a newer C++ compiler" in check.remedy
    assert f"can compile them for portable, about 10 s at the first start; this CPU has {best}" in check.found


def test_a_compiler_that_works_and_a_library_that_is_there(on_cpu: NativeSetting, tmp_path) -> None:
    setting = replace(on_cpu, kernel_dir=str(tmp_path / "kernels"))
    try:
        load_library(None, tmp_path / "made")
    except BuildError as error:
        pytest.skip(str(error))
    (check,) = named(setting, "CPU kernels")
    assert (
        check.status == "ok"
        and f"can compile them for {best_level()}" in check.found
        and not (tmp_path / "kernels").exists()
    )
    (check,) = named(replace(setting, kernel_dir=str(tmp_path / "made")), "CPU kernels")
    (library,) = (tmp_path / "made").glob("*.so")
    assert check.found == f"compiled: {library}"


def test_warnings_are_counted_and_change_no_status(capsys, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    status, out, _ = run(capsys, "doctor", "--engine", "native")
    lines = out.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("warn  CPU kernels")]
    assert status == 0 and "remedy: " in lines[at + 1] and lines[-1] == "the native engine can run here, with 1 warning"
    status, out, _ = run(capsys, "doctor", "--engine", "native", "--json")
    rows = {row["check"]: row for row in json.loads(out)["checks"]}
    assert status == 0 and rows["CPU kernels"]["status"] == "warning" and "CXX" in rows["CPU kernels"]["remedy"]


def usage(free: int) -> SimpleNamespace:
    """What shutil.disk_usage returns."""
    return SimpleNamespace(total=10**12, used=10**12 - free, free=free)


def test_the_kernel_cache(tmp_path, monkeypatch) -> None:
    assert machine.cache_check(str(tmp_path / "a" / "b")).status == "ok" and not (tmp_path / "a").exists()
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(10**6))
    full = machine.cache_check(str(tmp_path))
    assert full.status == "warning" and "0.001 GB free" in full.found
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert "kernels are compiled at every start" in machine.cache_check(str(tmp_path)).found


def test_the_disk_for_a_download_and_for_a_conversion(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(14 * 10**9))
    far = machine.published_model("ermu2001/pllava-7b")
    assert far is not None
    check = machine.disk_check(far, "ermu2001/pllava-7b")
    assert check.status == "problem" and "the download takes 14.3 GB, 14.0 GB are free" in check.found
    (tmp_path / "model.safetensors").write_bytes(b"1" * 10**6)
    here = replace(shape("7b"), path=tmp_path)
    check = machine.disk_check(here, "m")
    assert check.status == "ok" and "7.6 GB (pllava_w8a16) or 14.1 (pllava_merged)" in check.found
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(7 * 10**9))
    assert machine.disk_check(here, "m").status == "warning"
    assert "in 8 bits already" in machine.disk_check(replace(shape("7b", int8=True), path=tmp_path), "m").found


def test_a_name_of_the_hub_is_compared_without_a_download(on_cpu: NativeSetting) -> None:
    checks = {check.name: check for check in native_doctor(replace(on_cpu, model_path="ermu2001/pllava-7b"))}
    assert checks["model"].status == "problem" and "the download takes 14.3 GB" in checks["disk"].found
    assert "for weights in" in checks["memory"].found


def test_a_checkpoint_is_read_by_its_headers(on_cpu: NativeSetting, tmp_path) -> None:
    directory = write_checkpoint(tmp_path / "m", raw_config())
    (check,) = named(replace(on_cpu, model_path=str(directory)), "model")
    assert check.status == "ok" and "2 layers of 64, 8 tokens a video, float32" in check.found
    (check,) = named(replace(on_cpu, model_path=str(directory), world_size=3), "model")
    assert check.status == "problem" and "2 KV heads" in check.found
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[:-5])
    (check,) = named(replace(on_cpu, model_path=str(directory)), "model")
    assert check.status == "problem" and "truncated" in check.found and "download the directory again" in check.remedy
    assert "\n" not in check.found
    (check,) = named(replace(on_cpu, model_path=str(directory)), "memory")
    assert check.status == "info" and check.found.endswith("what this checkpoint needs is not known")
    (directory / "model.safetensors").unlink()
    (check,) = named(replace(on_cpu, model_path=str(directory)), "model")
    assert check.status == "problem" and "no model.safetensors" in check.found


def test_a_gpu_is_what_the_model_goes_to(on_cpu: NativeSetting, monkeypatch) -> None:
    gpu = Gpu("NVIDIA H100", 70 * 10**9, 80 * 10**9)
    monkeypatch.setattr(command, "look_at_torch", lambda on_npu: Torch("2.13.0", "12.8", (gpu,)))
    checks = {check.name: check for check in native_doctor(replace(on_cpu, model_path=str(TINY)))}
    assert checks["GPU"].found == "0: NVIDIA H100, 70.0 of 80.0 GB free"
    assert "70.0 of 80.0 GB of GPU 0" in checks["memory"].found
    assert "CPU kernels" not in checks and "kernel cache" not in checks
    small = memory(12, shape("7b"), where="GPU 0", backend="cuda")
    assert not small.good and "--world_size 2" in small.remedy


@pytest.mark.parametrize(
    ("free", "has_nccl", "status", "found"),
    [
        ([70], True, "problem", "1 visible to torch, 2 wanted"),
        ([70, 60], False, "problem", "torch 2.13.0 was built without NCCL"),
        ([70, 60, 50], True, "ok", "2 of 3 GPUs"),
    ],
)
def test_each_rank_needs_a_gpu(on_cpu: NativeSetting, monkeypatch, free, has_nccl, status, found) -> None:
    gpus = tuple(Gpu("NVIDIA H100", size * 10**9, 80 * 10**9) for size in free)
    monkeypatch.setattr(command, "look_at_torch", lambda on_npu: Torch("2.13.0", "12.8", gpus, has_nccl=has_nccl))
    checks = {check.name: check for check in native_doctor(replace(on_cpu, model_path=str(TINY), world_size=2))}
    assert checks["world size"].status == status and checks["world size"].found == found
    fullest = len(free[:2]) - 1
    assert f"{free[fullest]}.0 of 80.0 GB of GPU {fullest} free" in checks["memory"].found


@pytest.mark.parametrize(
    ("torch", "driver", "status", "words", "remedy"),
    [
        (Torch("2.13.0+cpu"), None, "info", "no CUDA GPU found", ""),
        (
            Torch("2.13.0+cpu"),
            Driver(580, (13, 0)),
            "warning",
            "580 for CUDA 13.0 is here, but torch",
            "torch==2.13.0+cu130",
        ),
        (
            Torch("2.13.0", "13.0"),
            Driver(550, (12, 4)),
            "warning",
            "is too new for NVIDIA's driver",
            "torch==2.13.0+cu126",
        ),
        (Torch("2.13.0", "12.8"), Driver(550, (12, 4)), "warning", "finds no GPU that it can use", "--gpus all"),
    ],
)
def test_a_driver_and_a_torch_that_do_not_match(torch, driver, status, words, remedy) -> None:
    (check,) = packages.gpu_checks(torch, driver)
    assert check.status == status and words in check.found and remedy in check.remedy


def test_an_npu_is_what_the_model_goes_to(complete: MindieSetting) -> None:
    setting = NativeSetting(complete.variables, str(TINY), devices=complete.devices)
    checks = {check.name: check for check in native_doctor(setting)}
    assert checks["memory"].found.startswith("32.6 of 34.4 GB of card 0 free") and "CPU kernels" not in checks
    busy = replace(setting, variables={**setting.variables, "ASCEND_RT_VISIBLE_DEVICES": "1"})
    assert {check.name: check for check in native_doctor(busy)}["memory"].found.startswith(
        "32.6 of 34.4 GB of card 1 free"
    )


# Packages


def clone_with_venv(folder: Path, missing: str) -> Path:
    """A clone whose .venv can import all modules but `missing`."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "run_pa.sh").write_text("")
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nfor name; do [ "$name" != "{missing}" ] || exit 1; done\n')
    python.chmod(0o755)
    return folder


def test_the_venv_of_the_clone_is_known(tmp_path, monkeypatch) -> None:
    clone = clone_with_venv(tmp_path / "clone", missing="none")
    monkeypatch.chdir(clone)
    check = packages.packages_check({"torch": None, "numpy": "2.4.6"}, clone)
    assert check.status == "problem" and check.found.startswith("torch missing in ")
    assert check.remedy.startswith("source .venv/bin/activate ") and "or run .venv/bin/python" in check.remedy
    monkeypatch.chdir(tmp_path)
    assert "source clone/.venv/bin/activate" in packages.packages_check({"torch": None}, clone).remedy
    monkeypatch.chdir("/usr")
    assert f"source {clone}/.venv/bin/activate" in packages.packages_check({"torch": None}, clone).remedy


def test_without_a_venv_that_has_them(tmp_path, monkeypatch) -> None:
    lacking = clone_with_venv(tmp_path / "clone", missing="PIL")
    monkeypatch.chdir(lacking)
    remedy = packages.packages_check({"pillow": None, "av": None}, lacking).remedy
    assert remedy.startswith("bash run_pa.sh --run makes a .venv") and remedy.endswith("-m pip install pillow av")
    installed_package = tmp_path / "site-packages"
    assert packages.packages_check({"av": None}, installed_package).remedy == f"{sys.executable} -m pip install av"
    assert packages.packages_check({"av": "17"}, lacking).status == "ok"


def test_another_interpreters_packages_are_found(tmp_path) -> None:
    clone = tmp_path / "clone"
    assert not required_packages.venv_has(clone, ["numpy"])  # there is no .venv
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert required_packages.venv_has(clone, ["numpy", "PIL"])
    assert not required_packages.venv_has(clone, ["numpy", "no_such_module"])


def test_this_interpreter_is_no_other_one(tmp_path, monkeypatch) -> None:
    clone = clone_with_venv(tmp_path / "clone", missing="none")
    monkeypatch.setattr(sys, "executable", str(clone / ".venv" / "bin" / "python"))
    assert not required_packages.venv_has(clone, ["numpy"])


def test_all_missing_packages_are_one_sentence(tmp_path, monkeypatch) -> None:
    absent = {"msgspec", "tqdm"}
    monkeypatch.setattr(required_packages, "CLONE", tmp_path)
    monkeypatch.setattr(required_packages, "find_spec", lambda name: None if name in absent else name)
    both = required_packages.missing_package("tqdm")
    assert both.startswith("msgspec, tqdm are missing in ") and both.endswith("-m pip install msgspec tqdm")
    other = required_packages.missing_package("openai")
    assert other.startswith("openai is missing in ") and other.endswith("-m pip install openai")
    clone_with_venv(tmp_path, missing="none")
    assert "this clone's .venv has them: source " in required_packages.missing_package("tqdm")


def test_each_engine_wants_its_own_packages(complete: MindieSetting, on_cpu: NativeSetting, monkeypatch) -> None:
    """The plugin inside MindIE imports none of the packages that only the native engine needs."""
    extra = [package for package in REQUIRED.values() if package not in PLUGIN_REQUIRED.values()]
    assert set(extra) == {"cachetools", "huggingface_hub", "msgspec", "tabulate", "tqdm"}
    monkeypatch.setattr(packages, "installed", {**VERSIONS, **dict.fromkeys(extra)}.get)
    assert red(complete) == []
    (check,) = named(on_cpu, "packages")
    assert check.status == "problem" and check.found.startswith(f"{', '.join(extra)} missing in ")


@pytest.mark.parametrize("option", ["--config", "--site", "--atb_llm", "--port"])
def test_options_of_mindie_are_not_ignored_by_the_native_checks(capsys, tmp_path, option) -> None:
    value = {"--port": "1025", "--atb_llm": write_host(tmp_path)}.get(option, tmp_path)
    status, out, err = run(capsys, "doctor", "--engine", "native", option, value)
    assert status == 2 and out == "" and f"{option} is about MindIE" in err and "--engine mindie" in err


def test_doctor_runs_where_another_package_is_missing(on_cpu: NativeSetting, monkeypatch) -> None:
    monkeypatch.setattr(packages, "installed", {**VERSIONS, "safetensors": None}.get)
    checks = {check.name: check for check in native_doctor(replace(on_cpu, model_path=str(TINY)))}
    assert checks["packages"].status == "problem" and checks["model"].status == "ok"
    assert checks["memory"].status == "info" and "are looked at with all packages" in checks["memory"].found


def test_companions_and_links_to_nothing_do_not_count(checkpoint: Path, tmp_path: Path, capsys) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    assert main(["doctor", "--engine", "native", "--model_path", str(model), "--json"]) in (0, 1)
    before = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["check"] == "disk"]
    (model / "consolidated.safetensors").symlink_to("/nowhere/consolidated.safetensors")
    (model / "._model.safetensors").write_bytes(bytes(10_000_000))
    assert main(["doctor", "--engine", "native", "--model_path", str(model), "--json"]) in (0, 1)
    after = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["check"] == "disk"]
    assert [check["found"].split(";")[0] for check in after] == [check["found"].split(";")[0] for check in before] != []
