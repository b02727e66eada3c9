"""PLLaVA, the video language model, as a paged-attention model: load a checkpoint and ask about videos."""

from atb_pllava.engine.request import Metrics, RequestOutput, SamplingParams
from atb_pllava.errors import BackendError, ConfigError, PllavaError, RequestError, VideoError, WeightError
from atb_pllava.limits import MediaLimits
from atb_pllava.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BackendError",
    "ConfigError",
    "MediaLimits",
    "Metrics",
    "PllavaError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "VideoError",
    "WeightError",
]
