"""Two or more images as the frames of one video: the same pixels as a clip of those frames, and the refusals."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atb_pllava.config import PreprocessorConfig
from atb_pllava.errors import VideoError
from atb_pllava.multimodal.frame_cache import FrameCache
from atb_pllava.multimodal.frame_sampling import sample_frame_indices
from atb_pllava.multimodal.image_sequence import ImageSequence
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media_pool import MediaPool
from atb_pllava.multimodal.processor import ProcessedVideo, VideoProcessor
from atb_pllava.multimodal.transforms import RESIZE_MODES
from tests.support import random_frames, write_video

PREPROCESSOR = PreprocessorConfig(56, 56)
PROCESSOR = VideoProcessor(4, PREPROCESSOR)


@pytest.fixture(scope="module")
def pool() -> Iterator[MediaPool]:
    pool = MediaPool(1)
    yield pool
    pool.close()


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Random pictures of these (height, width)."""
    return [random_frames(height, width, 3, seed=seed) for seed, (height, width) in enumerate(sizes)]


def assert_equal(video: ProcessedVideo, expected: ProcessedVideo) -> None:
    assert np.array_equal(video.frames, expected.frames)
    assert (video.inverse_indices, video.frame_indices) == (expected.inverse_indices, expected.frame_indices)
    assert video.mm_hash == expected.mm_hash


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("resize", RESIZE_MODES)
def test_images_are_a_clip_of_the_same_frames(pool: MediaPool, count: int, resize: str) -> None:
    frames = pictures(*[(40, 90)] * count)
    processor = VideoProcessor(4, PREPROCESSOR, resize=resize, pool=pool)
    (expected,) = VideoProcessor(4, PREPROCESSOR, resize=resize).prepare([np.stack(frames)])
    (video,) = processor.prepare([ImageSequence(tuple(map(png, frames)))])
    assert_equal(video, expected)


@pytest.mark.parametrize("frame_sampler", ["demo", "npu"])
@pytest.mark.parametrize("count", [5, 7, 100])
def test_the_frame_sampler_selects_among_more_images(frame_sampler: str, count: int) -> None:
    frames = pictures(*[(8, 10)] * count)
    processor = VideoProcessor(4, PREPROCESSOR, frame_sampler)
    indices = sample_frame_indices(count, 4, frame_sampler)
    (expected,) = processor.prepare([np.stack(frames)], [indices])
    (video,) = processor.prepare([ImageSequence(tuple(map(png, frames)))])
    assert_equal(video, expected)


@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [2, 0, 2, 2], [1, 1, 1, 1]])
def test_frame_indices_name_images(indices: list[int]) -> None:
    frames = pictures(*[(40, 90)] * 4)
    (expected,) = PROCESSOR.prepare([np.stack(frames)], [indices])
    (video,) = PROCESSOR.prepare([ImageSequence(tuple(map(png, frames)))], [indices])
    assert_equal(video, expected)


@pytest.mark.parametrize("resize", RESIZE_MODES)
def test_images_of_different_sizes_are_resized_as_videos_of_one_request_are(resize: str) -> None:
    """PLLaVA's processor takes a flat list of images. A request of several videos is such a list too."""
    frames = pictures((40, 90), (64, 64), (100, 30), (57, 56))
    processor = VideoProcessor(4, PREPROCESSOR, resize=resize)
    stills = processor.prepare([png(frame) for frame in frames])
    (video,) = processor.prepare([ImageSequence(tuple(map(png, frames)))])
    assert np.array_equal(video.frames, np.concatenate([still.frames for still in stills]))
    assert video.inverse_indices == video.frame_indices == (0, 1, 2, 3)


def test_paths_beside_a_video_and_bytes(pool: MediaPool, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    frames = pictures(*[(40, 90)] * 3)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, frame in zip(paths, frames, strict=True):
        path.write_bytes(png(frame))
    sequence = ImageSequence((str(paths[0]), paths[1], png(frames[2])))
    media = [clip, sequence, np.stack(frames), png(frames[0])]
    expected = PROCESSOR.prepare(media)
    assert_equal(expected[1], expected[2])
    for video, other in zip(VideoProcessor(4, PREPROCESSOR, pool=pool).prepare(media), expected, strict=True):
        assert_equal(video, other)


def test_the_cache_tells_sequences_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (png(frame) for frame in pictures((8, 8), (8, 8)))
    processor = VideoProcessor(4, PREPROCESSOR, cache=FrameCache(2**20))
    videos = [processor.prepare([ImageSequence(images)]) for images in ((first, second), (second, first))]
    videos.append(processor.prepare([first, second]))
    assert len({tuple(video.mm_hash for video in some) for some in videos}) == 3
    assert processor.prepare([ImageSequence((first, second))]) is videos[0]


@pytest.mark.parametrize(
    ("images", "limits", "why", "kind"),
    [
        ((b"x", b"y"), {"max_images": 1}, "a sequence of 2 images, the limit is 1", "too_many_frames"),
        ((None, b""), {}, "image 2 of 2: the given bytes: is empty", "empty"),
        ((b"nothing", None), {}, "image 1 of 2: .* cannot be read as an image", "not_a_medium"),
        ((None, None), {"max_side": 7}, "image 1 of 2: .*max_side", "too_large"),
        ((None, None), {"max_clip_bytes": 2 * 8 * 8 * 3 - 1}, "they need 384 bytes", "too_large"),
        ((None, None), {"max_decode_seconds": 0}, "max_decode_seconds", "timeout"),
    ],
)
def test_sequences_that_cannot_be_read(pool: MediaPool, images: tuple, limits: dict, why: str, kind: str) -> None:
    picture = png(random_frames(8, 8, 3, seed=1))
    sequence = ImageSequence(tuple(picture if image is None else image for image in images))
    for options in ({}, {"pool": pool}):
        processor = VideoProcessor(2, PREPROCESSOR, limits=MediaLimits(**limits), **options)
        with pytest.raises(VideoError, match=why) as error:
            processor.prepare([sequence])
        assert error.value.kind == kind


def test_an_animation_or_times_in_a_sequence() -> None:
    file = io.BytesIO()
    first, *others = [Image.fromarray(frame) for frame in pictures((8, 8), (8, 8))]
    first.save(file, "PNG", save_all=True, append_images=others)
    still = png(random_frames(8, 8, 3, seed=5))
    with pytest.raises(VideoError, match="image 2 of 2.* more than one picture"):
        PROCESSOR.prepare([ImageSequence((still, file.getvalue()))])
    with pytest.raises(VideoError, match="do not apply to images"):
        PROCESSOR.prepare([ImageSequence((still, still))], None, [(0.5, None)])


@pytest.mark.parametrize("images", [(), (b"one",), (b"one", 2)])
def test_what_is_no_sequence(images: tuple) -> None:
    with pytest.raises(VideoError, match="sequence") as error:
        ImageSequence(images)
    assert error.value.kind == "bad_request"
