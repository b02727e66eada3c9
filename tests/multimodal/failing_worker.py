"""A media worker that fails as the name of a file says. Tests start it in place of the real one."""

import errno
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path

from atb_pllava.multimodal import media_worker
from atb_pllava.multimodal.processor import VideoProcessor

READ = VideoProcessor._read


def fail(item: object) -> None:
    name = os.path.basename(os.path.realpath(item)) if isinstance(item, str) else ""
    if name.startswith("abort"):
        os.abort()
    elif name.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif name.startswith("exit"):
        os._exit(3)
    elif name.startswith("garbage"):
        os.write(0, b"garbage" * 100)
        time.sleep(600)
    elif name.startswith("nonsense"):
        os.write(0, b"\x03\0\0\0abc")
        time.sleep(600)
    elif name.startswith("hang"):
        time.sleep(600)
    elif name.startswith("wait"):
        while not Path(f"{item}.go").exists():
            time.sleep(0.01)
    elif name.startswith("bug"):
        raise TypeError("of the reader")
    elif name.startswith("memory"):
        raise MemoryError("none is left")
    elif name.startswith("system"):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))  # what PyAV raises when no thread is granted
    elif name.startswith("warn"):
        logging.getLogger("atb_pllava.multimodal.video").warning("%s: damaged a bit", item)


def read(processor: VideoProcessor, item, *options):
    fail(item)
    return READ(processor, item, *options)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    VideoProcessor._read = read  # type: ignore[method-assign]
    sys.exit(media_worker.main())
