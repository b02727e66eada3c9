"""Device backends: one contract (`interface.py`), and one folder for each device.

`registry.py` chooses a backend by name. `__init__.py` imports nothing, so that `host_memory.py` works where torch is
missing or broken.
"""
