"""Which stream of a file with several video streams is read."""

import av
import numpy as np
import pytest

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media import read_media
from atb_pllava.multimodal.video import read_video
from tests.multimodal.numbered_clips import numbered_frame, numbers
from tests.support import EXAMPLES, TEST_DATA


def write_streams(path, parts, default):
    """Writes streams of (codec, first number, frames) to one file and marks stream number `default` as default."""
    with av.open(str(path), "w") as container:
        streams = []
        for number, (codec, _, _) in enumerate(parts):
            stream = container.add_stream(codec, rate=25)
            stream.width = 96
            stream.height = 32
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
    film = read_video(EXAMPLES / "videos" / "red_circle_moves_left.mp4", 25)
    clip = read_video(TEST_DATA / name, 25)
    assert clip.total_frames == 25 and clip.fps == 10
    np.testing.assert_array_equal(clip.frames, film.frames)


@pytest.mark.parametrize("name", ["still_first.mp4", "still_first.mkv"])
def test_limits_look_at_the_stream_that_is_read(name):
    with pytest.raises(VideoError, match="25 frames or more, the limit is 24"):
        read_video(TEST_DATA / name, 2, limits=MediaLimits(max_frames=24))


def test_a_picture_marked_as_the_film_does_not_hide_it(tmp_path):
    """FFmpeg calls a PNG stream best when it is marked as default, but the film is read."""
    clip = read_video(write_streams(tmp_path / "a.mp4", [("png", 900, 1), ("libx264", 0, 30)], 0), 8)
    assert clip.total_frames == 30 and numbers(clip) == clip.frame_indices


@pytest.mark.parametrize("brand", ["heic", "heix", "mif1", "avif"])
def test_a_picture_in_several_streams_is_refused(tmp_path, brand):
    """FFmpeg has a stream for each tile of a HEIC picture. One tile is not the picture."""
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
