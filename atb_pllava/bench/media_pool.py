"""Reading videos in this process, by a media pool, and by bare reader processes, timed in turns.

Bare readers are the bound: as many processes as the pool has workers, which read files and send nothing back.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any

import av

from atb_pllava.bench.timing import interleaved, ratio
from atb_pllava.config import PreprocessorConfig
from atb_pllava.errors import BackendError, counted
from atb_pllava.multimodal.media_pool import MediaPool, cores
from atb_pllava.multimodal.processor import VideoProcessor
from atb_pllava.multimodal.video_stream import best_stream

logger = logging.getLogger(__name__)

HEIGHTS = (360, 720, 1080)
COPIES = ("a", "b")  # the same video under two names, as two users would send it
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def make_media(sources: Sequence[str], directory: str) -> list[str]:
    """Each source re-encoded as H.264 in three heights, each twice. Returns the paths. The log says how far it is."""
    made = []
    for number, source in enumerate(sources):
        for height in HEIGHTS:
            logger.info("re-encoding %s in %d lines", source, height)
            paths = [os.path.join(directory, f"{number}_{height}_{copy}.mp4") for copy in COPIES]
            _encode(source, height, paths[0])
            shutil.copyfile(*paths)
            made += paths
    return made


def compare_readers(paths: Sequence[str], num_frames: int, workers: int, rounds: int) -> list[dict[str, Any]]:
    """Videos per second of the three ways to read `paths`, as rows of a table. Medians over the rounds.

    Raises VideoError for a file that cannot be read. The warm-up reads every file in every way.
    """
    here = VideoProcessor(num_frames, PreprocessorConfig())
    with ExitStack() as stack:
        pool = MediaPool(workers)
        stack.callback(pool.close)
        pooled = VideoProcessor(num_frames, PreprocessorConfig(), pool=pool)
        readers = stack.enter_context(_bare_readers(workers, num_frames))
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        alone, by_pool, bare = interleaved(
            [
                lambda: [here.prepare([path]) for path in paths],
                lambda: list(threads.map(lambda path: pooled.prepare([path]), paths)),
                lambda: list(threads.map(readers.read, paths)),
            ],
            rounds,
        )
    return [
        {
            "reader": name,
            "videos_per_s": len(paths) / median(seconds),
            "against_this_process": ratio(seconds, alone),
            "against_bare_readers": ratio(seconds, bare),
        }
        for name, seconds in (
            ("this process (--media_workers 0)", alone),
            (f"media pool, {counted(workers, 'worker')}", by_pool),
            (f"{counted(workers, 'bare reader')}", bare),
        )
    ]


class _BareReaders:
    """Processes that read a file for each line of stdin, a path as JSON. Several threads may call `read`."""

    def __init__(self, processes: "Sequence[subprocess.Popen[str]]") -> None:
        self._free: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
        for process in processes:
            self._free.put(process)

    def read(self, path: str) -> None:
        """Let a free process read a file. Raises BackendError when the process has ended."""
        process = self._free.get()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{json.dumps(path)}\n")
        process.stdin.flush()
        if process.stdout.readline() != "done\n":
            raise BackendError(f"a bare reader ended while it read {path}; stderr says why")
        self._free.put(process)


@contextmanager
def _bare_readers(count: int, num_frames: int) -> Iterator[_BareReaders]:
    """Running reader processes, each with its share of the cores for decoding."""
    decoder_threads = max(1, cores() // count)
    command = [sys.executable, "-m", "atb_pllava.bench.bare_reader", str(num_frames), str(decoder_threads)]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, cwd=_PACKAGE_PARENT, stdin=pipe, stdout=pipe, text=True) for _ in range(count)
    ]
    try:
        yield _BareReaders(processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _encode(source: str, height: int, path: str) -> None:
    with av.open(source) as given, av.open(path, "w", format="mp4") as made:
        stream: Any = best_stream(given)
        width = round(stream.width * height / stream.height / 2) * 2
        target: Any = made.add_stream("libx264", rate=stream.average_rate, options={"preset": "veryfast"})
        target.width = width
        target.height = height
        target.pix_fmt = "yuv420p"
        for number, frame in enumerate(given.decode(stream)):
            picture = frame.reformat(width, height, "yuv420p")
            picture.pts = number
            picture.time_base = 1 / stream.average_rate
            made.mux(target.encode(picture))
        made.mux(target.encode(None))
