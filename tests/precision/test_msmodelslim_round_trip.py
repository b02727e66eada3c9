"""The comparison of precision/msmodelslim_round_trip.py, on files that the builtin quantizer made."""

from pathlib import Path
from typing import Any

import pytest

from atb_pllava.convert.converter import convert_checkpoint
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.mindie.host_files import host_files
from precision.msmodelslim_round_trip import SCHEMES, load, worst_step
from tests.support import TINY


@pytest.mark.parametrize("options", SCHEMES.values(), ids=SCHEMES)
def test_every_weight_is_within_half_a_step(tmp_path: Path, options: dict[str, Any]) -> None:
    """msModelSlim is not installed here. The comparison of the loaded models is the same."""
    convert_checkpoint(TINY, tmp_path / "w8a16", ConvertOptions("pllava_w8a16", **options), host_files=host_files)
    assert 0.4 < worst_step(load(tmp_path / "w8a16"), load(TINY)) < 0.5001
