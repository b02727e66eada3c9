"""Frames to the vision tower's pixels, bit for bit.

The oracles are transformers' CLIPImageProcessor, Pillow, and crops of the original code where the reference data is
there.
"""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.transforms import normalize, resize_frames
from atb_pllava.multimodal.video import read_video
from tests.support import REFERENCE, SHARED_DATA, needs_reference

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@needs_reference
@pytest.mark.parametrize(
    "case, video, png",
    [
        ("L_full_alpha4", "yoga", "yoga"),
        ("P_4f_16x12x12_upsample", "jesse_dance", "jesse"),
        ("A_demo_yoga_16f_16x12x12", "yoga", None),
    ],
)
def test_pixels_equal_the_original(case, video, png):
    facts = json.loads((REFERENCE / "cases.json").read_text())[case]
    clip = read_video(SHARED_DATA / "videos" / f"{video}.mp4", facts["num_frames"])
    assert clip.frame_indices == facts["media"][0]["frame_indices"]
    (crops,) = resize_frames([clip.frames])
    if png:
        expected = np.asarray(Image.open(REFERENCE / "frames" / f"{png}_demo4.png"))
        np.testing.assert_array_equal(crops.reshape(expected.shape), expected)
    pixels = normalize(crops, CLIP_MEAN, CLIP_STD)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == facts["pixel_values"]["sha256"]
    with np.load(REFERENCE / f"{case}.npz") as stored:
        np.testing.assert_array_equal(pixels[:, :, ::24, ::24], stored["pixel_sub"])


def noise(frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


@pytest.mark.parametrize("height, width", [(320, 568), (720, 1280), (336, 336), (40, 30), (1080, 608), (50, 500)])
def test_pixels_equal_clip_after_the_first_resize(height, width):
    clip_module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = clip_module.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    video = noise(2, height, width)
    long = max(height, width)
    short = min(height, width)
    edge = max(min(short, int(min(640, long) / (long / short))), 336)
    first = (edge, int(edge * long / short)) if width < height else (int(edge * long / short), edge)
    frames = [Image.fromarray(frame).resize(first, Image.Resampling.BICUBIC) for frame in video]
    expected = np.stack(processor(frames, return_tensors="np")["pixel_values"])
    (crops,) = resize_frames([video])
    actual = normalize(crops, CLIP_MEAN, CLIP_STD)
    assert actual.dtype == np.float32 and actual.flags.c_contiguous
    np.testing.assert_array_equal(actual, expected)


def test_several_videos_share_one_size():
    wide = noise(2, 300, 600)
    tall = noise(3, 400, 320, seed=1)
    # The least elongated video is 4:5 and the longest edge is 600. min(320, 600 / 1.25) is below 336, so the edges are
    # 336 and 420 after the first resize.
    first = [Image.fromarray(f).resize((672, 336), Image.Resampling.BICUBIC) for f in wide]
    cut = [
        f.crop((63, 0, 63 + 420, 336)) for f in first
    ]  # 252 columns too many, a quarter of them is cut off on the left
    expected_wide = np.stack([np.asarray(f.crop((42, 0, 378, 336))) for f in cut])
    second = [Image.fromarray(f).resize((336, 420), Image.Resampling.BICUBIC) for f in tall]
    expected_tall = np.stack([np.asarray(f.crop((0, 42, 336, 378))) for f in second])
    results = resize_frames([wide, tall])
    np.testing.assert_array_equal(results[0], expected_wide)
    np.testing.assert_array_equal(results[1], expected_tall)


def test_other_resize_modes():
    video = noise(1, 300, 500)
    image = Image.fromarray(video[0])
    squashed = np.asarray(image.resize((336, 336), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize_frames([video], mode="squash")[0][0], squashed)
    before = np.asarray(image.resize((1120, 672), Image.Resampling.BILINEAR))[None]
    np.testing.assert_array_equal(resize_frames([video], mode="res672")[0], resize_frames([before])[0])
    assert resize_frames([video], crop_size=224, shortest_edge=224)[0].shape == (1, 224, 224, 3)
    with pytest.raises(VideoError, match="'pad'; allowed are clip, res672, squash"):
        resize_frames([video], mode="pad")
    assert resize_frames([video], crop_size=224, shortest_edge=336)[0].shape == (1, 224, 224, 3)


def test_copies_of_one_image_are_resized_alike():
    frame = noise(1, 200, 300)
    (copies,) = resize_frames([np.broadcast_to(frame[0], (4, 200, 300, 3))])
    (single,) = resize_frames([frame])
    np.testing.assert_array_equal(copies, np.repeat(single, 4, axis=0))
    np.testing.assert_array_equal(normalize(copies, CLIP_MEAN, CLIP_STD)[3], normalize(single, CLIP_MEAN, CLIP_STD)[0])
