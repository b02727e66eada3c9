"""The second half of the import hook: adds the plugin to `atb_llm.models` when a program imports that module.

No file of atb_llm is changed. The first half is one line in a `.pth` file (see `install.py`), which every start of
Python reads. The line waits for an import of `atb_llm.models` and then runs this file. This file imports only the
standard library.
"""

import functools
import os
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

MODEL_TYPE = "pllava"
# Published PLLaVA has the model_type "llava", and would fail somewhere in MindIE's own LLaVA.
NOT_CONVERTED = (
    "{directory} is a PLLaVA checkpoint as it was published. Convert it, and start from the result: bash "
    "convert_quant_weights.sh -src {directory} -dst {directory}-mindie -type pllava_merged (or pllava_w8a16)"
)


def find_spec(name: str, path: Sequence[str] | None, folder: str) -> ModuleSpec | None:
    """The import spec of `atb_llm.models`, with `register` called behind the module's own code.

    `folder` is the directory that holds the plugin's folder `pllava`.
    """
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
    """Make `models.get_model` find the model type "pllava" in `folder`. All other types are found as before.

    MindIE's get_model accepts the names of the folders beside its own `__file__` as model types. For "pllava" the same
    code runs with a `__file__` in `folder`. Raises ValueError for a published PLLaVA directory.
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
    except Exception:  # the host reads the file again and reports what is wrong with it
        return {}
