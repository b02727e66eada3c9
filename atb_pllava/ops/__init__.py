"""Device backends: one contract (`interface.py`) and one folder a device. `registry.py` chooses a backend by name.

This file imports nothing, so that `host_memory.py` can be used where torch is missing or broken.
"""
