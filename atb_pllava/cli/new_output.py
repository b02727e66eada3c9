"""The check of an --output that a command writes as a whole."""

import os
from collections.abc import Sequence

from atb_pllava.errors import ConfigError
from atb_pllava.files import check_writable


def check_new_output(output: str, overwrite: bool, inputs: Sequence[str]) -> None:
    """Raises ConfigError when --output cannot be written, is one of `inputs`, or exists without --overwrite."""
    check_writable(output, "--output", inputs)
    if os.path.exists(output) and not overwrite:
        raise ConfigError(f"--output {output} exists; name another file, or add --overwrite to replace it")
