"""`bench video`: a few frames of a long file against decoding all of it."""

import argparse
import os
import tempfile

from atb_pllava.bench.clip_decoding import compare_decoding, make_clip
from atb_pllava.cli.bench.output import add_json, add_rounds, check_json, check_rounds, print_rows
from atb_pllava.errors import ConfigError, check_whole_number
from atb_pllava.files import check_writable
from atb_pllava.multimodal.video_stream import MAX_THREADS


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="a video (default: 10 minutes of 720p, made here)")
    parser.add_argument("--num_frames", type=int, default=16, metavar="T", help="frames to read (default 16)")
    parser.add_argument("--keep", metavar="FILE", help="where to keep the clip that is made")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="decoder threads (default: as many as there are cores)"
    )
    add_rounds(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print how long reading a few frames takes, and decoding all of them."""
    check_json(arguments, *filter(None, [arguments.file]))
    check_rounds(arguments)
    if arguments.threads is not None:
        check_whole_number("--threads", arguments.threads, 1, MAX_THREADS)
    if arguments.keep is not None:
        if arguments.file is not None:
            raise ConfigError("--keep is about the clip that is made when no FILE is given")
        check_writable(arguments.keep, "--keep")
    with tempfile.TemporaryDirectory(prefix="atb_pllava_") as directory:
        path = arguments.file or arguments.keep or os.path.join(directory, "clip.mp4")
        if arguments.file is None:
            make_clip(path)
        print_rows(arguments, [compare_decoding(path, arguments.num_frames, arguments.rounds, arguments.threads)])
    return 0
