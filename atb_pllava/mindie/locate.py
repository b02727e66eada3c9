"""Where MindIE's model library `atb_llm` is. No module of atb_llm is imported: that needs an NPU and takes seconds."""

import os
import site
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from atb_pllava.errors import ConfigError


def find_atb_llm(given: str | None, home: str | None, search_path: Sequence[str] | None = None) -> Path | None:
    """The package directory `.../atb_llm` that a Python program would import, or None where there is none.

    `given` names that directory, or the directory that holds it, and no other place is searched then. Otherwise
    `search_path` comes first (default: sys.path), and `home` second. `home` is the value of ATB_SPEED_HOME_PATH, which
    MindIE's set_env.sh puts on PYTHONPATH. Raises ConfigError when `given` is not atb_llm.
    """
    if given is not None:
        found = next(_packages([given, str(Path(given).parent)] if Path(given).name == "atb_llm" else [given]), None)
        if found is None:
            raise ConfigError(
                f"--atb_llm {given!r} is no atb_llm: name the package's directory, or the one that holds it "
                "(ATB_SPEED_HOME_PATH after `source set_env.sh`)"
            )
        return found
    return next(_packages([*(sys.path if search_path is None else search_path), *([home] if home else [])]), None)


def _packages(search_path: Sequence[str]) -> Iterator[Path]:
    for entry in search_path:
        spec = PathFinder.find_spec("atb_llm", [entry])
        if spec is not None and spec.origin is not None and Path(spec.origin).with_name("models").is_dir():
            yield Path(spec.origin).parent


def find_examples(atb_llm: Path) -> Path | None:
    """The directory that holds MindIE's package `examples`, with its PA runner. None where there is none.

    In a source tree the package lies beside atb_llm, in a wheel inside atb_llm.
    """
    places = (atb_llm.parent, atb_llm)
    return next((place for place in places if (place / "examples" / "multimodal_runner.py").is_file()), None)


def site_directories(given: str | None = None) -> list[Path]:
    """The directories of this interpreter whose `.pth` files every start reads, writable ones first.

    `given`, where it is not None, is the only one. Raises ConfigError when it is no directory. In a virtual environment
    the result is the environment's directories. MindIE's own processes read those only when they run in it.
    """
    if given is not None:
        if not os.path.isdir(given):
            raise ConfigError(f"--site {given!r} is no directory; name a site-packages directory of MindIE's Python")
        return [Path(given).resolve()]
    places = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    existing = [Path(place) for place in places if os.path.isdir(place)]
    return sorted(existing, key=lambda place: not os.access(place, os.W_OK))
