"""Still images to RGB frames. The oracle is Pillow."""

import numpy as np
import pytest
from PIL import Image

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.frame_sampling import sample_frame_indices
from atb_pllava.multimodal.image import read_image
from atb_pllava.multimodal.media import read_media
from tests.multimodal.numbered_clips import numbered_frame, numbers, write_clip


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK"])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tiff"])
def test_images_become_rgb(tmp_path, mode, ending):
    image = Image.fromarray(numbered_frame(1234)).convert(mode)
    path = tmp_path / f"a.{ending}"
    try:
        image.save(path)
    except (OSError, ValueError, KeyError):
        pytest.skip("Pillow does not write this")
    with Image.open(path) as stored:
        expected = np.asarray(stored.convert("RGB"))
    clip = read_image(path)
    np.testing.assert_array_equal(clip.frames, expected[None])
    assert (clip.frame_indices, clip.total_frames, clip.fps) == ([0], 1, 0.0)


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").frames[0, :, :, 1], grey >> 8)


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(numbered_frame(77)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").frames[0], np.rot90(numbered_frame(77), -1))


def test_image_as_media(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(numbered_frame(5)).save(path)
    clip = read_media(path, 16)
    assert clip.frames.shape == (16, 32, 96, 3) and clip.frame_indices == [0] * 16 and set(numbers(clip)) == {5}
    assert read_media(path.read_bytes(), frame_indices=[0, 0]).frames.shape[0] == 2
    for options, match in [
        ({"frame_indices": [1]}, "from 0 to 0"),
        ({"frame_sampler": "eval", "start_seconds": 1}, "do not apply to an image"),
        ({"num_frames": 65}, "1 to 64"),
    ]:
        with pytest.raises(VideoError, match=match):
            read_media(path, **options)
    assert numbers(read_media(write_clip(tmp_path / "a.mp4", 10), 2)) == sample_frame_indices(10, 2)


def test_bad_images(tmp_path):
    png = tmp_path / "a.png"
    path = tmp_path / "b.png"
    Image.effect_noise((64, 64), 50).save(png)
    for content, match in [
        (b"text", "cannot be read as an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "cannot be read as an image"),
        (png.read_bytes()[:2000], "cannot be read as an image"),
        (b"", "is empty"),
    ]:
        path.write_bytes(content)
        with pytest.raises(VideoError, match=match):
            read_image(path)
    Image.new("L", (8000, 8000)).save(path)
    with pytest.raises(VideoError, match="8000x8000.*max_pixels"):
        read_image(path)
    Image.new("1", (12000, 12000)).save(path)
    with pytest.raises(VideoError, match="pixels.*MediaLimits.max_"):
        read_image(path)
    Image.new("L", (10, 10)).save(path, save_all=True, append_images=[Image.new("L", (10, 10), 255)])
    with pytest.raises(VideoError, match="more than one picture"):
        read_image(path)
