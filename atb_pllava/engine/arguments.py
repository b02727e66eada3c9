"""All options of a model and its engine in one object. The command line and LLM's keywords both make it.

Each option is declared once: as a field of a dataclass below.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from atb_pllava.config import EngineConfig
from atb_pllava.executor.launcher import ParallelOptions
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.multimodal.options import MultimodalOptions
from atb_pllava.prompt.options import PromptOptions


@dataclass(frozen=True)
class EngineArgs:
    """The options by owner: loader, processor, prompt, engine, launcher. No field name occurs twice."""

    model: ModelOptions
    multimodal: MultimodalOptions = field(default_factory=MultimodalOptions)
    prompt: PromptOptions = field(default_factory=PromptOptions)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)

    @classmethod
    def of(
        cls,
        model_path: "str | os.PathLike[str] | EngineArgs",
        weight_dir: str | os.PathLike[str] | None,
        options: Mapping[str, Any],
    ) -> "EngineArgs":
        """The given EngineArgs, or an EngineArgs made of keywords. Raises TypeError for both together."""
        if not isinstance(model_path, EngineArgs):
            return cls.from_keywords(model_path, weight_dir=weight_dir, **options)
        given = [*([] if weight_dir is None else ["weight_dir"]), *options]
        if given:
            raise TypeError(f"LLM() got an EngineArgs and {', '.join(given)} too; put all into one of them")
        return model_path

    @classmethod
    def from_keywords(cls, model_path: str | os.PathLike[str], **options: Any) -> "EngineArgs":
        """Options by their field names. Raises TypeError for an unknown name, with the nearest known one."""
        given = {"model_path": model_path, **options}
        unknown = [name for name in given if name not in OPTION_NAMES]
        if unknown:
            raise TypeError(_unknown_option(unknown[0]))
        return cls(**{part: owner(**_of(owner, given)) for part, owner in _PARTS.items()})


_PARTS: dict[str, type] = {part.name: part.type for part in fields(EngineArgs)}  # type: ignore[misc]
OPTION_NAMES = tuple(option.name for owner in _PARTS.values() for option in fields(owner))


def _of(owner: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options that are fields of the dataclass `owner`."""
    return {option.name: given[option.name] for option in fields(owner) if option.name in given}


def _unknown_option(name: str) -> str:
    near = difflib.get_close_matches(name, OPTION_NAMES, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"LLM() has no option {name!r}.{meant} The options are {', '.join(OPTION_NAMES)}"
