"""The bytes of a model equal the published tensors and a real load. Free bytes are right in containers too."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atb_pllava.config import EngineConfig, PllavaConfig
from atb_pllava.engine.memory_estimate import kv_cache_tokens, memory_need, published_bytes
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.loader.dummy_weights import dummy_quant_config
from atb_pllava.model.published_sizes import LORA_RANK, PUBLISHED, published_size
from atb_pllava.ops import interface
from atb_pllava.ops.host_memory import HostMemory, host_memory
from atb_pllava.ops.int8 import QuantConfig
from atb_pllava.ops.reference import TorchBackend
from tests.support import SHARED_DATA, load_llm, raw_config, write_checkpoint

KEYS = SHARED_DATA / "published_keys.json"
GB = 1e9


def config(size: str) -> PllavaConfig:
    return config_from_json(PUBLISHED[size])


# README's table of real weights, in GB: download; weights in bfloat16 and W8A16; memory for one video at a time.
@pytest.mark.parametrize(
    ("size", "download", "bfloat16", "w8a16", "one_bfloat16", "one_w8a16"),
    [
        ("7b", 14.3, 14.1, 7.6, 17.2, 10.7),
        ("13b", 26.9, 26.7, 14.0, 31.5, 18.8),
        ("34b", 69.9, 69.5, 36.0, 71.2, 37.7),
    ],
)
def test_the_table_of_published_models(size, download, bfloat16, w8a16, one_bfloat16, one_w8a16) -> None:
    model = config(size)
    floats, int8 = (memory_need(model, 2, layers) for layers in (QuantConfig(), dummy_quant_config(model)))
    assert round(published_bytes(model, LORA_RANK) / GB, 1) == download
    assert (round(floats.weights / GB, 1), round(int8.weights / GB, 1)) == (bfloat16, w8a16)
    assert (round(floats.least / GB, 1), round(int8.least / GB, 1)) == (one_bfloat16, one_w8a16)


@pytest.mark.skipif(not KEYS.is_file(), reason="the names and shapes of the published tensors are not in a clone")
@pytest.mark.parametrize("size", PUBLISHED)
def test_the_download_is_every_published_tensor(size: str) -> None:
    shapes = json.loads(KEYS.read_text())[size].values()
    assert published_bytes(config(size), LORA_RANK) == sum(2 * int(torch.Size(shape).numel()) for shape in shapes)


def test_names_of_published_models() -> None:
    for name in ("ermu2001/pllava-7b", "https://huggingface.co/ermu2001/pllava-7b/", "MODELS/PLLaVA-7B"):
        assert published_size(name) == "7b"
    for name in ("", "pllava-8b", "7b", "ermu2001/pllava-7b-w8a16", "llava-7b"):
        assert published_size(name) is None


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_the_kv_cache_of_a_load_is_the_one_that_is_said(tmp_path: Path, kv_cache_dtype: str) -> None:
    directory = write_checkpoint(tmp_path / "m", raw_config())
    with load_llm(directory, kv_cache_dtype=kv_cache_dtype) as llm:
        cache = llm.engine.core.executor.runner.cache
        held = sum(part.nbytes for layer in cache for part in layer)
        weights = sum(parameter.nbytes for parameter in llm.model.parameters())
    engine = EngineConfig(kv_cache_dtype=kv_cache_dtype)
    need = memory_need(llm.config, 4, QuantConfig(), engine=engine)
    assert need.batch == held
    assert need.weights >= weights > 0


def test_a_full_batch_by_hand() -> None:
    # 8 requests of 4096 positions and a block of 128 each. A token of 7B takes 512 KiB.
    assert kv_cache_tokens(config("7b"), EngineConfig()) == 8 * (4096 + 128)
    need = memory_need(config("7b"), 2, QuantConfig())
    assert need.batch == 8 * 4224 * 2**19 and need.clip == (2304 + 512 + 128) * 2**19
    assert need.caches == 2 * 2**30
    short = EngineConfig(max_batch_size=2, max_input_length=2400, max_output_length=100)
    assert kv_cache_tokens(config("7b"), short) == 2 * (2500 + 128)


def test_ranks_divide_weights_and_keys_and_share_a_machine() -> None:
    model = config("7b")
    one, four = (memory_need(model, 2, QuantConfig(), size) for size in (1, 4))
    together = memory_need(model, 2, QuantConfig(), 4, together=True)
    vision = 2 * 304e6  # the tower is on every rank
    assert one.weights / 4 < four.weights < one.weights / 4 + 2 * vision
    assert four.clip == one.clip // 4 and together.clip == one.clip
    assert together.weights == pytest.approx(4 * four.weights, rel=0.01)
    uneven = [memory_need(model, 2, QuantConfig(), 3), memory_need(model, 2, QuantConfig(), 3, together=True)]
    assert uneven[0].clip * 3 > uneven[1].clip == one.clip  # 11, 11 and 10 heads


def machine(root: Path, total: int = 64, free: int = 48) -> Path:
    """A root with /proc/meminfo. Sizes are in GiB."""
    (root / "proc/self").mkdir(parents=True)
    lines = f"MemTotal: {total * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {free * 2**20} kB\nHugePages_Total: 0\n"
    (root / "proc/meminfo").write_text(lines)
    return root


def group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_a_machine_without_limits(tmp_path: Path) -> None:
    root = machine(tmp_path)
    assert host_memory(root) == HostMemory(64 * 2**30, 48 * 2**30)
    (root / "proc/self/cgroup").write_text("0::/user.slice\n")
    group(root / "sys/fs/cgroup/user.slice", V2, "max", 2**30, "inactive_file 0\n")
    assert host_memory(root) == HostMemory(64 * 2**30, 48 * 2**30)


def test_the_limit_of_a_container(tmp_path: Path) -> None:
    root = machine(tmp_path)
    (root / "proc/self/cgroup").write_text("0::/\n")
    group(root / "sys/fs/cgroup", V2, str(4 * 2**30), 3 * 2**30, f"anon 5\ninactive_file {2**30}\n")
    found = host_memory(root)
    assert found == HostMemory(
        4 * 2**30, 2 * 2**30, str(root / "sys/fs/cgroup/memory.max")
    )  # read files are given back


def test_the_least_of_nested_groups(tmp_path: Path) -> None:
    root = machine(tmp_path)
    (root / "proc/self/cgroup").write_text("0::/job/step\n")
    group(root / "sys/fs/cgroup/job", V2, str(8 * 2**30), 7 * 2**30, "inactive_file 0\n")
    group(root / "sys/fs/cgroup/job/step", V2, str(6 * 2**30), 2 * 2**30, "inactive_file 0\n")
    found = host_memory(root)
    assert (found.total, found.free) == (6 * 2**30, 2**30)  # the step may take 4 GiB, the job has one left


def test_version_1(tmp_path: Path) -> None:
    root = machine(tmp_path)
    # As in a Docker container: the path is the host's, and the mount is the container's own group.
    (root / "proc/self/cgroup").write_text("9:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/docker/ab\n")
    group(root / "sys/fs/cgroup/memory", V1, str(2 * 2**30), 2**30, "inactive_file 7\ntotal_inactive_file 0\n")
    assert host_memory(root) == HostMemory(2 * 2**30, 2**30, str(root / "sys/fs/cgroup/memory/memory.limit_in_bytes"))
    (root / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert host_memory(root).limited_by is None


def test_a_group_that_is_over_its_limit_has_nothing_free(tmp_path: Path) -> None:
    root = machine(tmp_path)
    (root / "proc/self/cgroup").write_text("0::/\n")
    group(root / "sys/fs/cgroup", V2, str(2**30), 2**30 + 4096, "inactive_file 0\n")
    assert host_memory(root).free == 0


def test_the_kv_cache_is_planned_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "host_memory", lambda: HostMemory(5, 3))
    assert TorchBackend().free_memory() == 3
    assert replace(host_memory(), limited_by=None).free > 0
