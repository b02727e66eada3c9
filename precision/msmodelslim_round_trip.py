"""Check files that the real msModelSlim makes: they load, and every weight is within half a quantisation step.

    python -m precision.msmodelslim_round_trip FLOAT_DIR

The check needs an environment of its own with `pip install msmodelslim transformers` beside our packages. A tiny
checkpoint is enough. The exit status is 1 when a weight is further off.
"""

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the packages need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

from atb_pllava.convert.converter import convert_checkpoint
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.loader.model_loader import fill_model, plan_model
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.mindie.host_files import host_files
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.int8 import Int8Weight
from precision.command_line import Parser, run_command

SCHEMES: dict[str, dict[str, Any]] = {
    "symmetric": {},
    "asymmetric": {"symmetric": False},
    "groups of 64": {"group_size": 64},
}


def load(directory: str | Path) -> Pllava:
    """The model of a checkpoint, in float32 on the CPU."""
    # Plain torch: the compiled kernels would pack the weights that are compared here.
    options = ModelOptions(str(directory), dtype="float32", backend="cpu", kernels="torch")
    return fill_model(*plan_model(options, TensorParallel()))


def worst_step(quantised: Pllava, exact: Pllava) -> float:
    """The largest difference of any weight from its float original, in quantisation steps."""
    worst = 0.0
    for ours, theirs in zip(quantised.language.layers, exact.language.layers, strict=True):
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            weight = getattr(ours, name).matrices[0].weight
            original = getattr(theirs, name).matrices[0].weight
            assert isinstance(weight, Int8Weight)
            step = weight.scale.repeat_interleave(weight.shape[1] // weight.scale.shape[1], 1)
            worst = max(worst, float(((weight.dequantise() - original).abs() / step).max()))
    return worst


def round_trip(arguments: argparse.Namespace) -> int:
    """Convert with every scheme, load, and compare. Returns the exit status."""
    source = arguments.checkpoint
    exact = load(source)
    status = 0
    with tempfile.TemporaryDirectory() as directory:
        for scheme, options in SCHEMES.items():
            target = Path(directory, scheme.replace(" ", "-"))
            convert_options = ConvertOptions("pllava_w8a16", quantizer="msmodelslim", **options)
            convert_checkpoint(source, target, convert_options, host_files=host_files)
            worst = worst_step(load(target), exact)
            status |= worst > 0.5001
            print(f"msmodelslim {version('msmodelslim')}, {scheme}: at most {worst:.4f} steps off")
    return status


if __name__ == "__main__":
    parser = Parser(prog="python precision/msmodelslim_round_trip.py", description="Check files that msModelSlim made.")
    parser.add_argument("checkpoint", metavar="FLOAT_DIR", help="a checkpoint in float, a tiny one is enough")
    sys.exit(run_command(parser.parse_args, round_trip))
