"""A gallery as a process of its own: `python -m atb_pllava gallery --port 0`."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support import ROOT

_URL = re.compile(r" at (http://\S+)")


@dataclass
class RunningGallery:
    """`url` of the page, and the lines on stderr up to it."""

    url: str = ""
    stderr: list[str] = field(default_factory=list)


@contextmanager
def running_gallery(*arguments: object, has_traceback: bool = False) -> Iterator[RunningGallery]:
    """Runs while the body does. SIGTERM ends it, with exit status 0.

    has_traceback: the body provokes an error, of which gradio writes a traceback to stderr.
    """
    command = [sys.executable, "-m", "atb_pllava", "gallery", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    gallery = RunningGallery()
    try:
        for line in process.stderr:
            gallery.stderr.append(line)
            if found := _URL.search(line):
                gallery.url = found[1]
                break
        assert gallery.url, "".join(gallery.stderr)
        yield gallery
    finally:
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
        gallery.stderr += rest.splitlines(keepends=True)
    shown = "".join(gallery.stderr)
    assert process.returncode == 0 and ("Traceback" in shown) == has_traceback, shown
