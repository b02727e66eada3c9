"""Python reads this at its start in every process of the job: with STAND_IN_LIBRARIES set, torch_npu has a device."""

import os
import sys
from pathlib import Path

if os.environ.get("STAND_IN_LIBRARIES"):
    sys.path.insert(0, str(Path(__file__).parent))
    import device

    libraries = Path(os.environ["STAND_IN_LIBRARIES"])
    device.start(device.load_libraries(libraries, int(os.environ["STAND_IN_DEVICES"]), os.environ["STAND_IN_SOC"]))
