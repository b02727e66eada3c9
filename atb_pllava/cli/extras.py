"""Imports the modules that need optional packages, the extras of pyproject.toml."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from atb_pllava.errors import ConfigError

# The packages of each extra. The package itself may be a clone that pip does not know, so the packages are named.
_SERVE = ("fastapi", "httpx", "prometheus_client", "python-multipart", "uvicorn")
_RAY = ("ray", "fsspec", "pandas", "pyarrow")
EXTRAS = {"serve": _SERVE, "ui": (*_SERVE, "gradio"), "tables": ("pyarrow",), "ray": _RAY}


def import_with_extra(module: str, extra: str) -> ModuleType:
    """The module of this package that needs the packages of `extra`.

    Raises ConfigError that names the missing packages and the line that installs the extra.
    """
    missing = [package for package in EXTRAS[extra] if find_spec(package.replace("-", "_")) is None]
    if missing:
        line = f"{sys.executable} -m pip install {' '.join(EXTRAS[extra])}"
        raise ConfigError(f"this needs {', '.join(missing)}; install: {line}")
    return import_module(module)
