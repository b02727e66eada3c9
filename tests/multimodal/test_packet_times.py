"""Frames come in the decoder's order whatever the packet times are, and leaps of the clock do not count as time.

The oracles are clips whose frames show their number: other packet times do not change the pictures or their order.
The expected values for files in tests/data come from the ffmpeg command. The tiny model's answers show the order, too.
"""

import shutil
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from atb_pllava import LLM, SamplingParams
from atb_pllava.errors import VideoError
from atb_pllava.multimodal.frame_sampling import sample_frame_indices
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.packet_times import Packet, measure_length
from atb_pllava.multimodal.video import read_video
from atb_pllava.multimodal.video_stream import VideoStream
from tests.multimodal.numbered_clips import OPEN_GOP, X264_LONG, X264_SHORT, number_of, numbers, write_clip
from tests.support import TEST_DATA, TINY, load_llm

NO_B_FRAMES = {"g": "12", "bf": "0", "preset": "veryfast"}
Change = Callable[[int, float, float], tuple[float, float] | None]  # packet number, pts, dts in seconds


# ---- clocks rewritten in the bytes of a file ----


def rewrite_pes(content: bytes, change: Change) -> bytes:
    """MPEG-TS or MPEG-PS with other times in its video PES headers (ISO 13818-1, 2.4.3.6). None removes the times."""
    out = bytearray(content)
    at = 0
    number = 0
    while (at := out.find(b"\0\0\1\xe0", at)) >= 0:
        flags = out[at + 7] >> 6
        first = at + 9
        if flags:
            length = 5 if flags == 2 else 10
            pts = read_pes_time(out[first : first + 5])
            dts = pts if flags == 2 else read_pes_time(out[first + 5 : first + 10])
            times = change(number, pts / 90000, dts / 90000)
            if times is None:
                out[at + 7] &= 0x3F
                out[first : first + length] = b"\xff" * length
            else:
                out[first : first + 5] = pes_time(out[first] >> 4, times[0])
                if flags == 3:
                    out[first + 5 : first + 10] = pes_time(out[first + 5] >> 4, times[1])
            number += 1
        at += 4
    assert number > 20
    return bytes(out)


def read_pes_time(five: bytes) -> int:
    return (five[0] >> 1 & 7) << 30 | five[1] << 22 | five[2] >> 1 << 15 | five[3] << 7 | five[4] >> 1


def pes_time(mark: int, seconds: float) -> bytes:
    ticks = round(seconds * 90000) % (1 << 33)
    high = ticks >> 30
    middle = ticks >> 15 & 0x7FFF
    low = ticks & 0x7FFF
    return bytes([mark << 4 | high << 1 | 1, middle >> 7, middle << 1 & 0xFE | 1, low >> 7, low << 1 & 0xFE | 1])


def rewrite_flv(content: bytes, change: Change) -> bytes:
    """FLV with other times in the tags that hold H.264 pictures."""
    out = bytearray(content)
    at = 13
    number = 0
    while at < len(out):
        size = int.from_bytes(out[at + 1 : at + 4], "big")
        if out[at] == 9 and out[at + 12] == 1:  # a video tag that is a picture, not the decoder's settings
            dts = int.from_bytes(out[at + 4 : at + 7], "big") | out[at + 7] << 24
            pts = dts + int.from_bytes(out[at + 13 : at + 16], "big", signed=True)
            changed_pts, changed_dts = change(number, pts / 1000, dts / 1000)
            new_pts = round(changed_pts * 1000)
            new_dts = round(changed_dts * 1000)
            out[at + 4 : at + 8] = (new_dts & 0xFFFFFF).to_bytes(3, "big") + bytes([new_dts >> 24 & 0xFF])
            out[at + 13 : at + 16] = (new_pts - new_dts).to_bytes(3, "big", signed=True)
            number += 1
        at += 11 + size + 4
    assert number > 20
    return bytes(out)


def outliers(shifts: dict[int, float], also_dts: bool = True) -> Change:
    """Shifts the times of single packets, given by number, by so many seconds."""
    return lambda n, pts, dts: (pts + shifts.get(n, 0), dts + shifts.get(n, 0) * also_dts)


def steps(*shifts: tuple[int, float]) -> Change:
    """Shifts the times of all packets from a packet number on by so many seconds. The shifts add up."""

    def change(n: int, pts: float, dts: float) -> tuple[float, float]:
        shift = sum(seconds for first, seconds in shifts if n >= first)
        return pts + shift, dts + shift

    return change


KINDS = {
    "ts": dict(name="a.ts", options=NO_B_FRAMES),
    "ts-b-frames": dict(name="a.ts", options=X264_SHORT),
    "ts-one-group": dict(name="a.ts", options=X264_LONG),
    "ts-open-gop": dict(name="a.ts", options=OPEN_GOP),
    "ts-mpeg2": dict(name="a.ts", codec="mpeg2video", options={"bf": "2"}, gop=12),
    # small PES packets, so that few frames share one packet and its times
    "vob": dict(name="a.vob", codec="mpeg2video", options={"bf": "2"}, gop=12, container_options={"packetsize": "100"}),
    "flv": dict(name="a.flv", options=NO_B_FRAMES),
    "flv-b-frames": dict(name="a.flv", options=X264_SHORT),
}
CLOCKS: dict[str, Change] = {
    "outlier-ahead": outliers({30: 33.3}),
    "outlier-back": outliers({30: -33.3}),
    "outlier-first": outliers({0: 33.3}),
    "outlier-second": outliers({1: 33.3}),
    "outlier-last": outliers({59: 1000}),
    "outlier-small": outliers({31: 0.5}),
    "outlier-in-pts": outliers({30: 33.3}, also_dts=False),
    "outlier-in-early-pts": outliers({3: 33.3}, also_dts=False),
    "outlier-in-first-pts": outliers({0: 0.5}, also_dts=False),
    "outlier-in-pts-back": outliers({31: -0.3}, also_dts=False),
    "outlier-in-second-pts-back": outliers({1: -0.5}, also_dts=False),
    "two-outliers": outliers({10: 33, 40: -33}),
    "many-outliers": outliers({5: 3, 9: -2, 22: 7, 33: 100, 47: 1}),
    "step-back": steps((25, -0.7)),
    "step-far-back": steps((26, -40)),
    "back-twice": steps((20, -1), (40, -1)),
    "leap": steps((27, 4000)),
    "leap-inside-b-frames": steps((26, 0.7)),
    "leap-and-back": steps((15, 4000), (44, -4000)),
    "equal-times": lambda n, pts, dts: (5, 5),
    "zero-dts": lambda n, pts, dts: (pts, 0),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("clips")
    contents = {}
    for kind, settings in KINDS.items():
        options = dict(settings)
        contents[kind] = write_clip(folder / f"{kind}-{options.pop('name')}", 60, **options).read_bytes()
    return contents


def with_clock(content: bytes, kind: str, change: Change) -> bytes:
    return (rewrite_flv if kind.startswith("flv") else rewrite_pes)(content, change)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_order_does_not_depend_on_the_clock(clips, kind, clock):
    content = with_clock(clips[kind], kind, CLOCKS[clock])
    clip = read_video(content, 16)
    assert clip.total_frames == 60 and clip.fps == pytest.approx(25, rel=0.01)
    assert numbers(clip) == clip.frame_indices == sample_frame_indices(60, 16)
    every = read_video(content, frame_indices=list(range(60)))
    assert numbers(every) == list(range(60))
    for indices in ([26, 25, 27, 24], [29], [30, 31], [59, 0, 3]):
        assert numbers(read_video(content, frame_indices=indices)) == indices


@pytest.mark.parametrize("kind", ["ts", "ts-b-frames", "vob"])
@pytest.mark.parametrize("missing", [{30}, set(range(1, 60, 2)), set(range(60)) - {0, 12, 24, 36, 48}, set(range(60))])
def test_missing_times(clips, kind, missing):
    content = rewrite_pes(clips[kind], lambda n, pts, dts: None if n in missing else (pts, dts))
    clip = read_video(content, frame_indices=list(range(60)))
    assert clip.total_frames == 60 and numbers(clip) == list(range(60))


@pytest.mark.parametrize("kind", ["ts", "ts-b-frames", "vob"])
def test_wrap_of_the_33_bit_clock(clips, kind):
    content = rewrite_pes(clips[kind], lambda n, pts, dts: (pts + 2**33 / 90000 - 1.2, dts + 2**33 / 90000 - 1.2))
    clip = read_video(content, frame_indices=list(range(60)))
    assert clip.total_frames == 60 and clip.fps == 25 and numbers(clip) == list(range(60))


LEAP_AT_A_KEY = steps((24, 4000))


@pytest.mark.parametrize(
    "kind, clock",
    [
        *((kind, steps((0, start))) for kind in KINDS for start in (0, 70_000)),
        *((kind, LEAP_AT_A_KEY) for kind in ("ts", "ts-b-frames", "flv", "flv-b-frames")),
    ],
)
def test_files_with_a_sound_clock_are_not_decoded_whole(clips, kind, clock, monkeypatch):
    monkeypatch.setattr(VideoStream, "decode_all", None)
    content = with_clock(clips[kind], kind, clock)
    assert numbers(read_video(content, frame_indices=[50, 3, 26])) == [50, 3, 26]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_uneven_frames_are_not_decoded_whole(tmp_path, name, monkeypatch):
    monkeypatch.setattr(VideoStream, "decode_all", None)
    pauses = np.random.default_rng(1).choice([20, 40, 100, 400, 30000], 80, p=[0.3, 0.3, 0.2, 0.15, 0.05])
    path = write_clip(tmp_path / name, 80, pts=np.cumsum(pauses).tolist(), options=X264_SHORT)
    indices = [79, 3, 40, 41, 12, 0, 78]
    clip = read_video(path, frame_indices=indices)
    assert clip.total_frames == 80 and numbers(clip) == indices


# ---- joined files ----


def cut(path: Path, first: int, last: int, offset: float, target: Path) -> bytes:
    """Copies packets first to last - 1 of a clip without recoding and moves their times by `offset` seconds."""
    with av.open(str(path)) as source, av.open(str(target), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream(stream.codec_context.name, rate=25)
        copy.width = 96
        copy.height = 32
        copy.pix_fmt = "yuv420p"
        copy.codec_context.extradata = stream.codec_context.extradata
        for number, packet in enumerate(p for p in source.demux(stream) if p.size):
            if first <= number < last:
                packet.pts += int(offset / packet.time_base)
                packet.dts += int(offset / packet.time_base)
                packet.stream = copy
                out.mux(packet)
    return target.read_bytes()


PARTS = {"first": (0, 24), "second": (24, 48), "third": (48, 60)}
JOINS = {
    "back": [("first", 10), ("second", 0)],
    "restart": [("first", 0), ("second", -0.96)],
    "ahead": [("first", 0), ("second", 40000)],
    "three": [("first", 10), ("second", 3), ("third", -0.5)],
    "ahead-and-back": [("first", 2), ("second", 30), ("third", 0)],
    "other-order": [("third", 0), ("first", 0), ("second", 0)],
    "twice-the-same": [("second", 0), ("second", 0)],
}


@pytest.mark.parametrize("pauses", ["even", "uneven"])
@pytest.mark.parametrize("b_frames", ["0", "2"])
@pytest.mark.parametrize("join", JOINS)
def test_joined_ts_is_its_parts_in_file_order(tmp_path, join, b_frames, pauses):
    times = np.cumsum(np.random.default_rng(3).choice([20, 40, 100, 400], 60)).tolist() if pauses == "uneven" else None
    options = {"g": "12", "bf": b_frames, "preset": "veryfast", "x264-params": "scenecut=0:open-gop=0"}
    whole = write_clip(tmp_path / "whole.ts", 60, options=options, pts=times)
    content = b""
    expected = []
    for number, (part, offset) in enumerate(JOINS[join]):
        content += cut(whole, *PARTS[part], offset + 2, tmp_path / f"{number}.ts")
        expected += range(*PARTS[part])
    clip = read_video(content, frame_indices=list(range(len(expected))))
    assert clip.total_frames == len(expected) and numbers(clip) == expected
    assert clip.frame_indices == list(range(len(expected)))
    sampled = read_video(content, 16)
    assert numbers(sampled) == [expected[k] for k in sampled.frame_indices]
    assert sampled.frame_indices == sample_frame_indices(len(expected), 16)


def test_joined_program_stream(tmp_path):
    content = write_clip(tmp_path / "a.mpg", 30, "mpeg2video", gop=6).read_bytes()
    clip = read_video(content + content, frame_indices=list(range(60)))
    assert clip.total_frames == 60 and numbers(clip) == [*range(30), *range(30)]


def test_joined_flv(tmp_path):
    content = write_clip(tmp_path / "a.flv", 30, options=X264_SHORT).read_bytes()
    clip = read_video(content + content[13:], frame_indices=list(range(60)))  # FFmpeg ends at a second file header
    assert clip.total_frames == 60 and numbers(clip) == [*range(30), *range(30)]


def test_joined_ogg(caplog):
    content = (TEST_DATA / "no_rate.ogv").read_bytes()
    clip = read_video(content + content, 60)
    assert clip.total_frames == 120 and numbers(clip) == [k % 60 for k in clip.frame_indices]
    assert not caplog.text


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg command is not here")
@pytest.mark.parametrize("name", ["numbered_back.ts", "numbered_restarts.ts", "one_outlier.ts", "no_rate.ogv"])
def test_frames_equal_those_of_the_ffmpeg_command(name):
    command = ["ffmpeg", "-v", "quiet", "-i", str(TEST_DATA / name), "-map", "0:v", "-vsync", "passthrough"]
    done = subprocess.run([*command, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"], capture_output=True, check=True)
    expected = np.frombuffer(done.stdout, np.uint8).reshape(-1, 32, 96, 3)
    clip = read_video(TEST_DATA / name, frame_indices=list(range(len(expected))))
    assert clip.total_frames == len(expected) and numbers(clip) == [number_of(frame) for frame in expected]


AFTER_A_JOIN = [1, 5, 9, 12, 16, 20, 24, 26, 29, 33, 37, 41, 45, 49, 52, 56]


@pytest.mark.parametrize(
    "name, total, sixteen",
    [
        ("numbered_back.ts", 62, AFTER_A_JOIN),
        ("numbered_restarts.ts", 62, AFTER_A_JOIN),
        ("one_outlier.ts", 60, [1, 5, 8, 12, 16, 19, 23, 27, 31, 34, 38, 42, 45, 49, 53, 56]),
    ],
)
def test_files_of_public_reports(name, total, sixteen):
    clip = read_video(TEST_DATA / name, 16)
    assert clip.total_frames == total and clip.fps == 25 and numbers(clip) == sixteen


@pytest.mark.parametrize("name", ["clock_goes_back.ts", "clock_restarts.ts", "clock_jumps_ahead.ts"])
def test_length_does_not_count_leaps(name):
    assert read_video(TEST_DATA / name, 16, limits=MediaLimits(max_seconds=3)).total_frames == 71
    with pytest.raises(VideoError, match=r"3 seconds, the limit is 2.9 \(MediaLimits.max_seconds\)"):
        read_video(TEST_DATA / name, 16, limits=MediaLimits(max_seconds=2.9))


@pytest.mark.parametrize("name", ["clock_goes_back.ts", "clock_restarts.ts", "clock_jumps_ahead.ts"])
def test_time_bounds_do_not_count_leaps(name):
    clip = read_video(TEST_DATA / name, 4, frame_sampler="eval", start_seconds=1.0, end_seconds=2.0)
    expected = sample_frame_indices(71, 4, "eval", fps=24, start_seconds=1.0, end_seconds=2.0)
    assert clip.fps == 24 and clip.frame_indices == expected
    with pytest.raises(VideoError, match="2.96 seconds long"):
        read_video(TEST_DATA / name, 4, frame_sampler="eval", start_seconds=100)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load_llm(TINY)


@pytest.mark.parametrize(
    "name, answer",
    [
        ("clock_goes_back.ts", "First a green circle moves down, then a yellow square appears."),
        ("clock_restarts.ts", "First a green circle moves down, then a yellow square appears."),
        ("clock_jumps_ahead.ts", "First a green circle moves down, then a yellow square appears."),
        ("still_first.mp4", "A red circle moves to the left."),
        ("still_first.mkv", "A red circle moves to the left."),
    ],
)
def test_the_model_sees_the_film(llm, name, answer):
    assert llm.chat(TEST_DATA / name, "Describe the video.", SamplingParams(max_tokens=32)).text == answer


# ---- rates and lengths ----


def test_time_bounds_without_an_average_rate():
    clip = read_video(TEST_DATA / "no_rate.ogv", 4, frame_sampler="eval", start_seconds=0.5, end_seconds=1.5)
    assert clip.fps == 25.0
    assert numbers(clip) == clip.frame_indices == [15, 21, 28, 35]


def test_rate_of_a_container_that_states_none(tmp_path):
    fast = write_clip(tmp_path / "a.mp4", 60, fps=2000, options=NO_B_FRAMES)
    with av.open(str(fast)) as source, av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                out.mux(packet)
    clip = read_video(tmp_path / "a.mkv", 4, frame_sampler="eval", start_seconds=0.01, end_seconds=0.02)
    assert clip.fps == pytest.approx(2000, rel=0.05) and numbers(clip) == clip.frame_indices
    assert 19 <= clip.frame_indices[0] < clip.frame_indices[-1] <= 41


def packets(*times: int, duration: int = 40) -> list[Packet]:
    return [Packet(number, time, time, duration, number == 0) for number, time in enumerate(times)]


@pytest.mark.parametrize(
    "times, seconds, rate",
    [
        ((0, 40, 80, 120), 0.16, 25),
        ((0, 40, 500, 540), 0.58, 3000 / 540),  # a pause is part of the film
        ((0, 40, 4_000_000, 4_000_040), 0.16, 25),
        ((4_000_000, 4_000_040, 0, 40), 0.16, 25),
        ((0, 40, 4_000_000, 120, 160), 0.2, 25),
        ((7,), 0.04, 0),
        ((), 0, 0),
    ],
)
def test_length_and_rate_of_packets(times, seconds, rate):
    length = measure_length(packets(*times), Fraction(1, 1000))
    assert length.seconds == pytest.approx(seconds) and length.rate == pytest.approx(rate)


def test_declared_durations_count_however_long(tmp_path):
    day = write_clip(tmp_path / "a.mp4", 25, pts=[k * 3_600_000 for k in range(25)])
    with pytest.raises(VideoError, match=r"8\d{4} seconds, the limit is 14400"):
        read_video(day)
    assert measure_length(packets(0, 20_000, duration=20_000), Fraction(1, 1000)).seconds == 40
