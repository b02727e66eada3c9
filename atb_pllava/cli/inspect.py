"""`python -m atb_pllava inspect`: what a video is, and which frames of it a model sees. No model is loaded."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from atb_pllava.cli.help import HelpFormatter
from atb_pllava.cli.media_limit_option import add_media_limit, media_limits
from atb_pllava.cli.media_option import add_time_range, time_range
from atb_pllava.cli.sheet_files import SheetFiles
from atb_pllava.config import PreprocessorConfig
from atb_pllava.errors import VideoError, check_whole_number
from atb_pllava.multimodal.inspection import Inspection, inspect_medium
from atb_pllava.multimodal.media import list_media
from atb_pllava.multimodal.options import MultimodalOptions
from atb_pllava.multimodal.processor import VideoProcessor

EXAMPLES = """examples:
  python -m atb_pllava inspect examples/videos/red_circle_moves_left.mp4
  python -m atb_pllava inspect my_videos --contact_sheet sheet.png
  python -m atb_pllava inspect a.mp4 --num_frames 8 --start_seconds 2 --json"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inspect`."""
    parser.formatter_class = HelpFormatter
    parser.usage = "%(prog)s VIDEO... [OPTION ...]"
    parser.epilog = EXAMPLES
    parser.add_argument(
        "media",
        nargs="+",
        metavar="VIDEO",
        help="videos, images, and folders, which are entered with their subfolders",
    )
    group = parser.add_argument_group("frames")
    group.add_argument("--num_frames", type=int, default=16, metavar="N", help="sampled frames (default 16)")
    for name in ("frame_sampler", "resize"):
        field = MultimodalOptions.__dataclass_fields__[name]
        option = field.metadata["option"]
        group.add_argument(
            f"--{name}", default=field.default, choices=option.choices, metavar=option.metavar, help=option.help
        )
    add_time_range(group)
    add_media_limit(group)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--contact_sheet",
        metavar="FILE.png",
        help="draw the frames as the model sees them; of several videos, number 2 is in FILE_2.png",
    )
    group.add_argument("--json", action="store_true", help="one JSON object a line, for programs")


def inspect(arguments: argparse.Namespace) -> int:
    """Describe every medium on stdout. Returns 2 when a medium could not be read. The others are described."""
    times = time_range(arguments)
    bounds = (times.get("start_seconds"), times.get("end_seconds"))
    check_whole_number("--num_frames", arguments.num_frames, 1)
    limits = media_limits(arguments.media_limit)
    processor = VideoProcessor(
        arguments.num_frames, PreprocessorConfig(), arguments.frame_sampler, arguments.resize, limits
    )
    media, failed = _media(arguments.media, arguments.json)
    sheets = None if arguments.contact_sheet is None else SheetFiles(arguments.contact_sheet, media)
    for number, path in enumerate(media):
        try:
            found = inspect_medium(path, processor, bounds)
        except VideoError as error:
            _report(path, error, arguments.json)
            failed += 1
            continue
        sheet = None if sheets is None else sheets.write(number, found.video)
        if arguments.json:
            print(json.dumps({**found.as_row(), "contact_sheet": sheet}, ensure_ascii=False), flush=True)
        else:
            print(_text(found, f"[{number + 1}/{len(media)}] ", sheet), flush=True)
    return 2 if failed else 0


def _media(paths: Sequence[str], as_json: bool) -> tuple[list[str], int]:
    """The media at all paths, none twice, and the number of paths that have none. Each of these is reported."""
    found: list[str] = []
    failed = 0
    for path in paths:
        try:
            found += list_media(path)
        except VideoError as error:
            _report(path, error, as_json)
            failed += 1
    return list(dict.fromkeys(found)), failed


def _report(path: str, error: VideoError, as_json: bool) -> None:
    """Print one line on stderr. With --json, the error also has its object on stdout."""
    if as_json:
        print(json.dumps({"path": path, "error": str(error), "kind": error.kind}, ensure_ascii=False), flush=True)
    print(f"error: {error}", file=sys.stderr, flush=True)


def _text(found: Inspection, head: str, sheet: str | None) -> str:
    row = found.as_row()
    lines = [
        f"{head}{found.path}",
        f"  {row['kind']:<10} {row['container']}" + ("" if row["codec"] is None else f", {row['codec']}"),
        f"  length     {_length(row)}",
        f"  picture    {_picture(row)}",
        f"  model sees {found.seen}",
        f"  sampled    {_sampled(row)}",
        *(f"  warning    {warning}" for warning in row["warnings"]),
    ]
    return "\n".join(lines if sheet is None else [*lines, f"  sheet      {sheet}"])


def _length(row: dict[str, Any]) -> str:
    frames = f"{row['frames']} frame{'s' * (row['frames'] != 1)}"
    return frames if row["fps"] is None else f"{row['seconds']:.2f} s, {frames}, {row['fps']:.5g} a second"


def _picture(row: dict[str, Any]) -> str:
    size = f"{row['width']}x{row['height']} pixels"
    mirrored = ", mirrored" if row["mirrored"] else ""
    turned = f", turned by {row['rotation']} degrees" if row["rotation"] else ""
    return f"{size}{mirrored}{turned}"


def _sampled(row: dict[str, Any]) -> str:
    """Frame numbers with their times: `2 (0.20 s), 5 (0.50 s)`."""
    if row["frame_seconds"] is None:
        return ", ".join(map(str, row["frame_indices"]))
    pairs = zip(row["frame_indices"], row["frame_seconds"], strict=True)
    return ", ".join(f"{index} ({seconds:.2f} s)" for index, seconds in pairs)
