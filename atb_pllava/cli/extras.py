"""Imports the modules that need optional packages, the extras of pyproject.toml."""

import sys
from importlib import import_module
from types import ModuleType

from atb_pllava.errors import ConfigError

# The packages of each extra. The package itself may be a clone that pip does not know, so the packages are named.
EXTRAS = {
    "serve": ("fastapi", "httpx", "prometheus_client", "python-multipart", "uvicorn"),
    "ui": ("fastapi", "gradio", "httpx", "prometheus_client", "python-multipart", "uvicorn"),
}


def import_with_extra(module: str, extra: str) -> ModuleType:
    """The module of this package that needs the packages of `extra`.

    Raises ConfigError that names the missing package and the line that installs all packages of the extra.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("atb_pllava"):
            raise
        line = f"{sys.executable} -m pip install {' '.join(EXTRAS[extra])}"
        raise ConfigError(f"the package {error.name} is missing; install it with: {line}") from None
