"""`python -m precision --help` lists the commands of this folder. Each command is started by its own name."""

import sys

COMMANDS = {
    "python -m precision.parity": "compare two ways of running one model: tokens, logits, every layer",
    "python -m precision.evaluate": "PLLaVA's benchmarks: MVBench, VideoQA, VCGBench, recaptioning",
    "python -m precision.shapes": "write the benchmark of coloured shapes, for precision.evaluate",
    "python precision/run_reference.py": "the reference side's answers: float32 on a CPU or a GPU",
    "python precision/clip_score.py": "how well answers fit their media, with open_clip as the judge",
    "python precision/videobench/extract_dataset.py": "draw a sample of Video-Bench",
    "python precision/videobench/shapes_dataset.py": "write a miniature Video-Bench of coloured shapes",
    "bash precision/videobench/run_pa_videobench.sh": "answer a set of Video-Bench",
    "bash precision/videobench/run_pa_videobench_gpu.sh": "answer it on the reference side",
    "python precision/videobench/precision_test.py": "compare both sides' answers to Video-Bench",
    "python precision/tokenizer_check.py": "prompts and answers with LLaMA's real vocabulary, from npm",
    "python precision/msmodelslim_round_trip.py": "check files that msModelSlim made",
}


def main() -> int:
    """Print the list. Returns the exit status: 2 for anything but --help."""
    given = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    if given:
        print(f"error: {given[0]!r} is no command of precision; see `python -m precision --help`", file=sys.stderr)
        return 2
    width = max(map(len, COMMANDS))
    print("usage: python -m precision [--help]\n\nThe precision tests; each takes --help:")
    print("\n".join(f"  {command:<{width}}  {summary}" for command, summary in COMMANDS.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
