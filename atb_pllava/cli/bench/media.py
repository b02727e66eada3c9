"""`bench media`: reading videos in this process, by the media pool, and by as many bare reader processes."""

import argparse
import tempfile

from atb_pllava.bench.media_pool import compare_readers, make_media
from atb_pllava.cli.bench.output import add_json, add_rounds, check_json, check_rounds, print_rows, say
from atb_pllava.cli.media_option import add_media
from atb_pllava.errors import VideoError, check_whole_number, counted
from atb_pllava.multimodal.media import list_media, read_media
from atb_pllava.multimodal.media_pool import default_workers
from atb_pllava.multimodal.options import MOST_WORKERS

COLUMNS = {
    "reader": "reader",
    "videos_per_s": "videos/s",
    "against_this_process": "times this process",
    "against_bare_readers": "times bare readers",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_media(parser)
    parser.add_argument(
        "--media_workers", type=int, metavar="N", help="workers, and bare readers (default: the cores, at most 8)"
    )
    parser.add_argument("--num_frames", type=int, default=16, metavar="T", help="frames of each video (default 16)")
    parser.add_argument("--as_they_are", action="store_true", help="read the files themselves, not their re-encodings")
    add_rounds(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the videos per second of each way to read. Each video is re-encoded in three heights, each twice."""
    check_json(arguments, *arguments.media)
    check_rounds(arguments)
    workers = default_workers() if arguments.media_workers is None else arguments.media_workers
    check_whole_number("--media_workers", workers, 1, MOST_WORKERS)
    media = list_media(*arguments.media)
    for path in media:
        if read_media(path, arguments.num_frames).fps == 0:
            raise VideoError(f"{path} is an image; name videos", "wrong_medium")
    with tempfile.TemporaryDirectory(prefix="atb_pllava_") as directory:
        if not arguments.as_they_are:
            say(arguments, f"re-encoding {counted(len(media), 'video')}")
            media = make_media(media, directory)
        say(arguments, f"reading {counted(len(media), 'file')}, {counted(arguments.rounds + 1, 'round')}")
        print_rows(arguments, compare_readers(media, arguments.num_frames, workers, arguments.rounds), COLUMNS)
    return 0
