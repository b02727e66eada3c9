"""MindIE Service's config.json: valid by MindIE's own tables, long enough for the videos, within the cards' memory."""

import json
import math
import os
import re
import stat
from pathlib import Path

import pytest
import torch

from atb_pllava.__main__ import main
from atb_pllava.config import PllavaConfig
from atb_pllava.doctor.npu_smi import list_cards
from atb_pllava.engine.memory_estimate import working_bytes
from atb_pllava.errors import ConfigError, counted
from atb_pllava.loader.checkpoint_config import config_from_json, read_config
from atb_pllava.loader.dummy_weights import dummy_quant_config
from atb_pllava.mindie import service_config as service
from atb_pllava.mindie.host_checks import check_world_size
from atb_pllava.mindie.host_files import host_config
from atb_pllava.mindie.host_model import SPLIT_TENSORS, weight_bytes
from atb_pllava.model.pllava import Pllava
from atb_pllava.model.published_sizes import PUBLISHED
from atb_pllava.ops.int8 import QuantConfig
from atb_pllava.ops.reference import TorchBackend
from tests.support import ROOT, raw_config, run_main, write_checkpoint

GIB = 2**30
B7 = config_from_json(PUBLISHED["7b"])
B34 = config_from_json(PUBLISHED["34b"])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small directory as convert_quant_weights.sh makes them."""
    raw = raw_config()
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / "small", raw)
    config = host_config({**raw, "torch_dtype": "float16"}, {}, config_from_json(raw), quantised=False)
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    return directory


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run_main(capsys, main, "mindie", "config", *arguments)


def parts(config: dict) -> tuple[dict, dict, dict]:
    deploy = config["BackendConfig"]["ModelDeployConfig"]
    return deploy, deploy["ModelConfig"][0], config["BackendConfig"]["ScheduleConfig"]


def test_seven_billion_on_a_64_gib_card() -> None:
    lengths = service.plan_lengths(B7, 1, None, None)
    assert (lengths.input, lengths.output) == (2304 + 512, 512)
    # 32 layers, 32 heads of 128, keys and values, 2 bytes: 512 KiB a token
    assert service.kv_bytes_per_token(B7, 1) == 512 * 1024 and service.kv_bytes_per_token(B7, 3) == 176 * 1024
    cache = service.plan_cache(B7, lengths, 1, 36.9 * GIB, None)
    assert cache.gib == 36 and cache.request_bytes == (22 + 4) * 128 * 512 * 1024  # 1.625 GiB
    assert cache.requests == 22 and cache.requests * cache.request_bytes <= cache.gib * GIB
    config = service.make_config("/models/pllava-7b", "pllava", lengths, cache, 1)
    deploy, one, schedule = parts(config)
    assert deploy["maxSeqLen"] == 3328 and deploy["maxInputTokenLen"] == 2816 and schedule["maxPrefillTokens"] == 8192
    assert schedule["maxPrefillBatchSize"] == 2 and schedule["maxBatchSize"] == 22 and schedule["maxIterTimes"] == 512
    # The manual's formula for media: 4 * layers * kv_heads * head_dim * batch * length / cards, in whole GiB.
    needed = 4 * 32 * 32 * 128 * schedule["maxPrefillBatchSize"] * deploy["maxSeqLen"] / GIB
    assert one["npuMemSize"] >= needed


def test_grouped_heads_on_four_cards() -> None:
    lengths = service.plan_lengths(B34, 1, None, None)
    assert service.kv_bytes_per_token(B34, 4) == 2 * 2 * 60 * 2 * 128
    cache = service.plan_cache(B34, lengths, 4, 10 * GIB, 3)
    assert cache.requests == 3 and cache.gib == 1
    with pytest.raises(ConfigError, match=r"of 1 request of 3328 tokens takes 1\.62 GiB .* 1\.50 GiB are left"):
        service.plan_cache(B7, lengths, 1, 1.5 * GIB, None)


def test_lengths_follow_what_is_asked_and_what_the_model_has() -> None:
    small = B7.with_video(8, (8, 12, 12))
    assert service.plan_lengths(small, 2, None, None).input == 2304 + 512
    assert service.plan_lengths(B7, 1, 100, 50) == service.Lengths(2404, 50)
    full = service.plan_lengths(B7.with_video(26, (26, 12, 12)), 1, None, None)  # 3744 tokens of 4096
    assert full.total == 4096 and full.output == 176
    for bad in ({"videos": 0}, {"videos": 21}, {"text": 0}, {"output": -1}):
        with pytest.raises(ConfigError):
            service.plan_lengths(B7, **{"videos": 1, "text": None, "output": None, **bad})


def test_working_memory_is_at_least_the_tensors_that_exist_at_once() -> None:
    assert working_bytes(B7, 8192, 1) > 2 * 8192 * 2 * 11008  # gate and up of a full prefill
    assert working_bytes(B7, 1, 1) > 2 * 16 * 577 * (4096 + 4096)  # a video's MLP and projection
    assert working_bytes(B7, 8192, 1) < 3 * GIB


def test_weights_of_a_card(converted: Path) -> None:
    config = read_config(converted).text
    layer = config.hidden_size * (2 * config.hidden_size + 2 * 2 * 16 + 3 * config.intermediate_size + 2)
    split = 4 * (2 * layer + config.vocab_size * config.hidden_size)  # float32, two layers and the head
    whole = sum(file.stat().st_size for file in converted.glob("*.safetensors"))
    one = weight_bytes(converted, 1)
    two = weight_bytes(converted, 2)
    assert one - two == split // 2 and abs(whole - one) < 20_000  # the file's header


def test_written_as_the_service_reads_it(capsys, converted, tmp_path) -> None:
    target = tmp_path / "config.json"
    status, out, err = run(
        capsys,
        "--model_path",
        converted,
        "--card_memory",
        64,
        "--world_size",
        2,
        "--write",
        target,
        "--port",
        2025,
        "--resize",
        "res672",
    )
    assert status == 0 and out == "" and "each request: 1 video of 8 tokens" in err and "note: " not in err
    # 5 + 4 blocks of 128 tokens, each 2 * 2 layers * one KV head of 16 * 2 bytes on each of two cards.
    assert "200 requests of 144 KiB" in err and "0.00" not in err
    assert stat.S_IMODE(target.stat().st_mode) == 0o640 and list(tmp_path.iterdir()) == [target]
    config = json.loads(target.read_text())
    deploy, one, _ = parts(config)
    assert one["modelWeightPath"] == str(converted) and one["worldSize"] == 2 and one["backendType"] == "atb"
    assert one["models"] == {"pllava": {"resize": "res672"}} and one["npuMemSize"] > 0
    assert config["BackendConfig"]["npuDeviceIds"] == [[0, 1]] and deploy["maxInputTokenLen"] == 8 + 508
    server = config["ServerConfig"]
    assert (server["port"], server["managementPort"], server["metricsPort"]) == (2025, 2026, 2027)
    assert server["ipAddress"] == "127.0.0.1" and server["httpsEnabled"] is False
    assert list(service.find_problems(config, read_config(converted))) == []
    status, out, err = run(
        capsys, "--model_path", converted, "--card_memory", 64, "--world_size", 2, "--port", 2025, "--resize", "res672"
    )
    assert status == 0 and json.loads(out) == config and "mode 640; --write FILE makes it so" in err


@pytest.mark.parametrize(
    ("videos", "batch", "words"),
    [(1, 1, ("1 video of", "1 request of")), (3, 2, ("3 videos of", "2 requests of"))],
)
def test_numbers_have_the_noun_that_fits(capsys, converted, videos, batch, words) -> None:
    given = ("--card_memory", 64, "--max_videos", videos, "--max_batch_size", batch)
    status, _, err = run(capsys, "--model_path", converted, *given)
    assert status == 0 and all(text in err for text in words)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 KiB"), (1, "1 KiB"), (147456, "144 KiB"), (3 * 2**20 + 1, "4 MiB"), (1.625 * GIB, "1.62 GiB")],
)
def test_sizes_have_the_unit_that_fits(size: float, text: str) -> None:
    assert service.size_text(size) == text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"maxInputTokenLen": 2048}, "one video alone is 2304 tokens"),
        ({"maxSeqLen": 2816}, "no room for an answer"),
        ({"maxSeqLen": 0}, "maxSeqLen is 0"),
        ({"maxPrefillTokens": 2000}, "maxPrefillTokens 2000 is less than"),
        ({"npuMemSize": -1}, "npuMemSize is -1"),
        ({"npuMemSize": 1}, "npuMemSize 1 GiB does not hold one request"),
        ({"worldSize": 2}, "worldSize 2"),
        ({"backendType": "torch"}, "backendType is 'torch'"),
        ({"truncation": -1}, "truncation is -1"),
        ({"cacheBlockSize": 256}, "cacheBlockSize is 256"),
        ({"maxPrefillBatchSize": 300}, "maxPrefillBatchSize is above"),
        ({"port": 80}, "port is 80"),
        ({"metricsPort": 1025}, "port, managementPort and metricsPort"),
        ({"worldSize": "2"}, "worldSize is '2'"),
        ({"npuDeviceIds": None}, "npuDeviceIds is missing"),
        ({"ModelConfig": []}, "modelName is missing"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(change: dict, problem: str) -> None:
    lengths = service.plan_lengths(B7, 1, None, None)
    config = service.make_config("/m", "pllava", lengths, service.CachePlan(36, 22, 1), 1)
    assert list(service.find_problems(config, B7)) == []
    ((key, value),) = change.items()
    owner = next(part for part in (*parts(config), config["BackendConfig"], config["ServerConfig"]) if key in part)
    owner[key] = value
    found = list(service.find_problems(config, B7))
    assert any(problem in what for what, _ in found), found
    assert all(remedy for _, remedy in found)
    assert list(service.find_problems({}, B7)) and list(service.find_problems({"BackendConfig": 3}, B7))


def test_the_config_the_host_ships_rejects_every_video() -> None:
    found = [what for what, _ in service.find_problems(service.SHIPPED, B7)]
    assert found[0].startswith("npuMemSize is -1") and "one video alone is 2304" in found[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no NPU found"),
        (["--card_memory", "0"], "--card_memory is 0"),
        (["--card_memory", "0.01"], "are left there"),
        (["--card_memory", "64", "--memory_fraction", "1.5"], "--memory_fraction is 1.5"),
        (["--card_memory", "64", "--max_videos", "0"], "--max_videos is 0"),
        (["--card_memory", "64", "--max_batch_size", "0"], "--max_batch_size is 0"),
        (["--card_memory", "64", "--world_size", "3"], "1, 2, 4 cards"),
        (["--card_memory", "64", "--model_name", "-a"], "--model_name '-a'"),
        (["--card_memory", "64", "--ip", "0.0.0.0"], "refuses to listen everywhere"),
        (["--card_memory", "64", "--port", "80"], "port is 80"),
        (["--card_memory", "64", "--write", "/nowhere/config.json"], "'/nowhere/config.json' cannot be written"),
    ],
)
def test_bad_input_is_one_message(capsys, converted, monkeypatch, arguments, message) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    given = [f"--model_name={arguments[3]}" if a == "--model_name" else a for a in arguments if a != "-a"]
    status, out, err = run(capsys, "--model_path", converted, *given)
    assert status == 2 and out == "" and message in err, err


def test_a_directory_that_was_not_converted_is_refused(capsys) -> None:
    tiny = ROOT / "examples" / "tiny_pllava"
    status, _, err = run(capsys, "--model_path", tiny, "--card_memory", 64)
    assert status == 2 and "convert_quant_weights.sh" in err and "pllava_merged" in err


def fake_npu_smi(directory: Path) -> Path:
    """Answers in the form that MindIE's own code reads (atb_llm/utils/cpu_binding.py): one 910B, one 310P chip."""
    tool = directory / "npu-smi"
    tool.write_text("""#!/bin/sh
case "$*" in
"info -m") printf 'NPU ID Chip ID Chip Logic ID Chip Name\\n0  0  0  Ascend 910B3\\n0  1  -  Mcu\\n2  0  1  310P3\\n' ;;
*"memory -i 0"*) printf '\\tNPU ID : 0\\n\\tDDR Capacity(MB)   : 0\\n\\tHBM Capacity(MB)   : 65536\\n' ;;
*"usages -i 0"*) printf '\\tHBM Usage Rate(%%)   : 25\\n\\tAicore Usage Rate(%%)  : 3\\n\\tDDR Usage Rate(%%) : 9\\n' ;;
*"memory -i 2"*) printf '\\tDDR Capacity(MB)   : 21527\\n' ;;
*"usages -i 2"*) printf '\\tDDR Usage Rate(%%)   : 10\\n' ;;
esac
""")
    tool.chmod(0o755)
    return tool


def test_memory_of_the_cards_that_are_there(capsys, converted, tmp_path, monkeypatch) -> None:
    tool = fake_npu_smi(tmp_path)
    first, second = list_cards(str(tool))
    assert (first.number, first.name, first.memory_mib, first.free_mib) == (0, "Ascend 910B3", 65536, 49152)
    assert (second.number, second.memory_mib, second.used_percent) == (1, 21527, 10)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    status, _, err = run(capsys, "--model_path", converted)
    assert status == 0 and f"{21527 * 0.8 / 1024:.1f} GiB usable" in err  # the smaller card decides


@pytest.mark.skipif("MINDIE_LLM_SOURCES" not in os.environ, reason="MINDIE_LLM_SOURCES names no MindIE-LLM sources")
def test_against_the_tables_in_the_hosts_sources() -> None:
    """Every key that MindIE's C++ calls compulsory has the type it wants, and no key is unknown to MindIE."""
    root = Path(os.environ["MINDIE_LLM_SOURCES"])
    config = service.make_config("/m", "p", service.plan_lengths(B7, 1, None, None), service.CachePlan(36, 22, 1), 1)
    deploy, one, schedule = parts(config)
    tables = {
        "g_serverParamsConstraint": config["ServerConfig"],
        "g_backendConfigConstraint": config["BackendConfig"],
        "g_modelParentParamsConstraint": deploy,
        "g_modelParamsConstraint": one,
        "g_scheduleParamsConstraint": schedule,
    }
    kinds = {"string": str, "bool": bool, "array": list, "object": dict, "uint32_t": int, "int32_t": int}
    text = "".join(file.read_text() for file in (root / "src" / "config_manager").glob("*.cpp"))
    for table, section in tables.items():
        (body,) = re.findall(rf"{table} = \{{(.*?)\}};", text, re.DOTALL)
        rows = re.findall(r'"(\w+)",\s*"(\w+)",\s*(true|false)', body)
        assert rows
        for name, kind, compulsory in rows:
            assert name in section or compulsory == "false", f"{table}: {name} is missing"
            assert name not in section or type(section[name]) is kinds[kind], f"{table}: {name}"
            assert kind != "uint32_t" or section.get(name, 0) >= 0
    shipped = json.loads((root / "src" / "server" / "conf" / "config.json").read_text())
    for name in ("ServerConfig", "BackendConfig"):
        assert set(config[name]) <= set(shipped[name])
    found = [what for what, _ in service.find_problems(shipped)]
    assert found == ["npuMemSize is -1"], found


# Sizes in docs/operations.md: those of `mindie config` at its defaults.


def weights_on_a_card(config: PllavaConfig, int8: QuantConfig, cards: int) -> int:
    """Bytes of 16-bit or W8A16 weights as MindIE splits them, from a model without values."""
    with torch.device("meta"):
        model = Pllava(config, TorchBackend(), torch.float16, int8=int8)
    sizes = {name: part.tensor.element_size() * math.prod(part.shape) for name, part in model.weight_map().items()}
    split = sum(size for name, size in sizes.items() if name.startswith(SPLIT_TENSORS))
    return -(-split // cards) + sum(sizes.values()) - split


def smallest_setup(config: PllavaConfig, int8: QuantConfig, card_gib: int) -> str:
    lengths = service.plan_lengths(config, 1, None, None)
    for cards in (1, 2, 4, 8):
        check_world_size(cards, config.text)
        working = working_bytes(config, service.prefill_tokens(lengths), cards)
        budget = 0.8 * card_gib * GIB - weights_on_a_card(config, int8, cards) - working
        try:
            cache = service.plan_cache(config, lengths, cards, budget, None)
        except ConfigError:
            continue
        return f"{counted(cards, 'card')}: {cache.requests}"
    raise AssertionError("no number of cards is enough")


@pytest.mark.parametrize("size", ["7b", "13b", "34b"])
@pytest.mark.parametrize("kind", ["16 bits", "W8A16"])
def test_the_documented_sizes_are_the_computed_ones(size: str, kind: str) -> None:
    config = config_from_json(PUBLISHED[size])
    int8 = dummy_quant_config(config) if kind == "W8A16" else QuantConfig()
    weights = f"{weights_on_a_card(config, int8, 1) / GIB:.1f} GiB"
    cells = [f"{size.upper()}, {kind}", weights, *(smallest_setup(config, int8, card) for card in (64, 32, 21))]
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs" / "operations.md").read_text()
