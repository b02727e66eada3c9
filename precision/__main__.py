"""`python -m precision`: which commands there are. Each has a `--help` of its own."""

import argparse
import sys
from collections.abc import Sequence

COMMANDS = {
    "python -m precision.parity": "compare ways of running a model: tokens, logits, every layer",
    "python -m precision.evaluate": "PLLaVA's benchmarks: MVBench, video QA, VCGBench, captions",
    "python -m precision.shapes": "a benchmark of coloured shapes, made here, for the tiny model",
    "python precision/clip_score.py": "score captions with open_clip, as MindIE's precision tests",
    "python precision/run_reference.py": "the captions of a float32 reference, to score beside them",
    "bash precision/videobench/run_pa_videobench.sh": "Video-Bench: sample, answer, compare with a GPU's answers",
    "python -m precision.msmodelslim_round_trip": "files of the real msModelSlim against float weights",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands; the process exit status."""
    lines = "\n".join(f"  {command}\n      {words}" for command, words in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m precision",
        description=f"Does a model still answer like the original? The commands:\n\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
