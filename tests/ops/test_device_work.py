"""What the engine asks of every backend besides the model: pixels, uploads, copies of KV blocks, events, threads."""

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from atb_pllava.config import PreprocessorConfig
from atb_pllava.errors import BackendError
from atb_pllava.executor.model_input import ModelInput
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.multimodal.transforms import normalization_table, normalize
from atb_pllava.ops.cpu.backend import NativeBackend
from atb_pllava.ops.interface import Backend
from atb_pllava.ops.reference import TorchBackend
from tests.ops.kernel_support import PLAIN
from tests.support import random_frames, random_model, raw_config

CLIP = PreprocessorConfig()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 14, 14), (2, 336, 336), (0, 8, 8), (1, 5, 7)])
def test_pixels_are_those_of_the_processor_bit_by_bit(fast: NativeBackend, shape: tuple[int, ...]) -> None:
    frames = random_frames(*shape, 3, seed=1)
    frames.flat[:256] = np.arange(256)[: frames.size]
    expected = torch.from_numpy(normalize(frames, CLIP.image_mean, CLIP.image_std))
    table = torch.from_numpy(normalization_table(CLIP.image_mean, CLIP.image_std))
    for ops in (PLAIN, fast):
        pixels = ops.normalize_frames(ops.upload(frames), table)
        assert pixels.is_contiguous() and pixels.dtype == torch.float32 and torch.equal(pixels, expected)
        every_second = ops.normalize_frames(ops.upload(frames[:, :, ::2]), table)
        assert torch.equal(every_second, expected[..., ::2])


def test_a_model_runner_normalises_by_its_checkpoint_s_numbers() -> None:
    config = config_from_json(raw_config())
    model = random_model(config)
    preprocessor = PreprocessorConfig(56, 56, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    frames = random_frames(4, 56, 56, 3, seed=2)
    runner = ModelRunner(model, 1, 16, preprocessor=preprocessor)
    for part in (frames[:1], frames[1:]):
        runner.encode_frames(9, part)
    runner.pool_frames(9, (0, 1, 2, 2))
    pixels = torch.from_numpy(normalize(frames, preprocessor.image_mean, preprocessor.image_std))
    features = torch.cat([model.encode_frames(pixels[:1]), model.encode_frames(pixels[1:])])
    assert torch.equal(runner.video_embeds(9), model.pool_frames(features, (0, 1, 2, 2)))


def test_an_upload_to_a_cpu_copies_only_what_is_read_only_or_has_gaps() -> None:
    array = np.arange(12).reshape(3, 4)
    assert PLAIN.upload(array).data_ptr() == array.ctypes.data
    for other in (array[:, ::2], np.broadcast_to(array, (2, 3, 4))):
        assert PLAIN.upload(other).tolist() == other.tolist()


# KV blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("sources", "destinations"), [([], []), ([2], [0]), ([0, 1, 2], [1, 2, 3]), ([4, 4, 3], [0, 2, 4])]
)
def test_blocks_are_copied_in_all_layers(
    fast: NativeBackend, dtype: torch.dtype, sources: Sequence[int], destinations: Sequence[int]
) -> None:
    for ops in (PLAIN, fast):
        cache = ops.new_kv_cache(2, 5, 16, 2, 8, dtype)
        parts = [part for layer in cache for part in layer]
        for number, part in enumerate(parts):
            part.copy_(torch.randint(-100, 100, part.shape, generator=torch.Generator().manual_seed(number)))
        before = [part.clone() for part in parts]
        ops.copy_blocks(cache, sources, destinations)
        came_from = list(range(5))
        for source, destination in zip(sources, destinations, strict=True):
            came_from[destination] = source
        assert all(torch.equal(part, old[came_from]) for part, old in zip(parts, before, strict=True))


def runner_of(ops: Backend) -> ModelRunner:
    return ModelRunner(random_model(config_from_json(raw_config()), ops=ops), 4, 16)


def test_a_sequence_goes_on_from_a_copied_block() -> None:
    runner = runner_of(TorchBackend())
    runner.forward(ModelInput(0, [5, 6, 7], [0, 1, 2], [0, 1, 2], [3], [3], [[0]], [2], []))
    runner.copy_blocks([(0, 3), (0, 2)])
    expected = runner.forward(ModelInput(1, [8], [3], [3], [1], [4], [[0]], [0], []))
    for block in (2, 3):
        step = ModelInput(1, [8], [3], [16 * block + 3], [1], [4], [[block]], [0], [])
        assert torch.equal(runner.forward(step), expected)
    runner.copy_blocks([])


@pytest.mark.parametrize("pair", [(0, 4), (4, 0), (-1, 2), (2, -1)])
def test_blocks_outside_of_the_cache_are_not_copied(pair: tuple[int, int]) -> None:
    with pytest.raises(BackendError, match=r"block (4|-1) is outside of the KV cache of 4 blocks"):
        runner_of(TorchBackend()).copy_blocks([(1, 2), pair])


# Events and threads


def test_events_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    earlier = PLAIN.record()
    assert PLAIN.record().seconds_since(earlier) == 2.5


class FakeDevice:
    """In place of torch.cuda: counts milliseconds by launches, and notes the current device."""

    def __init__(self) -> None:
        self.current: object = None
        self.launched = 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.launched

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        self.Event = Event

    def set_device(self, device: object) -> None:
        self.current = device


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(torch, "meta", fake, raising=False)
    return fake


def test_events_of_a_device(device: FakeDevice) -> None:
    ops = TorchBackend("meta")
    earlier = ops.record()
    device.launched += 1500
    assert ops.record().seconds_since(earlier) == 1.5


def test_a_thread_takes_the_backend_s_device(device: FakeDevice) -> None:
    TorchBackend("meta:3").use_on_this_thread()
    assert device.current == torch.device("meta:3")
    PLAIN.use_on_this_thread()
    assert device.current == torch.device("meta:3")
