"""PLLaVA, the video language model, as a paged-attention model: load a checkpoint and ask about videos."""

from importlib import import_module
from typing import TYPE_CHECKING

from atb_pllava.doctor.required_packages import REQUIRED, missing_package

if TYPE_CHECKING:
    from atb_pllava.engine.outputs import Metrics, RequestOutput
    from atb_pllava.engine.sampling_params import SamplingParams
    from atb_pllava.errors import (
        BackendError,
        ConfigError,
        EngineDeadError,
        PllavaError,
        RequestError,
        VideoError,
        WeightError,
    )
    from atb_pllava.llm import LLM
    from atb_pllava.multimodal.image_sequence import ImageSequence
    from atb_pllava.multimodal.limits import MediaLimits

__version__ = "0.4.0"

__all__ = [
    "LLM",
    "BackendError",
    "ConfigError",
    "EngineDeadError",
    "ImageSequence",
    "MediaLimits",
    "Metrics",
    "PllavaError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "VideoError",
    "WeightError",
]

_HOME = {
    "ImageSequence": "multimodal.image_sequence",
    "LLM": "llm",
    "MediaLimits": "multimodal.limits",
    "Metrics": "engine.outputs",
    "RequestOutput": "engine.outputs",
    "SamplingParams": "engine.sampling_params",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used. Importing torch takes seconds, and some commands need no torch.

    Raises ImportError, with what to type, when a required package is missing.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)
    except ModuleNotFoundError as error:
        if error.name not in REQUIRED:
            raise
        raise ImportError(missing_package(error.name), name=error.name) from None
