"""Which stream is read, animated pictures, and names that are no local media.

The oracles are clips and pictures that show their number, and Pillow's own frames.
"""

import io
import os
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.frame_sampling import sample_frame_indices
from atb_pllava.multimodal.image import read_image
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media import list_media, read_media
from atb_pllava.multimodal.video import read_video
from tests.multimodal.test_video import numbered_frame, numbers, write_clip
from tests.support import TEST_DATA as DATA

# ---- several video streams ----


def write_streams(path, parts, default):
    """Streams of (codec, first number, frames) in one file; the one numbered `default` is marked so."""
    with av.open(str(path), "w") as container:
        streams = []
        for number, (codec, _, _) in enumerate(parts):
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height = 96, 32
            stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24"}.get(codec, "yuv420p")
            stream.disposition = int(number == default)
            streams.append(stream)
        for stream, (_, first, count) in zip(streams, parts, strict=True):
            for k in range(count):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(first + k), format="rgb24")))
            container.mux(stream.encode())
    return path


@pytest.mark.skipif(not hasattr(av.video.stream.VideoStream, "disposition"), reason="this PyAV marks no streams")
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize(
    "parts, default, first, count",
    [
        ([("mjpeg", 900, 1), ("libx264", 0, 30)], 1, 0, 30),
        ([("libx264", 0, 30), ("mjpeg", 900, 1)], 0, 0, 30),
        ([("libx264", 0, 30), ("libx264", 100, 20)], 1, 100, 20),
        ([("libx264", 0, 30), ("libx264", 100, 20)], 0, 0, 30),
        ([("mjpeg", 900, 1)], 0, 900, 1),
    ],
)
def test_the_best_stream_is_read(tmp_path, name, parts, default, first, count):
    clip = read_video(write_streams(tmp_path / name, parts, default), 8)
    assert clip.total_frames == count
    assert numbers(clip) == [first + k for k in clip.frame_indices]


@pytest.mark.parametrize("name", ["still_first.mp4", "still_first.mkv"])
def test_a_still_before_the_film_is_not_taken(name):
    film = read_video(DATA.parents[1] / "examples" / "videos" / "red_circle_moves_left.mp4", 25)
    clip = read_video(DATA / name, 25)
    assert clip.total_frames == 25 and clip.fps == 10
    np.testing.assert_array_equal(clip.frames, film.frames)


@pytest.mark.parametrize("name", ["still_first.mp4", "still_first.mkv"])
def test_limits_look_at_the_stream_that_is_read(name):
    with pytest.raises(VideoError, match="25 frames or more, the limit is 24"):
        read_video(DATA / name, 2, limits=MediaLimits(max_frames=24))


# ---- animated PNG and WebP ----

DURATIONS = [40, 60, 100, 100, 100, 100, 200, 100]  # milliseconds; 10 frames a second on average


def pictures(count=8, mode="RGB"):
    return [Image.fromarray(numbered_frame(k)).convert(mode) for k in range(count)]


def animation(ending, frames=None, **options):
    first, *others = frames or pictures()
    options = {"duration": DURATIONS[: len(others) + 1], **({"lossless": True} if ending == "webp" else {}), **options}
    content = io.BytesIO()
    first.save(content, "WEBP" if ending == "webp" else "PNG", save_all=True, append_images=others, **options)
    return content.getvalue()


def composed(content):
    """Frames as Pillow shows them, without the picture for programs that know no animations."""
    with Image.open(io.BytesIO(content)) as image:
        first, frames = int(getattr(image, "default_image", False)), []
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
    for size in range(20, len(content) - 30, len(content) // 40):  # the last frame is whole a few bytes before the end
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


# ---- opening ----


def test_a_file_is_opened_once(tmp_path, monkeypatch):
    opened, real = [], os.open
    monkeypatch.setattr(
        "atb_pllava.multimodal.media_file.os.open", lambda name, *a: opened.append(str(name)) or real(name, *a)
    )
    (tmp_path / "a.png").write_bytes(animation("png"))
    pictures()[0].save(tmp_path / "b.png")
    for path in (write_clip(tmp_path / "c.mp4", 5), tmp_path / "a.png", tmp_path / "b.png"):
        opened.clear()
        read_media(path, 2)
        assert opened.count(str(path)) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://a.b/c.mp4",
        "https://a.b/c.mp4",
        "s3://bucket/c.mp4",
        "file:///tmp/c.mp4",
        "HTTPS://A.B/c",
        Path("http://a/b"),
    ],
)
def test_urls_are_not_fetched(url):
    for read in (read_media, read_video, read_image, list_media):
        with pytest.raises(VideoError, match="URLs are not fetched"):
            read(url)


def test_missing_files_are_told_briefly(tmp_path):
    for read in (read_media, read_video, read_image, list_media):
        with pytest.raises(VideoError, match=r"gone.mp4: cannot be opened: No such file or directory$"):
            read(tmp_path / "gone.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "a.webp", "a.gif"])
def test_git_lfs_pointers_are_named(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 5037211\n"
    (tmp_path / name).write_text(pointer)
    for source in (tmp_path / name, pointer.encode()):
        for read in (read_media, read_video, read_image):
            with pytest.raises(VideoError, match="is a Git LFS pointer, not the media; run `git lfs pull`"):
                read(source)


def test_a_picture_marked_as_the_film_does_not_hide_it(tmp_path):
    """FFmpeg calls a PNG best when it is marked default, and nobody means it."""
    clip = read_video(write_streams(tmp_path / "a.mp4", [("png", 900, 1), ("libx264", 0, 30)], 0), 8)
    assert clip.total_frames == 30 and numbers(clip) == clip.frame_indices


@pytest.mark.parametrize("brand", ["heic", "heix", "mif1", "avif"])
def test_a_picture_in_several_streams_is_refused(tmp_path, brand):
    """FFmpeg has a stream for each tile of a HEIC picture; one of them is not the picture."""
    for parts, is_read in (([("libx264", 7, 1)], True), ([("libx264", 7, 1), ("libx264", 8, 1)], False)):
        write_streams(tmp_path / "film.mp4", parts, 0)
        content = (tmp_path / "film.mp4").read_bytes()
        assert content[4:8] == b"ftyp"
        picture = tmp_path / "picture.heic"
        picture.write_bytes(content[:8] + brand.encode() + content[12:])
        if is_read:
            assert numbers(read_media(picture, 1)) == [7]
            continue
        with pytest.raises(VideoError, match="holds a picture in tiles, or several pictures; convert it, to JPEG"):
            read_media(picture)
