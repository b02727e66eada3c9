"""Finds a router by model_type in the folders of this package, and constructs it with positional arguments."""

import importlib
import json
import os
from typing import Any


class Section:
    """A part of MindIE's config.json."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


class LLMConfig:
    def __init__(self, models: dict[str, Any] | None = None) -> None:
        self.models = models or {}

    def get(self, key: str) -> Section | None:
        values = self.models.get(key.removeprefix("models."))
        return None if values is None else Section(values)


def get_model(path: str, max_position_embeddings: int | None = None, models_dict: dict[str, Any] | None = None) -> Any:
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        raw = json.load(file)
    kind = raw["model_type"].lower()
    router = importlib.import_module(f"atb_llm.models.{kind}.router_{kind}")
    cls = getattr(router, f"{kind.capitalize()}Router")
    flags = (False, False, False)  # trust_remote_code, enable_atb_torch, enable_edge
    return cls(path, raw, True, True, max_position_embeddings, None, None, *flags, LLMConfig(models_dict), "")
