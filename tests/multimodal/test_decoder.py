"""Frames read by seeking equal those of decoding the whole file, whatever the codec, frame sampler and threads.

The oracle decodes every frame with one thread of FFmpeg and never seeks. Errors of decoder threads reach the caller.
"""

import io
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from atb_pllava.errors import VideoError
from atb_pllava.multimodal import parallel_decoder, video
from atb_pllava.multimodal.decoder import ClockError
from atb_pllava.multimodal.file_view import view_of
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media import read_media
from atb_pllava.multimodal.video import read_video
from tests.multimodal.numbered_clips import OPEN_GOP, X264_LONG, X264_SHORT, numbers, write_clip
from tests.multimodal.test_video import KINDS
from tests.support import EXAMPLES, SHARED_DATA, TEST_DATA

COUNT = 90
X265 = "keyint=20:log-level=none:pools=none"
MORE_KINDS = {
    "mp4-b-pyramid": dict(name="a.mp4", options={"g": "40", "bf": "8", "preset": "medium", "refs": "4"}),
    "mp4-no-pyramid": dict(name="a.mp4", options={**X264_SHORT, "x264-params": "b-pyramid=none"}),
    "mp4-web": dict(name="a.mp4", options={"g": "30"}, container_options={"movflags": "+faststart"}),
    "mp4-hevc-open-gop": dict(name="a.mp4", codec="libx265", options={"x265-params": X265 + ":open-gop=1"}),
    "mp4-hevc-layers": dict(name="a.mp4", codec="libx265", options={"x265-params": X265 + ":temporal-layers=3"}),
    "mp4-av1": dict(name="a.mp4", codec="libsvtav1", options={"preset": "12"}, gop=30, size=(192, 64)),
    "webm-av1": dict(name="a.webm", codec="libsvtav1", options={"preset": "12"}, gop=30, size=(192, 64)),
    "mkv-mpeg2": dict(name="a.mkv", codec="mpeg2video", options={"bf": "2"}, gop=12),
    "mkv-mpeg4-b-frames": dict(name="a.mp4", codec="mpeg4", options={"bf": "3"}, gop=15),
}
FILES = sorted(
    path
    for folder in (SHARED_DATA / "public_cases", TEST_DATA, EXAMPLES / "videos")
    if folder.is_dir()
    for path in folder.iterdir()
    if path.suffix in {".mp4", ".mkv", ".ts", ".ogv"}
)


def decode_all(source) -> np.ndarray:
    """Every frame of a video without a seek, uint8 [total, H, W, 3]."""
    with av.open(source) as container:
        stream = container.streams.video[-1]  # still_first.* have a still before the film
        stream.codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def check_against_full_decode(path: Path, threads: int) -> None:
    every = decode_all(str(path))
    total = len(every)
    random = np.random.default_rng(total).integers(0, total, (3, 12)).tolist()
    choices = [{"frame_sampler": sampler} for sampler in ("demo", "eval", "npu")]
    choices += [{"frame_indices": indices} for indices in [*random, [total - 1], [0], [total // 2, total // 2 + 1]]]
    for choice in choices:
        clip = read_video(path, 16, threads=threads, **choice)
        assert clip.total_frames == total
        np.testing.assert_array_equal(clip.frames, every[clip.frame_indices])


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_every_kind_equals_full_decode(tmp_path, kind):
    settings = dict((KINDS | MORE_KINDS)[kind])
    path = tmp_path / settings.pop("name")
    try:
        write_clip(path, COUNT, **settings)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        pytest.skip(f"this FFmpeg cannot write it: {error}")
    for threads in (1, 3):
        check_against_full_decode(path, threads)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_public_files_equal_full_decode(path):
    check_against_full_decode(path, 2)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "libvpx-vp9"])
@pytest.mark.parametrize("threads", [1, 2])
def test_sound_files_are_not_decoded_whole(tmp_path, codec, threads, monkeypatch):
    monkeypatch.setattr(video, "whole_range", None)
    path = tmp_path / "a.mkv"
    options = {"libx265": {"x265-params": X265}, "libsvtav1": {"preset": "12"}}.get(codec, {})
    try:
        write_clip(path, COUNT, codec, options=options, gop=30, size=(192, 64))
    except (av.error.FFmpegError, ValueError, OSError) as error:
        pytest.skip(f"this FFmpeg cannot write it: {error}")
    every = decode_all(str(path))
    clip = read_video(path, frame_indices=list(range(1, COUNT, 2)), threads=threads)
    np.testing.assert_array_equal(clip.frames, every[1::2])


# ---- threads ----


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_threads_end_and_change_nothing(tmp_path, threads, as_bytes):
    path = write_clip(tmp_path / "a.mp4", COUNT, options=X264_SHORT)
    before = threading.active_count()
    clip = read_media(path.read_bytes() if as_bytes else path, 16, threads=threads)
    assert threading.active_count() == before
    assert numbers(clip) == clip.frame_indices


@pytest.mark.parametrize("threads", [0, -1, 65, 1.0, True, "2"])
def test_threads_out_of_range(tmp_path, threads):
    with pytest.raises(VideoError, match=r"threads is .*; it must be a whole number from 1 to 64"):
        read_video(write_clip(tmp_path / "a.mp4", 3), 2, threads=threads)


@pytest.mark.parametrize("error", [VideoError("too late", "timeout"), ClockError(), MemoryError()], ids=repr)
def test_error_of_a_decoder_thread_reaches_the_caller(tmp_path, monkeypatch, error):
    """A ClockError makes the caller count frames. Other errors are raised."""
    path = write_clip(tmp_path / "a.mp4", COUNT, options=X264_SHORT)
    decode_range = parallel_decoder.decode_range

    def fail_late(stream, seek, packet_range):
        yield from decode_range(stream, seek, packet_range)
        if packet_range.last > COUNT // 2:
            raise error

    monkeypatch.setattr(parallel_decoder, "decode_range", fail_late)
    before = threading.active_count()
    indices = [1, 20, 30, 44, 57, 70, 80, 89]
    if isinstance(error, ClockError):
        assert numbers(read_video(path, frame_indices=indices, threads=2)) == indices
    else:
        with pytest.raises(type(error)):
            read_video(path, frame_indices=indices, threads=2)
    assert threading.active_count() == before


def test_deadline_in_a_decoder_thread(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", COUNT, options=X264_SHORT)
    index_packets = video.index_packets

    def index_until_the_deadline(file):
        index = index_packets(file)
        object.__setattr__(file, "deadline", 0.0)
        return index

    monkeypatch.setattr(video, "index_packets", index_until_the_deadline)
    before = threading.active_count()
    with pytest.raises(VideoError, match="not read within 120 seconds"):
        read_video(path, 16, threads=2)
    assert threading.active_count() == before


def test_frames_larger_than_a_decoders_share_are_read(tmp_path):
    small = write_clip(tmp_path / "s.ts", 40, options=OPEN_GOP)
    large = write_clip(tmp_path / "l.ts", 40, options=OPEN_GOP, size=(192, 64))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    indices = [0, 14, 26, 39, 41, 53, 66, 79]
    roomy = read_video(joined, frame_indices=indices, threads=1)
    tight = read_video(joined, frame_indices=indices, threads=4, limits=MediaLimits(max_pixels=3 * 128 * 128 + 1))
    np.testing.assert_array_equal(tight.frames, roomy.frames)


def test_first_frame_sets_the_size_whatever_the_threads(tmp_path):
    large = write_clip(tmp_path / "l.ts", 40, options=X264_LONG, size=(192, 64))
    small = write_clip(tmp_path / "s.ts", 40, options=X264_SHORT)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(large.read_bytes() + small.read_bytes())
    for threads in (1, 2, 4):
        clip = read_video(joined, frame_indices=[79, 66, 53, 39], threads=threads)
        assert clip.frames.shape == (4, 64, 192, 3)


def test_views_of_a_file_have_positions_of_their_own(tmp_path):
    content = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "file").write_bytes(content)
    with open(tmp_path / "file", "rb") as file, view_of(file) as one, view_of(file) as other:
        assert one.read(60_000) == content[:60_000]
        assert other.read(5) == content[:5] and file.tell() == 0
        assert one.read() == content[60_000:] and one.read(1) == b""
        other.seek(-3, io.SEEK_END)
        assert other.tell() == len(content) - 3 and other.read(9) == content[-3:]
        with pytest.raises(OSError, match="cannot seek to position -1"):
            other.seek(-1)
        other.close()
        assert file.read() == content
