"""`inspect`: facts as ffprobe and PyAV state them, and contact sheets whose pixels are the processor's."""

import json
import shutil
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from atb_pllava.cli.verbs import main
from atb_pllava.config import PreprocessorConfig
from atb_pllava.multimodal.contact_sheet import SheetLayout
from atb_pllava.multimodal.frame_sampling import sample_frame_indices
from atb_pllava.multimodal.processor import VideoProcessor
from tests.multimodal.numbered_clips import animation, write_clip
from tests.support import EXAMPLES, ROOT, TEST_DATA, run_main

CLIP = EXAMPLES / "videos" / "red_circle_moves_left.mp4"
CLIPS = sorted((EXAMPLES / "videos").glob("*.mp4"))


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, the objects of --json, and stderr."""
    status, out, err = run_main(capsys, main, "inspect", "--json", *arguments)
    return status, [json.loads(line) for line in out.splitlines()], err


def probed(path: Path) -> dict[str, Any]:
    """Container, codec, size, rate, length and rotation, as ffprobe states them. PyAV's own fields without ffprobe."""
    if shutil.which("ffprobe") is None:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(stream))
            assert stream.average_rate is not None
            return {
                "container": container.format.name,
                "codec": stream.codec_context.codec.canonical_name,
                "fps": float(stream.average_rate),
                "width": stream.width,
                "height": stream.height,
                "frames": frames,
            }
    command = ["ffprobe", "-v", "error", "-of", "json", "-select_streams", "v:0", "-count_frames"]
    found = json.loads(subprocess.check_output([*command, "-show_format", "-show_streams", str(path)]))
    (stream,) = found["streams"]
    return {
        "container": found["format"]["format_name"],
        "codec": stream["codec_name"],
        "fps": float(Fraction(stream["avg_frame_rate"])),
        "width": stream["width"],
        "height": stream["height"],
        "frames": int(stream["nb_read_frames"]),
    }


def processed(
    path: Path, num_frames: int = 16, times: tuple[float | None, float | None] = (None, None), **options: Any
):
    processor = VideoProcessor(num_frames, PreprocessorConfig(), **options)
    (video,) = processor.prepare([path], None, [times])
    return video


def sheet_frames(path: Path, count: int, side: int = 336) -> np.ndarray:
    """The frames on a contact sheet, uint8 [count, side, side, 3]."""
    sheet = np.asarray(Image.open(path))
    corners = [SheetLayout(count, side).corner(number) for number in range(count)]
    return np.stack([sheet[top : top + side, left : left + side] for left, top in corners])


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.name)
def test_the_facts_are_those_of_ffprobe(capsys, path: Path) -> None:
    status, (row,), err = inspect(capsys, path)
    expected = probed(path)
    assert (status, err) == (0, "")
    assert {name: row[name] for name in expected} == expected
    assert row["seconds"] == pytest.approx(expected["frames"] / expected["fps"])
    assert row["frame_indices"] == sample_frame_indices(expected["frames"], 16)
    assert row["frame_seconds"] == pytest.approx([index / expected["fps"] for index in row["frame_indices"]])
    assert row["warnings"] == [] and (row["rotation"], row["mirrored"]) == (0, False)


@pytest.mark.parametrize("codec, name", [("libvpx-vp9", "a.webm"), ("mpeg4", "a.avi")])
def test_codecs_have_their_own_names(capsys, tmp_path: Path, codec: str, name: str) -> None:
    path = write_clip(tmp_path / name, 12, codec)
    _, (row,), _ = inspect(capsys, path)
    assert {key: row[key] for key in ("container", "codec")} == {
        key: probed(path)[key] for key in ("container", "codec")
    }


ONE = 1 << 16
TURNS = {  # a, b, c, d of the display matrix
    (90, False): (0, ONE, -ONE, 0),
    (180, False): (-ONE, 0, 0, -ONE),
    (270, False): (0, -ONE, ONE, 0),
    (0, True): (-ONE, 0, 0, ONE),
    (180, True): (ONE, 0, 0, -ONE),
    (90, True): (0, -ONE, -ONE, 0),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_turned_video(capsys, tmp_path: Path, turn: tuple[int, bool]) -> None:
    """The stated turn, done with numpy to the stored frames, gives the frames that the processor reads."""
    degrees, is_mirrored = turn
    path = write_clip(tmp_path / "a.mp4", 10)
    stored = processed(path, 4, resize="squash").frames
    a, b, c, d = TURNS[turn]
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    _, (row,), _ = inspect(capsys, path)
    assert (row["rotation"], row["mirrored"]) == turn
    assert (row["width"], row["height"]) == ((32, 96) if degrees % 180 else (96, 32))
    flipped = stored[:, :, ::-1] if is_mirrored else stored
    shown = np.rot90(flipped, -degrees // 90, axes=(1, 2))
    difference = np.abs(processed(path, 4, resize="squash").frames.astype(int) - shown)
    assert difference.max() <= 1  # the two directions of the resize round on their own


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo(capsys, tmp_path: Path, orientation: int) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path, exif=exif)
    _, (row,), _ = inspect(capsys, path)
    flipped = picture[:, ::-1] if row["mirrored"] else picture
    shown = np.rot90(flipped, -row["rotation"] // 90)
    resized = Image.fromarray(shown).resize((336, 336), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(processed(path, 1, resize="squash").frames[0], np.asarray(resized))
    assert (row["kind"], row["container"], row["codec"], row["fps"]) == ("image", "PNG", None, None)
    assert row["warnings"] == []  # an image repeats always


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], {}),
        (["--num_frames", 5, "--resize", "squash"], {"num_frames": 5, "resize": "squash"}),
        (["--start_seconds", 1, "--end_seconds", 1.5], {"times": (1.0, 1.5)}),
        (["--frame_sampler", "npu", "--num_frames", 30], {"num_frames": 30, "frame_sampler": "npu"}),
    ],
)
def test_the_sheet_has_the_pixels_of_the_processor(capsys, tmp_path: Path, options: list[Any], expected: Any) -> None:
    target = tmp_path / "sheet.png"
    _, (row,), _ = inspect(capsys, CLIP, *options, "--contact_sheet", target)
    video = processed(CLIP, **expected)
    frames = video.frames[list(video.inverse_indices)]
    np.testing.assert_array_equal(sheet_frames(target, len(frames)), frames)
    assert row["contact_sheet"] == str(target) and row["frame_indices"] == list(video.frame_indices)
    before = target.read_bytes()
    assert inspect(capsys, CLIP, *options, "--contact_sheet", target)[0] == 0  # it replaces its own sheet
    assert target.read_bytes() == before


@pytest.mark.parametrize("count, columns", [(1, 1), (3, 3), (4, 4), (16, 4), (17, 5), (64, 8)])
def test_no_two_frames_of_a_sheet_overlap(count: int, columns: int) -> None:
    layout = SheetLayout(count, 336)
    taken = np.zeros(layout.size[::-1], int)
    for left, top in map(layout.corner, range(count)):
        assert left + 336 <= layout.size[0] and top + 336 <= layout.size[1]
        taken[top : top + 336, left : left + 336] += 1
    assert layout.columns == columns and taken.max() == 1 and taken.sum() == count * 336 * 336


def test_every_frame_has_a_label(tmp_path: Path, capsys) -> None:
    """Below each frame there is ink. Repeats have more of it, as they say so."""
    target = tmp_path / "sheet.png"
    inspect(capsys, CLIP, "--num_frames", 4, "--end_seconds", 0.1, "--contact_sheet", target)
    sheet = np.asarray(Image.open(target)).astype(int)
    layout = SheetLayout(4, 336)
    labels = [sheet[top + 336 : top + 364, left : left + 336] for left, top in map(layout.corner, range(4))]
    ink = [int((label.min(axis=2) < 128).sum()) for label in labels]
    assert ink[0] > 100 and ink[1] > 1.3 * ink[0]


def test_several_sheets_are_numbered(capsys, tmp_path: Path) -> None:
    status, rows, _ = inspect(capsys, EXAMPLES / "videos", "--num_frames", 2, "--contact_sheet", tmp_path / "s.png")
    assert status == 0 and [row["contact_sheet"] for row in rows] == [str(tmp_path / f"s_{n}.png") for n in range(1, 5)]
    for row in rows:
        video = processed(Path(row["path"]), 2)
        np.testing.assert_array_equal(sheet_frames(Path(row["contact_sheet"]), 2), video.frames)


def test_a_broken_medium_is_one_line_and_the_others_go_on(capsys, tmp_path: Path) -> None:
    broken = tmp_path / "notes.mp4"
    broken.write_text("no video at all")
    missing = tmp_path / "missing.mp4"
    status, rows, err = inspect(capsys, missing, broken, CLIP, broken)
    assert status == 2 and len(err.splitlines()) == 2 and all(line.startswith("error: ") for line in err.splitlines())
    assert [row["path"] for row in rows] == [str(missing), str(broken), str(CLIP)]
    assert [row.get("kind") for row in rows] == ["not_found", "not_a_medium", "video"]
    status, out, err = run_main(capsys, main, "inspect", missing, broken, CLIP)
    assert status == 2 and len(err.splitlines()) == 2
    assert out.startswith(
        f"[2/2] {CLIP}\n  video      mov,mp4,m4a,3gp,3g2,mj2, h264\n  length     2.50 s, 25 frames, 10 "
    )
    assert "  model sees the middle 75% of its width, as 336x336 pixels\n  sampled    0 (0.00 s), 2 (0.20 s), " in out


def test_a_truncated_video(capsys, tmp_path: Path) -> None:
    """Cut behind the sampled part, the frames are read and a warning says so. Cut before, it is an error."""
    whole = write_clip(tmp_path / "a.mp4", 60, container_options={"movflags": "faststart"}, gop=10)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.7)])
    status, (row,), _ = inspect(capsys, cut, "--end_seconds", 0.5, "--num_frames", 4)
    assert status == 0 and "truncated" in " ".join(row["warnings"])
    status, (row,), err = inspect(capsys, cut)
    assert status == 2 and row["kind"] == "truncated" and err == f"error: {row['error']}\n"


def test_a_short_video_repeats(capsys, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 12)
    _, (row,), _ = inspect(capsys, path)
    assert row["warnings"] == [
        f"frames repeat: the 16 sampled frames are {len(set(row['frame_indices']))} different frames, as the video or "
        "its part is short"
    ]
    assert row["frame_indices"] == sample_frame_indices(12, 16)


def test_the_picture_before_the_video_is_not_inspected(capsys) -> None:
    """A file whose first stream is one still picture: FFmpeg's best stream is the video behind it."""
    _, (row,), _ = inspect(capsys, TEST_DATA / "still_first.mkv")
    with av.open(str(TEST_DATA / "still_first.mkv")) as container:
        best = container.streams.best("video")
        assert best is not None
        assert (row["codec"], row["width"], row["height"]) == (best.codec_context.name, best.width, best.height)
    assert row["frames"] == 25


def test_pixels_that_are_no_squares(capsys, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    _, (row,), _ = inspect(capsys, path, "--num_frames", 2)
    assert row["warnings"] == ["its pixels are not square (4:3), and the model sees them as squares"]


def test_an_animation(capsys, tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(animation("webp"))
    _, (row,), _ = inspect(capsys, path, "--num_frames", 4)
    assert (row["kind"], row["container"], row["frames"], row["fps"]) == ("animation", "WEBP", 8, 10)


def test_a_limit_is_raised_by_its_option(capsys) -> None:
    status, (row,), _ = inspect(capsys, CLIP, "--media_limit", "max_side=100")
    assert status == 2 and row["kind"] == "too_large" and "the longest side allowed is 100" in row["error"]
    status, (row,), _ = inspect(capsys, CLIP, "--media_limit", "max_sampled_frames=70", "--num_frames", "70")
    assert status == 0 and len(row["frame_indices"]) == 70


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num_frames", "0"], "--num_frames is 0; it must be a whole number of at least 1"),
        (["--num_frames", "65"], "num_frames is 65, the limit is 64"),
        (["--contact_sheet", "sheet.jpg"], "--contact_sheet is 'sheet.jpg'; its name must end in .png"),
        (["--contact_sheet", "no/folder/sheet.png"], "cannot be written; name a file in an existing"),
        (["--start_seconds", "2", "--end_seconds", "1"], "the start must come first"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, options: list[str], message: str) -> None:
    status, out, err = run_main(capsys, main, "inspect", CLIP, *options)
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err


def test_a_photo_of_the_users_is_not_replaced(capsys, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    before = photo.read_bytes()
    status, _, err = run_main(capsys, main, "inspect", CLIP, "--contact_sheet", photo)
    assert status == 2 and "is a video or image" in err and photo.read_bytes() == before


def test_no_torch_is_imported() -> None:
    program = f"""
import sys
from atb_pllava.cli.verbs import main
status = main(["inspect", {str(CLIP)!r}])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
