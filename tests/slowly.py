"""A module or script with an engine whose steps take longer, so that a test can end it midway whatever the machine.

python tests/slowly.py SECONDS MODULE_OR_FILE ARGUMENT...
"""

import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from atb_pllava.engine.core import EngineCore  # noqa: E402

_step = EngineCore.step


def _slow_step(core: EngineCore) -> Any:
    time.sleep(float(seconds))
    return _step(core)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what they start in the background ignore it
    _, seconds, program, *_ = sys.argv
    sys.argv = sys.argv[2:]
    EngineCore.step = _slow_step  # type: ignore[method-assign]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
