"""Times on a device: how long launched work took, without waiting after each piece of work."""

import time
from abc import ABC, abstractmethod
from typing import Any

import torch


class DeviceEvent(ABC):
    """The end of the work that was launched before `Backend.record`."""

    @abstractmethod
    def seconds_since(self, earlier: "DeviceEvent") -> float:
        """Seconds between two events of one backend.

        The caller has waited for both events, by `Backend.synchronize` for example.
        """


class HostEvent(DeviceEvent):
    """An event of a CPU, which has finished all work when `record` is called."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def seconds_since(self, earlier: DeviceEvent) -> float:
        assert isinstance(earlier, HostEvent)
        return self._time - earlier._time


class AcceleratorEvent(DeviceEvent):
    """An event of the current stream of `torch.cuda` or `torch.npu`, by the device's type."""

    def __init__(self, device_type: str) -> None:
        self._event: Any = getattr(torch, device_type).Event(enable_timing=True)
        self._event.record()

    def seconds_since(self, earlier: DeviceEvent) -> float:
        assert isinstance(earlier, AcceleratorEvent)
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1000
