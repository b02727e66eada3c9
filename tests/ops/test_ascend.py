"""The parts of the Ascend backend that need no torch_npu. `tests/ascend` tests the rest on the real torch_npu."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.errors import BackendError
from atb_pllava.executor.executor import Executor
from atb_pllava.executor.model_input import ModelInput
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.loader import progress
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.ops.ascend import backend as ascend
from atb_pllava.ops.ascend import runtime
from atb_pllava.ops.ascend.attention import pad_rows
from atb_pllava.ops.ascend.chips import CHIPS, chip_of
from atb_pllava.ops.ascend.rotary import RotaryTables, fits_one_call
from atb_pllava.ops.forward_batch import AttentionMetadata, SequenceBatch
from atb_pllava.ops.int8 import Int8Weight, quantise
from atb_pllava.ops.interface import CapturedGraph, Feature, LayerCache
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.ops.registry import choose_dtype, get_backend
from tests.support import random_model, raw_config


def package(directory: Path, name: str, text: str) -> Path:
    (directory / name).mkdir()
    (directory / name / "__init__.py").write_text(text)
    return directory


def without_torch_npu(monkeypatch: pytest.MonkeyPatch, directory: Path | None = None) -> None:
    """This Python's torch_npu is the one in `directory`, or none."""
    import sys

    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    if directory is None:
        monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.syspath_prepend(directory)


@pytest.mark.parametrize(("soc", "name"), [(220, "910B"), (224, "910B"), (225, "910B"), (250, "910B"), (202, "310P")])
def test_chips_by_soc_version(soc: int, name: str) -> None:
    assert chip_of(soc).name == name


@pytest.mark.parametrize("soc", [-1, 100, 104, 240, 260])
def test_other_chips_are_refused_by_number(soc: int) -> None:
    with pytest.raises(BackendError, match=f"SoC version {soc}; Ascend 910B and Ascend 310P"):
        chip_of(soc)


def test_no_soc_version_is_two_chips() -> None:
    seen = [version for chip in CHIPS for versions in chip.soc_versions for version in versions]
    assert len(seen) == len(set(seen))


def test_without_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    without_torch_npu(monkeypatch)
    with pytest.raises(BackendError, match="no torch_npu; install CANN and the torch-npu of torch"):
        get_backend("ascend")


def test_without_cann(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    broken = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')"
    without_torch_npu(monkeypatch, package(tmp_path, "torch_npu", broken))
    with pytest.raises(BackendError, match="cannot be loaded: libhccl.so: .* source CANN's set_env.sh"):
        get_backend("ascend")
    with caplog.at_level(logging.INFO, logger="atb_pllava"):
        assert get_backend("auto", kernels="torch").name in ("cpu", "cuda")
    assert "libhccl.so" in caplog.text


def test_without_npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = "__version__ = '2.13.0'\nclass npu:\n    is_available = staticmethod(lambda: False)\n"
    without_torch_npu(monkeypatch, package(tmp_path, "torch_npu", empty))
    with pytest.raises(BackendError, match="no NPU found: torch_npu 2.13.0"):
        get_backend("ascend")


def backend_of(chip: str) -> ascend.AscendBackend:
    """The backend of a chip without its device: what computes with torch alone works on the CPU."""
    backend = ascend.AscendBackend.__new__(ascend.AscendBackend)
    backend.chip = next(c for c in CHIPS if c.name == chip)
    backend.device = torch.device("cpu")
    backend._warned_of_groups = False
    return backend


@pytest.mark.parametrize(
    ("chip", "name", "stored", "wanted"),
    [
        ("910B", "auto", "bfloat16", "bfloat16"),
        ("910B", "auto", "float32", "float16"),
        ("910B", "bfloat16", "float16", "bfloat16"),
        ("310P", "auto", "bfloat16", "float16"),
        ("310P", "float16", "bfloat16", "float16"),
    ],
)
def test_dtypes(chip: str, name: str, stored: str, wanted: str) -> None:
    assert choose_dtype(name, stored, backend_of(chip)) == getattr(torch, wanted)


@pytest.mark.parametrize(("chip", "name"), [("310P", "bfloat16"), ("310P", "float32"), ("910B", "float32")])
def test_other_dtypes_are_refused_by_name(chip: str, name: str) -> None:
    with pytest.raises(BackendError, match=f"dtype {name}: Ascend {chip} .* use --dtype float16"):
        choose_dtype(name, "float16", backend_of(chip))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "columns"), [(0, slice(0, 192)), (64, slice(0, 192)), (64, slice(96, 192))])
def test_the_operator_adds_its_offset(symmetric: bool, group_size: int, columns: slice) -> None:
    """(q + offset) * scale of the operands is (q - zero_point) * scale of the weight, also where a group is cut."""
    generator = torch.Generator().manual_seed(1)
    whole = quantise(torch.randn(48, 192, generator=generator) + 0.3, group_size=group_size, symmetric=symmetric)
    weight: Int8Weight = whole.columns(columns)
    packed = backend_of("910B").pack(weight)
    values = packed.values
    scale = packed.scale
    offset = packed.antiquant_offset
    assert packed.shape == weight.shape and (packed.group_size, packed.group_offset) == (
        group_size,
        weight.group_offset,
    )
    if group_size:
        assert scale.shape == (-(-values.shape[1] // group_size), 48)
        spread = [None if x is None else x.t().repeat_interleave(group_size, 1) for x in (scale, offset)]
    else:
        assert scale.shape == (48,)
        spread = [None if x is None else x[:, None] for x in (scale, offset)]
    assert (offset is None) == symmetric
    wide = values.float() + (0 if spread[1] is None else spread[1][:, : values.shape[1]])
    got = (wide * spread[0][:, : values.shape[1]])[:, weight.group_offset if group_size else 0 :]
    assert_close(got, weight.dequantise())


def test_groups_become_float_where_the_operator_has_none(caplog: pytest.LogCaptureFixture) -> None:
    weight = quantise(torch.randn(48, 192), group_size=64, symmetric=False)
    backend = backend_of("310P")
    assert_close(backend.pack(weight), weight.dequantise())
    backend.pack(weight)
    assert caplog.text.count("convert without -group_size") == 1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype", "chip", "fits"),
    [
        (32, 32, 128, "bfloat16", "910B", True),  # 7B
        (40, 40, 128, "bfloat16", "910B", False),  # 13B: 206848 bytes of 196352
        (40, 40, 128, "float16", "910B", True),
        (20, 20, 128, "bfloat16", "910B", True),  # 13B on two devices
        (56, 8, 128, "bfloat16", "910B", True),  # 34B
        (38, 38, 128, "bfloat16", "910B", False),  # 196608 bytes: all of the unified buffer, of which CANN keeps some
        (40, 40, 128, "float16", "310P", True),
        (32, 32, 96, "float16", "910B", False),
        (4, 2, 64, "float16", "910B", False),
        (128, 16, 128, "float16", "910B", True),
        (128, 32, 128, "float16", "910B", False),
    ],
)
def test_heads_that_one_call_rotates(heads: int, kv_heads: int, dim: int, dtype: str, chip: str, fits: bool) -> None:
    query, keys = (torch.empty(2, n, dim, dtype=getattr(torch, dtype)) for n in (heads, kv_heads))
    assert fits_one_call(query, keys, backend_of(chip).chip.unified_buffer) is fits


def test_rotary_tables_have_both_halves_of_a_head_and_are_made_once() -> None:
    cos, sin = torch.randn(2, 5, 16)
    tables = RotaryTables(cos, sin)
    for table, made in zip((cos, sin), tables.of(torch.bfloat16), strict=True):
        assert made.shape == (1, 5, 1, 32) and made.is_contiguous()
        assert torch.equal(made[0, :, 0, :16], table.bfloat16()) and torch.equal(made[..., 16:], made[..., :16])
    assert tables.of(torch.bfloat16) is tables.of(torch.bfloat16)


@pytest.mark.parametrize(
    ("size", "shape"), [((16, 24, 24), (16, 12, 12)), ((4, 24, 24), (16, 7, 11)), ((3, 5, 7), (8, 16, 2))]
)
def test_pooling_equals_torch(size: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    grid = torch.randn(*size, 6)
    expected = torch.nn.functional.adaptive_avg_pool3d(grid.permute(3, 0, 1, 2), shape).permute(1, 2, 3, 0)
    assert_close(backend_of("310P").pool_video(grid, shape), expected.reshape(-1, 6), atol=1e-6, rtol=1e-5)


def test_rows_are_padded_by_a_sequence_of_their_own() -> None:
    x = torch.randn(21, 2, 4)
    query, keys, values, lengths = pad_rows(x, x + 1, x + 2, [20, 1], 16)
    assert lengths == [20, 1, 11] and query.shape == keys.shape == values.shape == (32, 2, 4)
    assert_close(keys[:21], x + 1)
    assert not values[21:].any()


@pytest.mark.parametrize(
    ("chip", "size", "dim", "message"),
    [
        ("910B", 64, 128, "multiples of 128 from 128 to 512"),
        ("310P", 256, 128, "multiples of 16 from 16 to 128"),
        ("310P", 128, 256, "product of at most 16384"),
        ("910B", 128, 24, "multiple of 16"),
    ],
)
def test_caches_the_operators_cannot_address(chip: str, size: int, dim: int, message: str) -> None:
    with pytest.raises(Exception, match=message):
        backend_of(chip).new_kv_cache(1, 4, size, 2, dim, torch.float16)


class Replay(CapturedGraph):
    """A recorded step: a replay runs the step again, with what its tensors hold by then. `backend` counts replays."""

    def __init__(self, backend: Any, step: Callable[[], Tensor]) -> None:
        self.backend = backend
        self.step = step

    def replay(self, context_lens: Sequence[int]) -> Tensor:
        self.backend.replays += 1
        return self.step()

    def free(self) -> None:
        del self.step


class Recorder(TorchBackend):
    """A CPU that records steps."""

    def __init__(self, works: bool = True) -> None:
        super().__init__("cpu")
        self.features = frozenset({Feature.GRAPH_CAPTURE})
        self.works = works
        self.recorded = 0
        self.replays = 0

    def capture(self, step: Callable[[], Tensor]) -> Replay:
        if not self.works:
            raise BackendError("this device cannot capture")
        self.recorded = self.recorded + 1
        return Replay(self, step)

    def write_kv(self, keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        real = slot_mapping >= 0
        super().write_kv(keys[real], values[real], cache, slot_mapping[real])

    def decode_attention(self, query: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> Tensor:
        batch = metadata.decode
        lens = batch.device_context_lens.tolist()
        out = torch.zeros_like(query)
        real = [i for i, context in enumerate(lens) if context]
        some = SequenceBatch.of([1] * len(real), [lens[i] for i in real], batch.block_tables[real])
        out[real] = super().decode_attention(query[real], cache, replace(metadata, decode=some))
        return out


def warm_up_unnoticed(runner: ModelRunner, max_batch_size: int) -> None:
    """Warm up, and check that neither the KV cache nor the runner's videos changed."""
    parts = [part for layer in runner.cache for part in layer]
    for part in parts:
        part.fill_(7)
    Executor(runner, TensorParallel()).warm_up(max_batch_size, frames=8)
    assert all(bool((part == 7).all()) for part in parts)
    with pytest.raises(KeyError):
        runner.video_embeds(0)


def decode(backend: TorchBackend, batch: int, max_batch_size: int | None = None) -> list[Tensor]:
    """Logits of three decode steps of sequences with their own cached tokens, in blocks of 16.

    max_batch_size: of a warm-up before. None: there is no warm-up.
    """
    model = random_model(config_from_json(raw_config()), ops=backend)
    runner = ModelRunner(model, 3 * batch, 16)
    if max_batch_size is not None:
        warm_up_unnoticed(runner, max_batch_size)
    contexts = [5 + 11 * i for i in range(batch)]
    tables = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(batch)]
    slot_mapping = [[table[p // 16] * 16 + p % 16 for p in range(c)] for table, c in zip(tables, contexts, strict=True)]
    runner.forward(
        ModelInput(
            0,
            [7] * sum(contexts),
            [p for c in contexts for p in range(c)],
            sum(slot_mapping, []),
            contexts,
            contexts,
            tables,
            [],
            [],
        )
    )
    outs = []
    for step in range(3):
        lens = [c + step + 1 for c in contexts]
        at = [table[(n - 1) // 16] * 16 + (n - 1) % 16 for table, n in zip(tables, lens, strict=True)]
        used = [table[: -(-n // 16)] for table, n in zip(tables, lens, strict=True)]
        ids = [11 + i for i in range(batch)]
        positions = [n - 1 for n in lens]
        work = ModelInput(batch, ids, positions, at, [1] * batch, lens, used, list(range(batch)), [])
        outs.append(runner.forward(work))
    return outs


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_replayed_steps_equal_plain_ones(batch: int) -> None:
    recorder = Recorder()
    for got, expected in zip(decode(recorder, batch), decode(TorchBackend(), batch), strict=True):
        assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (recorder.recorded, recorder.replays) == (1, 2)


def test_a_device_that_cannot_capture_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    for got, expected in zip(decode(Recorder(works=False), 2), decode(TorchBackend(), 2), strict=True):
        assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert caplog.text.count("decoding without graphs: this device cannot capture") == 1


@pytest.mark.parametrize(("batch", "most", "graphs"), [(1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 4, 3), (2, 5, 4)])
def test_after_a_warm_up_every_step_is_replayed(batch: int, most: int, graphs: int) -> None:
    recorder = Recorder()
    plain = decode(TorchBackend(), batch)
    for got, expected in zip(decode(recorder, batch, most), plain, strict=True):
        assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (recorder.recorded, recorder.replays) == (graphs, 3)


def test_a_warm_up_goes_on_where_nothing_can_be_captured(caplog: pytest.LogCaptureFixture) -> None:
    plain = decode(TorchBackend(), 2)
    for got, expected in zip(decode(Recorder(works=False), 2, 8), plain, strict=True):
        assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert caplog.text.count("decoding without graphs: this device cannot capture") == 1


def test_a_cpu_is_not_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModelRunner(random_model(config_from_json(raw_config())), 1, 16)
    monkeypatch.setattr(runner, "model", None)  # any step would fail
    Executor(runner, TensorParallel()).warm_up(8, frames=8)


def test_a_long_warm_up_logs_its_progress(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModelRunner(random_model(config_from_json(raw_config()), ops=Recorder()), 1, 16)
    caplog.set_level(logging.INFO, logger="atb_pllava")
    Executor(runner, TensorParallel()).warm_up(2, frames=8)
    assert not caplog.messages
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    Executor(runner, TensorParallel()).warm_up(4, frames=8)
    lines = [line.partition(" steps, ")[0] for line in caplog.messages]
    assert lines == [f"preparing the device {done}/4" for done in (1, 2, 3, 4)]


@pytest.mark.parametrize(("frames", "encoded"), [(1, 1), (3, 3), (8, 4)])
def test_a_warm_up_encodes_no_more_frames_at_once_than_requests_may(
    frames: int, encoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frames bound the memory of the vision tower. A video of the model has 4."""
    recorder = Recorder()
    runner = ModelRunner(random_model(config_from_json(raw_config()), ops=recorder), 1, 16)
    seen: list[int] = []
    normalize = recorder.normalize_frames

    def counted(frames: Tensor, table: Tensor) -> Tensor:
        seen.append(len(frames))
        return normalize(frames, table)

    monkeypatch.setattr(recorder, "normalize_frames", counted)
    Executor(runner, TensorParallel()).warm_up(1, frames)
    assert seen == [encoded]


@pytest.mark.parametrize(("device", "free"), [("meta", 5), ("meta:3", 8)])
def test_free_memory_is_the_device_s(device: str, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked by number, which the oldest torch wants, or not at all, where the current device is meant."""
    backend = backend_of("910B")
    backend.device = torch.device(device)
    module = type("meta", (), {"mem_get_info": staticmethod(lambda index: (5 if index is None else 5 + index, 9))})
    monkeypatch.setattr(torch, "meta", module, raising=False)
    assert backend.free_memory() == free
