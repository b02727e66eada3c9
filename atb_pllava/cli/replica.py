"""The program of a replica: a server of `serve` that ends with the process which started it, however that one ends.

    python -m atb_pllava.cli.replica serve --port 0 ...

The starter holds the other end of stdin. stdin ends when the starter closes it or is killed.
"""

import os
import signal
import sys
import threading
import time

from atb_pllava.cli.verbs import main

_SECONDS_BETWEEN_SIGNALS = 0.5  # two signals at once would count as one
_SECONDS_TO_END = 10.0


def _end_with_starter() -> None:
    while os.read(0, 2**10):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # drain
    time.sleep(_SECONDS_BETWEEN_SIGNALS)
    os.kill(os.getpid(), signal.SIGTERM)  # wait for nobody: the starter is gone
    time.sleep(_SECONDS_TO_END)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_starter, name="end with starter", daemon=True).start()
    sys.exit(main())
