"""The input of the doctor's checks that both engines share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from atb_pllava.doctor.npu_smi import device_files


@dataclass(frozen=True)
class Setting:
    """Environment variables, a checkpoint directory, the number of devices to use, and the device files of NPUs."""

    variables: Mapping[str, str]
    model_path: str | None = None
    world_size: int = 1
    devices: Sequence[str] = field(default_factory=device_files)
