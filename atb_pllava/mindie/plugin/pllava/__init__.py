"""The folder that becomes `atb_llm.models.pllava`: by a link, as a copy, or through an import hook (quirk 1).

Nothing in it is imported from anywhere else. Its modules have the names the host looks for and little in them; the
work is done in `atb_pllava`. A link leads into the package it belongs to, which then need not be installed.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("atb_pllava") is None:
    _root = Path(__file__).resolve().parents[4]
    if not (_root / "atb_pllava" / "mindie").is_dir():
        raise ModuleNotFoundError(
            "atb_llm/models/pllava is a copy, and the package it needs is not installed: pip install atb_pllava for "
            f"{sys.executable}, or link the folder instead (python -m atb_pllava mindie install --link)"
        )
    sys.path.append(str(_root))
