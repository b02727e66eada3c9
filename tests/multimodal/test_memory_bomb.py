"""A small file of huge frames is refused before a frame is decoded: within an address space too small for one frame."""

import io
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

from atb_pllava.multimodal.media import read_media
from tests.support import ROOT

SIDE = 8128
PROGRAM = """
import resource, sys
from pathlib import Path
from atb_pllava.errors import VideoError
from atb_pllava.multimodal.media import read_media
read_media(sys.argv[1], 2)  # loads the decoders
size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
most = int(size.split()[1]) * 1024 + 90 * 2**20  # one frame takes 95 MiB as yuv420p, 189 MiB as RGB
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    bytearray(94 * 2**20)
except MemoryError:
    print("no room for a frame")
try:
    read_media(sys.argv[2], 2)
except VideoError as error:
    print(error.kind, error)
"""


def write_black(path: Path, side: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = side
        stream.height = side
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame(side, side, "yuv420p")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["bomb.mp4", "bomb.png"])
def test_huge_frames_are_not_decoded(tmp_path: Path, name: str) -> None:
    small = tmp_path / f"small{name[4:]}"
    bomb = tmp_path / name
    if name.endswith("png"):
        Image.new("RGB", (32, 32)).save(small)
        Image.new("1", (SIDE, SIDE)).save(bomb)
    else:
        write_black(small, 64)
        write_black(bomb, SIDE)
    assert bomb.stat().st_size < 2**20
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, small, bomb], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == "" and done.stdout.startswith("no room for a frame\ntoo_large ")
    assert f"{SIDE}x{SIDE} pixels = {SIDE**2}, the limit is 36000000" in done.stdout


def test_one_pixel_is_an_image_of_three_channels() -> None:
    content = io.BytesIO()
    Image.new("RGB", (1, 1), (10, 20, 30)).save(content, "PNG")
    assert read_media(content.getvalue(), 2).frames.tolist() == [[[[10, 20, 30]]]] * 2
