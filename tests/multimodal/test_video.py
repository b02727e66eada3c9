"""Videos to frames: exact frame numbers in every container, exact pixels, damaged files, limits.

The oracles are clips whose frame number is drawn into every frame, and frames of the original code where the reference
data is there.
"""

import os
import struct
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.frame_sampling import sample_frame_indices
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media import list_media, read_media
from atb_pllava.multimodal.video import read_video
from tests.multimodal.numbered_clips import OPEN_GOP, X264_LONG, X264_SHORT, numbered_frame, numbers, write_clip
from tests.support import REFERENCE, SHARED_DATA, needs_reference

FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
KINDS = {
    "mp4-long-gop": dict(name="a.mp4", options=X264_LONG),
    "mp4-short-gop": dict(name="a.mp4", options=X264_SHORT),
    "mp4-open-gop": dict(name="a.mp4", options=OPEN_GOP),
    "mp4-all-key": dict(name="a.mp4", options={"g": "1", "preset": "veryfast"}),
    "mp4-fragmented": dict(name="a.mp4", options=X264_SHORT, container_options=FRAGMENTED),
    "mp4-intra-refresh": dict(name="a.mp4", options={"x264-params": "intra-refresh=1:keyint=20", "preset": "veryfast"}),
    "mov-mpeg4": dict(name="a.mov", codec="mpeg4", gop=12),
    "mkv": dict(name="a.mkv", options=X264_SHORT),
    "mkv-hevc": dict(name="a.mkv", codec="libx265", options={"x265-params": "keyint=12:log-level=none"}),
    "mpegts": dict(name="a.ts", options=X264_SHORT),
    "mpegts-open-gop": dict(name="a.ts", options=OPEN_GOP),
    "flv": dict(name="a.flv", options=X264_SHORT),
    "webm-vp9": dict(name="a.webm", codec="libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"}, gop=20),
    "webm-vp9-altref": dict(
        name="a.webm", codec="libvpx-vp9", options={"cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "12"}, gop=20
    ),
    "webm-vp8-altref": dict(
        name="a.webm", codec="libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "12", "cpu-used": "5"}, gop=20
    ),
    "wmv": dict(name="a.wmv", codec="wmv2", gop=12),
    "asf-msmpeg4": dict(name="a.asf", codec="msmpeg4", gop=12),
    "gif": dict(name="a.gif", codec="gif", pix_fmt="rgb8"),
    "avi": dict(name="a.avi", codec="mpeg4", gop=12),
    "avi-b-frames": dict(name="a.avi", codec="mpeg4", options={"bf": "2"}, gop=12),
    "avi-h264": dict(name="a.avi", options=X264_SHORT),
    "avi-mjpeg": dict(name="a.avi", codec="mjpeg", pix_fmt="yuvj420p"),
    "mpg": dict(name="a.mpg", codec="mpeg2video", options={"bf": "2"}, gop=12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_exact_in_every_container(tmp_path, kind):
    settings = dict(KINDS[kind])
    path = tmp_path / settings.pop("name")
    try:
        write_clip(path, 120, **settings)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        pytest.skip(f"this FFmpeg cannot write it: {error}")
    clip = read_video(path, 16)
    assert clip.total_frames == 120 and clip.fps == pytest.approx(25, rel=0.02)
    assert numbers(clip) == clip.frame_indices == sample_frame_indices(120, 16)
    scattered = [119, 0, 37, 37, 118, 36, 38, 61, 13, 12, 11, 1, 90, 47, 48, 49]
    assert numbers(read_video(path, frame_indices=scattered)) == scattered


@pytest.mark.parametrize("kind", ["mp4-short-gop", "mkv-hevc", "webm-vp9", "mpegts", "avi-b-frames", "gif"])
def test_chosen_frames_equal_full_decode(tmp_path, kind):
    settings = dict(KINDS[kind])
    path = write_clip(tmp_path / settings.pop("name"), 60, **settings)
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    indices = np.random.default_rng(5).integers(0, 60, 30).tolist()
    np.testing.assert_array_equal(read_video(path, frame_indices=indices).frames, np.stack(every)[indices])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("offset", [0, 7000])
def test_variable_frame_rate_and_late_start(tmp_path, name, offset):
    steps = np.random.default_rng(1).choice([20, 40, 100, 400], 80)
    path = write_clip(tmp_path / name, 80, pts=(offset + np.cumsum(steps)).tolist(), options=X264_SHORT)
    indices = [79, 3, 40, 41, 12, 0, 78]
    clip = read_video(path, frame_indices=indices)
    assert clip.total_frames == 80 and numbers(clip) == indices


def test_content_as_bytes(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 30)
    by_name = read_video(str(path), 4)
    by_content = read_video(path.read_bytes(), 4)
    np.testing.assert_array_equal(by_name.frames, by_content.frames)
    assert by_name.source == str(path) and by_content.source


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.gif"])
def test_short_clips_repeat_frames(tmp_path, count, name):
    settings = dict(codec="gif", pix_fmt="rgb8") if name.endswith("gif") else {}
    clip = read_video(write_clip(tmp_path / name, count, **settings), 8)
    assert clip.frames.shape == (8, 32, 96, 3)
    assert numbers(clip) == clip.frame_indices == sample_frame_indices(count, 8)


def test_gif_in_eval_repeats_the_sequence(tmp_path):
    path = write_clip(tmp_path / "a.gif", 3, "gif", pix_fmt="rgb8")
    assert read_video(path, 8, frame_sampler="eval").frame_indices == [0, 1, 2, 0, 1, 2, 0, 1]
    assert read_video(path, 8).frame_indices == sample_frame_indices(3, 8)


def test_time_bounds_choose_a_part(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 100)
    clip = read_video(path, 4, frame_sampler="eval", start_seconds=1.0, end_seconds=2.0)
    assert numbers(clip) == clip.frame_indices == [28, 34, 40, 47]
    with pytest.raises(VideoError, match="4.00 seconds long"):
        read_video(path, 4, frame_sampler="eval", start_seconds=9)


# ---- what a frame may look like ----


@needs_reference
@pytest.mark.parametrize("video, index", [("yoga", 112), ("jesse_dance", 87)])
def test_decoded_frame_equals_the_original(video, index):
    expected = np.asarray(Image.open(REFERENCE / "frames" / f"raw_{video}_{index}.png"))
    clip = read_video(SHARED_DATA / "videos" / f"{video}.mp4", frame_indices=[index])
    assert clip.total_frames == {"yoga": 300, "jesse_dance": 235}[video]
    np.testing.assert_array_equal(clip.frames[0], expected)


def rotated(path: Path, matrix: tuple[int, ...]) -> Path:
    """Writes a display matrix into the mp4's track header."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(content)
    return path


ONE = 1 << 16
UNIT = 1 << 30
ROTATIONS = {  # display matrix, and what a player does with the stored picture
    "quarter": ((0, ONE, 0, -ONE, 0, 0, 0, 0, UNIT), lambda f: np.rot90(f, -1)),
    "half": ((-ONE, 0, 0, 0, -ONE, 0, 0, 0, UNIT), lambda f: np.rot90(f, 2)),
    "three-quarters": ((0, -ONE, 0, ONE, 0, 0, 0, 0, UNIT), np.rot90),
    "mirror": ((-ONE, 0, 0, 0, ONE, 0, 0, 0, UNIT), np.fliplr),
}


@pytest.mark.parametrize("turn", ROTATIONS)
def test_rotation_is_applied(tmp_path, turn):
    matrix, expected = ROTATIONS[turn]
    path = write_clip(tmp_path / "a.mp4", 10)
    stored = read_video(path, frame_indices=[7]).frames[0]
    shown = read_video(rotated(path, matrix), frame_indices=[7]).frames[0]
    np.testing.assert_array_equal(shown, expected(stored))


@pytest.mark.parametrize(
    "codec, pix_fmt, name",
    [
        ("libx264", "yuv420p10le", "a.mp4"),
        ("libx264", "gray", "a.mp4"),
        ("libx264", "yuv444p", "a.mp4"),
        ("ffv1", "bgra", "a.mkv"),
        ("libvpx-vp9", "yuva420p", "a.webm"),
        ("prores", "yuv422p10le", "a.mov"),
        ("mjpeg", "yuvj420p", "a.avi"),
    ],
)
def test_pixel_formats_become_rgb(tmp_path, codec, pix_fmt, name):
    path = write_clip(tmp_path / name, 12, codec, pix_fmt=pix_fmt)
    clip = read_video(path, frame_indices=[11, 2])
    assert clip.frames.dtype == np.uint8 and clip.frames.shape == (2, 32, 96, 3)
    assert numbers(clip) == [11, 2]
    assert np.abs(clip.frames[0].astype(int) - numbered_frame(11)).mean() < (20 if pix_fmt == "gray" else 8)


@pytest.mark.parametrize("size", [(97, 33), (101, 47)])
def test_odd_sizes(tmp_path, size):
    path = write_clip(tmp_path / "a.mkv", 12, "ffv1", size=size, pix_fmt="yuv444p")
    clip = read_video(path, frame_indices=[9])
    assert clip.frames.shape == (1, size[1], size[0], 3) and numbers(clip) == [9]


def test_frames_of_another_size_are_scaled_to_the_first(tmp_path):
    small = write_clip(tmp_path / "s.ts", 20)
    large = write_clip(tmp_path / "l.ts", 20, size=(192, 64))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    clip = read_video(joined, frame_indices=[0, 39])
    assert clip.total_frames == 40 and clip.frames.shape == (2, 32, 96, 3)


# ---- files that are no good ----


def refused(source, match, **options):
    """Checks that reading fails within a second, with our own message and without FFmpeg's words."""
    begin = time.monotonic()
    with pytest.raises(VideoError, match=match) as caught:
        read_video(source, **options)
    assert time.monotonic() - begin < 1
    for word in ("errno", "av_", "moov", "returned", "Invalid data"):
        assert word.lower() not in str(caught.value).lower().replace(str(source).lower(), "")


NOT_VIDEOS = {
    "random.mp4": np.random.default_rng(0).bytes(5000),
    "text.mp4": b"hello, this is no video\n" * 50,
    "page.mp4": b"<!DOCTYPE html><html><body>404</body></html>",
    "elf.mp4": b"\x7fELF\x02\x01\x01" + bytes(500),
    "zip.mp4": b"PK\x03\x04" + bytes(500),
    "list.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nother.ts\n#EXT-X-ENDLIST\n",
    "concat.mp4": b"ffconcat version 1.0\nfile other.mp4\n",
    "script.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/x.ts\n",
}


@pytest.mark.parametrize("name", NOT_VIDEOS)
def test_other_files_are_refused(tmp_path, name, capfd):
    write_clip(tmp_path / "other.mp4", 5)
    (tmp_path / name).write_bytes(NOT_VIDEOS[name])
    refused(tmp_path / name, "cannot be read as a video")
    assert capfd.readouterr() == ("", "")


def test_things_that_are_not_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(tmp_path / "pipe.mp4", "not a regular file")
    refused(tmp_path, "not a regular file")
    refused("/dev/zero", "not a regular file")
    refused(tmp_path / "absent.mp4", "cannot be opened: No such file")
    refused("a\0.mp4", "not a file name")
    for url in ["http://127.0.0.1:9/a.mp4", "https://a.b/c.gif", "s3://bucket/a.mp4", "file:///tmp/a.mp4"]:
        refused(url, "URLs are not fetched")
        with pytest.raises(VideoError, match="URLs are not fetched"):
            list_media(url)
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "is empty")
    refused(b"", "is empty")


def test_image_under_a_video_name(tmp_path):
    path = tmp_path / "a.mp4"
    Image.new("RGB", (40, 30), "red").save(path, "PNG")
    refused(path, "holds an image, not a video")
    assert read_media(path, 2).frames.shape == (2, 30, 40, 3)


def test_audio_only(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    refused(path, "no video stream")


def test_truncated_files(tmp_path):
    whole = write_clip(tmp_path / "a.mp4", 200, options=X264_SHORT).read_bytes()
    refused(whole[: len(whole) * 6 // 10], "truncated or damaged")  # the index is at the end and lost
    begun = write_clip(tmp_path / "b.mp4", 200, options=X264_SHORT, container_options={"movflags": "+faststart"})
    content = begun.read_bytes()[: begun.stat().st_size * 6 // 10]
    refused(content, r"frame \d+ of 200 cannot be decoded, \d+ frames are readable", num_frames=16)
    assert numbers(read_video(content, frame_indices=[0, 40, 20])) == [0, 40, 20]


def test_truncated_files_whose_frames_are_counted(tmp_path):
    """H.264 in AVI has no presentation times: frames in front of the cut are read, later ones are an error."""
    path = write_clip(tmp_path / "a.avi", 60, options=X264_SHORT)
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    content = path.read_bytes()[: positions[30] - 8]  # a chunk header of 8 bytes precedes the packet
    clip = read_video(content, frame_indices=[0, 5, 20])
    assert clip.total_frames == 60 and numbers(clip) == [0, 5, 20]
    refused(content, "frame 45 of 60 cannot be decoded, 30 frames are readable", frame_indices=[3, 45])


def test_damage_in_the_middle_is_told_or_logged(tmp_path, caplog):
    path = write_clip(tmp_path / "a.avi", 60, "mjpeg", pix_fmt="yuvj420p")
    content = bytearray(path.read_bytes())
    at = len(content) // 2
    content[at - 1500 : at + 1500] = bytes(3000)
    try:
        clip = read_video(bytes(content), 60)
    except VideoError as error:
        assert "cannot be decoded" in str(error)
    else:
        wrong = sum(a != b for a, b in zip(numbers(clip), clip.frame_indices, strict=True))
        assert wrong == 0 or "damaged" in caplog.text


def test_lost_frames_in_the_middle_are_an_error(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 60, options={"g": "10", "preset": "veryfast"})
    with av.open(str(path)) as container:
        spans = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    content = bytearray(path.read_bytes())
    for pos, size in spans[20:40]:
        content[pos : pos + size] = bytes(size)
    refused(bytes(content), r"frame 2\d of 60 cannot be decoded, \d\d frames are readable", frame_indices=[1, 25, 55])
    assert numbers(read_video(bytes(content), frame_indices=[1, 55])) == [1, 55]


def test_missing_last_frame_is_replaced(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 40, options={"bf": "0", "preset": "veryfast"})
    with av.open(str(path)) as container:
        pos, size = [(p.pos, p.size) for p in container.demux(video=0) if p.size][-1]
    content = bytearray(path.read_bytes())
    content[pos : pos + size] = bytes(size)
    clip = read_video(bytes(content), frame_indices=[5, 39])
    assert clip.total_frames == 40 and numbers(clip) == [5, 38]


def test_recording_that_begins_between_keys(tmp_path):
    content = write_clip(tmp_path / "a.ts", 60, options={"g": "20", "bf": "2", "preset": "veryfast"}).read_bytes()
    with av.open(str(tmp_path / "a.ts")) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    cut = packets[5].pos // 188 * 188
    clip = read_video(content[: 188 * 2] + content[cut:], 4)
    assert clip.total_frames == 40 and numbers(clip) == [20 + k for k in clip.frame_indices]


# ---- limits ----


def with_header_size(path: Path, width: int, height: int) -> bytes:
    """The matroska file with another size in its header (PixelWidth, PixelHeight as two bytes)."""
    content = path.read_bytes()
    # 320 and 272 in two bytes
    old_width = b"\xb0\x82\x01\x40"
    old_height = b"\xba\x82\x01\x10"
    assert content.count(old_width) == content.count(old_height) == 1
    new_width = b"\xb0\x82" + struct.pack(">H", width)
    new_height = b"\xba\x82" + struct.pack(">H", height)
    return content.replace(old_width, new_width).replace(old_height, new_height)


@pytest.mark.parametrize(
    "width, height, match",
    [
        (8192, 8192, r"8192x8192 pixels = 67108864, the limit is 36000000 \(MediaLimits.max_pixels"),
        (65535, 65535, "longest side allowed is 8192|picture size cannot be read"),
        (8200, 4000, r"8200x4000 pixels, the longest side allowed is 8192 \(MediaLimits.max_side"),
        (8000, 100, r"8000x100 pixels, sides may differ by a factor of 20 \(MediaLimits.max_aspect"),
    ],
)
def test_size_bombs(tmp_path, width, height, match):
    path = write_clip(tmp_path / "a.mkv", 3, "ffv1", size=(320, 272))
    refused(with_header_size(path, width, height), match)


def test_compressed_size_bomb(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = 1200
        stream.height = 1000
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame(1200, 1000, "yuv420p")))
        container.mux(stream.encode())
    refused(path, "1200x1000 pixels = 1200000, the limit is 1000000", limits=MediaLimits(max_pixels=1_000_000))
    limits = MediaLimits(max_side=1000)
    refused(path, "1200x1000 pixels, the longest side allowed is 1000", limits=limits)


def test_duration_and_count_bombs(tmp_path):
    day = write_clip(tmp_path / "a.mp4", 25, pts=[k * 3_600_000 for k in range(25)])
    refused(day, r"\d+ seconds, the limit is 14400 \(MediaLimits.max_seconds\)")
    long = write_clip(tmp_path / "b.mkv", 60)
    refused(long, "max_frames", limits=MediaLimits(max_frames=59))
    refused(write_clip(tmp_path / "c.mp4", 60), "max_frames", limits=MediaLimits(max_frames=59))
    refused(long, r"bytes, the limit is 1000 \(MediaLimits.max_bytes\)", limits=MediaLimits(max_bytes=1000))
    refused(long.read_bytes(), "max_bytes", limits=MediaLimits(max_bytes=1000))
    refused(long, "max_clip_bytes", limits=MediaLimits(max_clip_bytes=96 * 32 * 3 * 15))
    refused(long, r"max_decode_seconds", limits=MediaLimits(max_decode_seconds=0.0))
    assert read_video(long, 16, limits=MediaLimits(max_clip_bytes=96 * 32 * 3 * 16, max_frames=60)).total_frames == 60


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_frames": 0}, "num_frames is 0; it must be a whole number from 1 to 64"),
        ({"num_frames": -1}, "num_frames is -1"),
        ({"num_frames": 10**9}, "1 to 64"),
        ({"num_frames": "16"}, "num_frames is '16'"),
        ({"num_frames": float("nan")}, "num_frames is nan"),
        ({"num_frames": True}, "num_frames is True"),
        ({"num_frames": None}, "num_frames is None"),
        ({"frame_sampler": "middle"}, "frame_sampler is 'middle'; allowed are demo, eval, npu"),
        ({"frame_sampler": "npu", "start_seconds": 1}, "need frame_sampler 'demo' or 'eval'"),
        ({"frame_sampler": "eval", "start_seconds": float("nan")}, "start_seconds is nan"),
        ({"frame_sampler": "eval", "end_seconds": float("inf")}, "end_seconds is inf"),
        (
            {"frame_sampler": "eval", "start_seconds": 3, "end_seconds": 1},
            "a.mp4: no frame lies between start_seconds 3 and end_seconds 1, and the clip is 10.00 seconds long",
        ),
        ({"start_seconds": 99}, "no frame lies between start_seconds 99 and the end,"),
        ({"frame_indices": []}, "the number of frame_indices is 0"),
        ({"frame_indices": [0] * 65}, "the number of frame_indices is 65"),
        ({"frame_indices": [10]}, "frame index 10 is not a frame number; they go from 0 to 9"),
        ({"frame_indices": [-1]}, "frame index -1"),
        ({"frame_indices": [1.5]}, "frame index 1.5"),
    ],
)
def test_options_out_of_range(tmp_path, options, match):
    refused(write_clip(tmp_path / "a.mp4", 10, fps=1), match, **options)


# ---- permissions ----


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 3)
    path.chmod(0)
    refused(path, "Permission denied")
    tmp_path.chmod(0)
    try:
        with pytest.raises(VideoError, match="Permission denied"):
            list_media(tmp_path)
    finally:
        tmp_path.chmod(0o700)
