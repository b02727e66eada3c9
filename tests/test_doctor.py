"""doctor: green where all is well, red with a remedy that works for each thing that is not, plain words on a laptop."""

import json
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import raw_config, write_checkpoint
from host_sources import write_host

from atb_pllava.__main__ import main
from atb_pllava.config import PllavaConfig
from atb_pllava.convert import host_config
from atb_pllava.json_file import write_json
from atb_pllava.mindie import doctor, install, service_config
from atb_pllava.mindie.cards import device_files
from atb_pllava.mindie.doctor import Check, Setting, examine

laptop = pytest.mark.skipif(bool(device_files()), reason="this machine has NPUs")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@laptop
def test_a_laptop_is_fine_for_the_native_engine(capsys, monkeypatch) -> None:
    monkeypatch.delenv("ATB_SPEED_HOME_PATH", raising=False)
    status, out, _ = run(capsys, "doctor")
    assert status == 0 and "for the native engine:" in out and "no NPU found" in out and "FAIL" not in out
    assert out.splitlines()[-1] == "the native engine can run here"


@laptop
@pytest.mark.parametrize("arguments", [("mindie", "doctor"), ("doctor", "--engine", "mindie")])
def test_a_laptop_is_not_for_mindie(capsys, monkeypatch, arguments) -> None:
    for name in ("ATB_SPEED_HOME_PATH", "ATB_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name, raising=False)
    status, out, _ = run(capsys, *arguments)
    lines = out.splitlines()
    red = [i for i, line in enumerate(lines) if line.startswith("FAIL")]
    assert status == 1 and lines[-1] == f"{len(red)} problems"
    for words in ("no NPU found", "ATB_SPEED_HOME_PATH is not set"):
        assert any(words in lines[i] for i in red)
    assert all("remedy: " in lines[i + 1] for i in red)


def test_json_says_the_same(capsys) -> None:
    status, out, _ = run(capsys, "doctor", "--engine", "native", "--json", "--model_path", "/nowhere")
    answer = json.loads(out)
    rows = {row["check"]: row for row in answer["checks"]}
    assert status == 1 and answer["usable"] is False and answer["engine"] == "native"
    assert rows["model"]["status"] == "problem" and "/nowhere" in rows["model"]["found"]
    assert rows["Python"]["status"] == "ok" and "remedy" not in rows["Python"]


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
VERSIONS = {"torch": "2.6.0", "torch_npu": "2.6.0", "numpy": "1.26.4", "safetensors": "0.4.5", "tokenizers": "0.21.0",
            "av": "13.1.0", "pillow": "11.0.0"}  # fmt: skip


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """A MindIE machine with everything in its place, as files that the checks read."""
    driver, cann, atb = tmp_path / "version.info", tmp_path / "cann", tmp_path / "atb"
    driver.write_text("Version=24.1.0\n")
    for name, text in (
        ("cann/x86_64-linux/ascend_toolkit_install.info", "version=8.2.RC1\n"), ("atb/lib/libatb.so", ""),
        ("host/lib/libatb_speed_torch.so", ""), ("bin/npu-smi", NPU_SMI),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bin" / "npu-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(doctor, "DRIVER", driver)
    monkeypatch.setattr(doctor, "_installed", VERSIONS.get)
    monkeypatch.setattr(doctor, "_torch", lambda setting: Check("import torch", True, "2.6.0"))
    monkeypatch.setattr(doctor, "_shared_memory", lambda: Check("shared memory", True, "1024 MiB"))
    host = write_host(tmp_path / "host")
    install.install(host, "link", [tmp_path])
    raw = {**raw_config(), "torch_dtype": "float16"}
    model = write_checkpoint(tmp_path / "small", raw)
    write_json(model / "config.json", host_config(raw, {}, PllavaConfig.from_json(raw), quantised=False), 0o640)
    lengths = service_config.plan_lengths(PllavaConfig.from_dir(model), 1, None, None)
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
    return Setting("mindie", variables, host, [tmp_path], str(model), str(tmp_path / "config.json"), 1, None,
                   ["/dev/davinci0", "/dev/davinci1"])  # fmt: skip


def red(setting: Setting) -> list[Check]:
    return [check for check in examine(setting) if check.good is False]


def test_a_complete_machine_is_green(complete: Setting) -> None:
    checks = {check.name: check for check in examine(complete)}
    assert red(complete) == []
    assert checks["driver"].found == "24.1.0" and checks["CANN"].found.startswith("8.2.RC1")
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
def test_a_variable_that_is_wrong(complete: Setting, variables, name, found, remedy) -> None:
    (check,) = red(replace(complete, variables={**complete.variables, **variables}))
    assert check.name == name and found in check.found and remedy in check.remedy


def test_things_that_are_missing(complete: Setting, monkeypatch, tmp_path) -> None:
    (check,) = red(replace(complete, devices=[]))
    assert check.name == "NPU" and check.found == "no NPU found"
    monkeypatch.setattr(doctor, "_installed", {**VERSIONS, "torch_npu": "2.5.1.post1"}.get)
    (check,) = red(complete)
    assert check.name == "torch_npu" and "2.5.1.post1 with torch 2.6.0" in check.found and "2.6.0" in check.remedy
    monkeypatch.setattr(doctor, "_installed", {**VERSIONS, "av": None}.get)
    (check,) = red(complete)
    assert check.name == "packages" and check.found == "av missing" and check.remedy.endswith("pip install av")
    monkeypatch.setattr(doctor, "_installed", VERSIONS.get)
    install.uninstall(complete.atb_llm, complete.sites)
    (check,) = red(complete)
    assert check.name == "plugin" and check.remedy == "python -m atb_pllava mindie install"


def test_a_config_that_is_too_small(complete: Setting) -> None:
    assert complete.config is not None
    config = json.loads(Path(complete.config).read_text())
    config["BackendConfig"]["ModelDeployConfig"]["maxInputTokenLen"] = 70
    write_json(complete.config, config, 0o640)
    (check,) = red(complete)
    assert check.name == "config" and "one video alone is 8 tokens" in check.found and "72" in check.remedy
    Path(complete.config).write_text("{")
    assert "not valid JSON" in red(complete)[0].found


def test_the_chmod_it_prints_is_the_one_that_helps(complete: Setting, tmp_path) -> None:
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


def test_a_port_that_is_taken(complete: Setting) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (check,) = red(replace(complete, port=port))
    assert check.name == "ports" and check.found == f"{port}: in use" and "--port" in check.remedy


def test_a_torch_that_cannot_be_imported_is_explained(tmp_path, monkeypatch) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('Failed to load the backend extension: torch_npu.')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor._torch(Setting("native", {}, devices=[]))
    assert check.good is False and "backend extension" in check.found
    assert "set_env.sh" in check.remedy and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in check.remedy


def test_doctor_runs_where_torch_does_not(tmp_path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('broken')\n")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "atb_pllava", "doctor", "--engine", "native"], capture_output=True, text=True, cwd=root,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=120)  # fmt: skip
    assert done.returncode == 1 and "FAIL  import torch" in done.stdout and done.stderr == ""
