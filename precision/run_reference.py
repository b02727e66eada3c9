"""The reference side of the precision tests: answers in plain float32 on a CPU or a GPU.

    python precision/run_reference.py --model_path WEIGHTS --image_path CLIPS

writes gpu_coco_predict.json, {media path: text}, for precision/clip_score.py. The command is
`python -m atb_pllava predict` in float32, with one request at a time and without caches. `run_pa.sh --precision` makes
the NPU's side.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the packages need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

import torch

from atb_pllava.errors import ConfigError
from precision.command_line import Parser, add_predict_options, predict, run_command

DEFAULT_OUTPUT = "gpu_coco_predict.json"
PLAIN = {"dtype": "float32", "max_batch_size": 1, "video_cache_bytes": 0, "prefix_cache": False}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the process exit status."""
    parser = Parser(
        prog="python precision/run_reference.py", description="Reference answers, in float32 on a CPU or a GPU."
    )
    add_predict_options(parser)
    parser.set_defaults(output_json=DEFAULT_OUTPUT, **PLAIN)
    return run_command(lambda: parser.parse_args(argv), run_reference)


def run_reference(arguments: argparse.Namespace) -> int:
    """Run `predict`. Raises ConfigError for options that a reference must not have."""
    if arguments.backend not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--backend is {arguments.backend!r}; the reference runs on cpu or cuda")
    if arguments.backend == "auto":
        arguments.backend = "cuda" if torch.cuda.is_available() else "cpu"
    for name, only in (("dtype", "float32"), ("kv_cache_dtype", "auto")):
        if getattr(arguments, name) != only:
            raise ConfigError(f"--{name} is {getattr(arguments, name)!r}; the reference is {only}")
    return predict(arguments)


if __name__ == "__main__":
    sys.exit(main())
