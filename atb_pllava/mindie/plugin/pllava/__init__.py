"""The folder that becomes `atb_llm.models.pllava`: by a link, as a copy, or through an import hook (quirk 1).

Nothing in it is imported from anywhere else. Its modules have the names the host looks for and little in them; the
work is done in `atb_pllava`. A link leads into the package it belongs to, and a copy made by `mindie install` has the
package in it; neither needs it to be installed.
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
