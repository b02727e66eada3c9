"""The import hook's second half: adds the plugin to `atb_llm.models` as that is imported, without writing into atb_llm.

The first half is one line in a `.pth` file (see `install.py`), which every start of Python reads; it does nothing but
wait for an import of `atb_llm.models` and then runs this file. This file imports nothing of ours.
"""

import functools
import os
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

MODEL_TYPE = "pllava"
# Published PLLaVA says it is a "llava", and would fail somewhere in the host's LLaVA.
NOT_CONVERTED = (
    "{directory} is a PLLaVA checkpoint as it was published. Convert it, and start from the result: bash "
    "convert_quant_weights.sh -src {directory} -dst {directory}-mindie -type pllava_merged (or pllava_w8a16)"
)


def find_spec(name: str, path: Sequence[str] | None, folder: str) -> ModuleSpec | None:
    """The spec of `atb_llm.models`, which after its own code also runs `register` with the plugin's `folder`."""
    spec = PathFinder.find_spec(name, path)
    if spec is None or spec.loader is None:
        return spec
    run: Callable[[types.ModuleType], None] = spec.loader.exec_module

    def exec_module(module: types.ModuleType) -> None:
        run(module)
        register(module, folder)

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


def register(models: Any, folder: str) -> None:
    """Let `models.get_model` find the model type that lies in `folder/pllava`; every other type goes the host's way.

    The host accepts model types by the names of the folders beside its own file. For ours, its own function runs with
    `__file__` in another folder, so that nothing of it is repeated or replaced.
    """
    models.__path__.append(folder)
    original = models.get_model

    @functools.wraps(original)
    def get_model(model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        function = original
        config = _read_config(models, model_name_or_path)
        kind = str(config.get("model_type")).lower()
        if kind == "llava" and "pooling_shape" in config:
            raise ValueError(NOT_CONVERTED.format(directory=model_name_or_path))
        if kind == MODEL_TYPE:
            variables = {**original.__globals__, "__file__": os.path.join(folder, "__init__.py")}
            function = types.FunctionType(
                original.__code__, variables, original.__name__, original.__defaults__, original.__closure__
            )
        return function(model_name_or_path, *args, **kwargs)

    models.get_model = get_model


def _read_config(models: Any, directory: str) -> dict[str, Any]:
    try:
        return dict(models.safe_get_config_dict(directory))
    except Exception:  # the host's own message about this directory is the one to see
        return {}
