"""The package `atb_llm.models.pllava`: this folder linked or copied into atb_llm, or found by an import hook.

MindIE takes only folders in atb_llm/models for models (quirk 1). The modules here have the names that MindIE looks for
and contain little. The work is done in `atb_pllava`, which need not be installed. A link leads into a directory with
the package beside it, and a copy made by `mindie install` contains the package.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("atb_pllava") is None:
    _here = Path(__file__).resolve()
    _places = (_here.parent / "package", *_here.parents[4:5])
    _root = next((path for path in _places if (path / "atb_pllava").is_dir()), None)
    if _root is None:
        raise ModuleNotFoundError(
            "atb_llm/models/pllava is a copy, and the package it needs is not installed: pip install atb_pllava for "
            f"{sys.executable}, or let `python -m atb_pllava mindie install` link or copy it"
        )
    sys.path.append(str(_root))
