"""ProcessedVideo and its hash, time ranges, and the imports of the processor."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atb_pllava.config import PreprocessorConfig
from atb_pllava.errors import VideoError
from atb_pllava.multimodal.clip import SourceInfo
from atb_pllava.multimodal.frame_cache import FrameCache
from atb_pllava.multimodal.frame_sampling import sample_frame_indices
from atb_pllava.multimodal.media_pool import MediaPool
from atb_pllava.multimodal.pixel_values import pixel_values
from atb_pllava.multimodal.processor import ProcessedVideo, VideoProcessor
from atb_pllava.multimodal.transforms import normalize
from tests.support import ROOT, random_frames, write_video

PREPROCESSOR = PreprocessorConfig(56, 56)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4", frames=40)  # 8 frames a second


def test_the_hash_is_that_of_all_input_of_the_vision_tower() -> None:
    frames = random_frames(2, 8, 8, 3, seed=1)
    video = ProcessedVideo(frames, (0, 1, 1), (3, 4, 4), PREPROCESSOR)
    other = frames.copy()
    other[1, 2, 3, 0] ^= 1
    assert replace(video, source=SourceInfo(9, 8.0, 8, 8)).mm_hash == video.mm_hash
    different = [
        replace(video, frames=other),
        replace(video, frames=frames.reshape(2, 4, 16, 3)),
        replace(video, inverse_indices=(0, 0, 1)),
        replace(video, preprocessor=PreprocessorConfig(56, 57)),
    ]
    assert len({video.mm_hash, *(one.mm_hash for one in different)}) == 5
    assert replace(different[0], frames=frames).mm_hash == video.mm_hash
    assert replace(video, frame_indices=(5, 6, 6)).mm_hash == video.mm_hash, "the vision tower sees no frame numbers"


def test_a_known_hash_is_not_kept_when_the_frames_change() -> None:
    frames = random_frames(2, 8, 8, 3, seed=1)
    expected = ProcessedVideo(frames, (0, 1), (0, 1), PREPROCESSOR).mm_hash
    video = ProcessedVideo(frames, (0, 1), (0, 1), PREPROCESSOR, known_hash=b"known")
    assert video.mm_hash == b"known"
    assert replace(video, frames=frames.copy()).mm_hash == expected


@pytest.mark.parametrize("first, last", [(0, None), (0, 2), (1, 3), (2, 99)])
def test_pixel_values_are_the_normalised_frames(first: int, last: int | None) -> None:
    video = ProcessedVideo(random_frames(3, 8, 8, 3, seed=1), (0, 1, 2), (0, 1, 2), PREPROCESSOR)
    expected = normalize(video.frames, PREPROCESSOR.image_mean, PREPROCESSOR.image_std)[first:last]
    assert np.array_equal(pixel_values(video, first, last).numpy(), expected)


@pytest.mark.parametrize("frame_sampler", ["demo", "eval"])
@pytest.mark.parametrize("times", [(None, None), (1.0, None), (None, 2.5), (1.0, 2.5), (0, 99), (2.0, 2.0)])
def test_time_ranges(clip: Path, frame_sampler: str, times: tuple[float | None, float | None]) -> None:
    processor = VideoProcessor(4, PREPROCESSOR, frame_sampler)
    video, whole = processor.prepare([clip, clip], None, [times, (None, None)])
    start, end = times
    expected = sample_frame_indices(40, 4, "eval", fps=8, start_seconds=start, end_seconds=end)
    assert list(video.frame_indices) == expected
    assert list(whole.frame_indices) == sample_frame_indices(40, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_frame_times_and_the_source(clip: Path, tmp_path: Path, workers: int) -> None:
    """The clip shows 40 frames of 96x64 pixels in 5 seconds. Frame k is shown at k / 8 seconds."""
    image = tmp_path / "image.png"
    Image.new("RGB", (80, 60)).save(image)
    pool = MediaPool(workers) if workers else None
    processor = VideoProcessor(4, PREPROCESSOR, pool=pool)
    try:
        video, still = (processor.prepare([medium])[0] for medium in (clip, image))
    finally:
        if pool is not None:
            pool.close()
    assert video.source == SourceInfo(total_frames=40, fps=8.0, width=96, height=64)
    assert video.source.seconds == 5.0
    assert video.frame_seconds == tuple(number / 8 for number in video.frame_indices)
    assert still.source == SourceInfo(total_frames=1, fps=0.0, width=80, height=60)
    assert still.source.seconds is None and still.frame_seconds is None


def test_times_that_cannot_be(clip: Path) -> None:
    with pytest.raises(VideoError, match="need frame_sampler 'demo' or 'eval', not 'npu'"):
        VideoProcessor(4, PREPROCESSOR, "npu").prepare([clip], None, [(1.0, None)])
    with pytest.raises(VideoError, match="do not apply to frames"):
        VideoProcessor(4, PREPROCESSOR).prepare([random_frames(4, 8, 8, 3, seed=1)], None, [(1.0, None)])


def test_the_cache_tells_times_apart(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atb_pllava.multimodal.media_key._SECONDS_TO_SETTLE", 0.0)
    processor = VideoProcessor(4, PREPROCESSOR, cache=FrameCache(2**20))
    whole = processor.prepare([clip])
    part = processor.prepare([clip], None, [(1.0, 2.0)])
    assert part[0].frame_indices != whole[0].frame_indices
    assert processor.prepare([clip], [None], [(None, None)]) is whole
    assert processor.prepare([clip], None, [(1.0, 2.0)]) is part


@pytest.mark.parametrize("module", ["processor", "media_pool", "media_worker", "frame_cache"])
def test_reading_media_needs_no_torch(module: str) -> None:
    program = f"import atb_pllava.multimodal.{module}, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
