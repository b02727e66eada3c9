"""The environment variables, read once when this module is imported, as MindIE does."""

import os
from dataclasses import dataclass


@dataclass
class EnvVar:
    rank: int = int(os.getenv("RANK", "0"))
    local_rank: int = int(os.getenv("LOCAL_RANK", "0"))
    world_size: int = int(os.getenv("WORLD_SIZE", "1"))
    benchmark_enable: bool = os.getenv("ATB_LLM_BENCHMARK_ENABLE", "0") == "1"
    benchmark_filepath: str | None = os.getenv("ATB_LLM_BENCHMARK_FILEPATH")


ENV = EnvVar()
