"""A process that reads the video file of each path on stdin, and keeps nothing. `media_pool.py` compares with it."""

import json
import sys

from atb_pllava.config import PreprocessorConfig
from atb_pllava.multimodal.processor import VideoProcessor


def main(num_frames: int, decoder_threads: int) -> None:
    """Read the file of each line of stdin, and print `done` after each."""
    processor = VideoProcessor(num_frames, PreprocessorConfig(), threads=decoder_threads)
    for line in sys.stdin:
        processor.prepare([json.loads(line)])
        print("done", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
