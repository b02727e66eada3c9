"""Animated PNG and WebP to frames. The oracles are Pillow's own frames, and the ffmpeg command where it is there."""

import io
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.frame_sampling import sample_frame_indices
from atb_pllava.multimodal.image import read_image
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media import read_media
from tests.multimodal.numbered_clips import DURATIONS, animation, numbers, pictures


def composed(content):
    """Frames as Pillow shows them, without the default image for programs without animations."""
    with Image.open(io.BytesIO(content)) as image:
        first = int(getattr(image, "default_image", False))
        frames = []
        for k in range(first, image.n_frames):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


@pytest.mark.parametrize("ending", ["webp", "png"])
def test_animations_are_videos(tmp_path, ending):
    content = animation(ending)
    (tmp_path / f"a.{ending}").write_bytes(content)
    for source in (content, tmp_path / f"a.{ending}"):
        clip = read_media(source, 16)
        assert (clip.total_frames, clip.fps) == (8, pytest.approx(10))
        assert numbers(clip) == clip.frame_indices == sample_frame_indices(8, 16)
    for frame_sampler in ("eval", "npu"):
        clip = read_media(content, 4, frame_sampler=frame_sampler)
        assert numbers(clip) == clip.frame_indices == sample_frame_indices(8, 4, frame_sampler)
    assert numbers(read_media(content, frame_indices=[7, 0, 3, 3])) == [7, 0, 3, 3]
    clip = read_media(content, 4, frame_sampler="eval", start_seconds=0.2, end_seconds=0.6)
    assert numbers(clip) == clip.frame_indices == [2, 3, 4, 5]


def moving_squares(mode):
    """Frames that differ in a small part, with transparency where the mode has it."""
    frames = []
    for k in range(6):
        image = Image.new("RGBA", (40, 30), (0, 0, 0, 0) if mode == "RGBA" else (30, 90, 200, 255))
        image.paste((220, 30 * k, 30, 255), (5 * k, 4, 5 * k + 9, 13))
        frames.append(image.convert(mode))
    return frames


@pytest.mark.parametrize(
    "ending, options",
    [
        *(("png", {"disposal": disposal, "blend": blend}) for disposal in (0, 1, 2) for blend in (0, 1)),
        ("webp", {"minimize_size": True}),
        ("webp", {"allow_mixed": True}),
        ("webp", {"lossless": False, "quality": 90}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_disposal_and_blending(ending, options, mode):
    content = animation(ending, moving_squares(mode), **options)
    clip = read_media(content, frame_indices=list(range(6)))
    np.testing.assert_array_equal(clip.frames, composed(content))


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg command is not here")
@pytest.mark.parametrize("default_image", [False, True])
@pytest.mark.parametrize("disposal", [0, 1, 2])
@pytest.mark.parametrize("blend", [0, 1])
def test_animated_png_equals_the_ffmpeg_command(tmp_path, disposal, blend, default_image):
    options = {"disposal": disposal, "blend": blend, "default_image": default_image}
    if default_image:
        options["duration"] = DURATIONS[:5]
    content = animation("png", moving_squares("RGB"), **options)
    (tmp_path / "a.png").write_bytes(content)
    command = ["ffmpeg", "-v", "quiet", "-i", str(tmp_path / "a.png"), "-vsync", "passthrough", "-pix_fmt", "rgb24"]
    done = subprocess.run([*command, "-f", "rawvideo", "-"], capture_output=True, check=True)
    expected = np.frombuffer(done.stdout, np.uint8).reshape(-1, 30, 40, 3)
    clip = read_media(content, frame_indices=list(range(len(expected))))
    assert clip.total_frames == len(expected) == 6 - default_image
    np.testing.assert_array_equal(clip.frames, expected)


def test_the_default_image_of_a_png_is_no_frame():
    content = animation("png", default_image=True, duration=DURATIONS[:7])
    clip = read_media(content, frame_indices=list(range(7)))
    assert clip.total_frames == 7 and numbers(clip) == [1, 2, 3, 4, 5, 6, 7]


def test_palette_and_grey_animations():
    for mode in ("L", "P"):
        content = animation("png", pictures(mode=mode))
        assert numbers(read_media(content, frame_indices=[6, 1])) == [6, 1]


@pytest.mark.parametrize("ending", ["webp", "png"])
def test_limits_of_animations(ending):
    content = animation(ending)
    for limits, match in [
        (MediaLimits(max_frames=7), "8 frames or more, the limit is 7"),
        (MediaLimits(max_seconds=0.5), "1 seconds, the limit is 0.5"),
        (MediaLimits(max_pixels=3000), r"96x32 pixels = 3072, the limit is 3000"),
        (MediaLimits(max_side=90), "longest side allowed is 90"),
        (MediaLimits(max_clip_bytes=96 * 32 * 3 * 3), "max_clip_bytes"),
        (MediaLimits(max_decode_seconds=0.0), "max_decode_seconds"),
        (MediaLimits(max_bytes=100), "max_bytes"),
    ]:
        with pytest.raises(VideoError, match=match):
            read_media(content, 4, limits=limits)
    with pytest.raises(VideoError, match="frame index 8 is not a frame number; they go from 0 to 7"):
        read_media(content, frame_indices=[8])
    with pytest.raises(VideoError, match="no frame lies between"):
        read_media(content, 4, frame_sampler="eval", start_seconds=5)


@pytest.mark.parametrize("ending", ["webp", "png"])
def test_damaged_animations_give_one_error(ending):
    content = animation(ending)
    for size in range(20, len(content) - 30, len(content) // 40):  # the last few bytes belong to no frame
        with pytest.raises(VideoError, match="cannot be read as an image; it is another kind of file, truncated"):
            read_media(content[:size], 4)


def test_more_frames_announced_than_there_are():
    content = animation("png")
    at = content.index(b"acTL")
    for announced in (9, 2**31 - 1):
        chunk = b"acTL" + struct.pack(">II", announced, 0)
        hostile = content[:at] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[at + 16 :]
        with pytest.raises(VideoError, match="truncated or damaged|frames or more, the limit is"):
            read_media(hostile, 4)


@pytest.mark.parametrize("ending", ["webp", "png"])
def test_an_animation_is_no_still(tmp_path, ending):
    path = tmp_path / "a"
    path.write_bytes(animation(ending))
    with pytest.raises(VideoError, match="holds more than one picture; read it as a video"):
        read_image(path)


def test_documents_of_several_pages_are_refused(tmp_path):
    first, *others = pictures()
    first.save(tmp_path / "a.tiff", save_all=True, append_images=others)
    for read in (read_image, read_media):
        with pytest.raises(VideoError, match="holds more than one picture; save the one you mean"):
            read(tmp_path / "a.tiff")
