"""How far two ways of running a model agree: dtypes, world sizes, quantised weights.

    python examples/render_shapes.py --out CLIPS --count 200 --seed 900000
    python -m precision.agreement --clips CLIPS --model_path examples/tiny_pllava \\
        --left dtype=float32 --right dtype=bfloat16 --right dtype=float32,world_size=2 --right model_path=QUANT_DIR

Every side answers the same multiple-choice questions (in MVBench's form) and caption requests. The table has, for each
side: multiple-choice accuracy; answers that are the same as the left side's, token for token; the largest and the mean
difference of log-probabilities at the first token; and the bytes of the weights on disk. JSON goes to --output_json.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from atb_pllava import LLM, PllavaError, SamplingParams
from atb_pllava.prompt import CONVERSATIONS
from atb_pllava.weights import open_checkpoint

MVBENCH_SYSTEM = CONVERSATIONS["eval_mvbench"].system


def requests_of(clips: Path, questions: int | None = None) -> tuple[list[dict[str, Any]], list[str | None]]:
    """The requests of a folder written by render_shapes.py, and the right letter of each (None for captions).

    `questions` is how many of each clip's questions to take, from the first; None takes all.
    """
    requests: list[dict[str, Any]] = []
    letters: list[str | None] = []
    for clip in json.loads((clips / "clips.json").read_text(encoding="utf-8")):
        video = str(clips / clip["video"])
        requests.append({"prompt": "USER:<image> Describe the video. ASSISTANT:", "video": video})
        letters.append(None)
        for question in clip["questions"][:questions]:
            lines = "".join(f"({'ABCD'[i]}) {option}\n" for i, option in enumerate(question["options"]))
            asked = f"Question: {question['question']}\nOptions:\n{lines}Only give the best option."
            prompt = f"{MVBENCH_SYSTEM} USER: <image>\n USER: {asked} ASSISTANT:Best option:("
            requests.append({"prompt": prompt, "video": video})
            letters.append("ABCD"[question["correct"]])
    return requests, letters


def run_side(
    name: str, options: dict[str, Any], requests: list[dict[str, Any]]
) -> list[tuple[list[int], str, np.ndarray]]:
    """Token ids, text and first row of log-probabilities of every answer."""
    answers: dict[int, tuple[list[int], str, np.ndarray]] = {}
    began = said = time.monotonic()
    with LLM(**options) as llm:
        for number, answer in llm.serve(requests, SamplingParams(max_tokens=64, logprobs=-1)):
            if isinstance(answer, PllavaError):
                raise answer
            assert answer.logprobs is not None
            answers[number] = (answer.token_ids, answer.text, np.asarray(answer.logprobs[0]))
            if time.monotonic() - said > 5:
                said = time.monotonic()
                left = (said - began) / len(answers) * (len(requests) - len(answers))
                print(f"{name}: {len(answers)}/{len(requests)} answers, {left:.0f} s left", file=sys.stderr)
    return [answers[number] for number in sorted(answers)]


def compare(
    name: str, side: list[Any], left: list[Any], letters: list[str | None], weight_bytes: int
) -> dict[str, Any]:
    """One row of the table."""
    asked = [(text, letter) for (_, text, _), letter in zip(side, letters, strict=True) if letter is not None]
    errors = [np.abs(ours - theirs) for (_, _, ours), (_, _, theirs) in zip(side, left, strict=True)]
    return {
        "side": name,
        "answers": len(side),
        "choice_accuracy_percent": 100 * float(np.mean([text[:1] == letter for text, letter in asked])),
        "same_as_left_percent": 100 * float(np.mean([a[0] == b[0] for a, b in zip(side, left, strict=True)])),
        "max_logprob_error": float(max(error.max() for error in errors)),
        "mean_logprob_error": float(np.mean([error.mean() for error in errors])),
        "weights_mb": weight_bytes / 1e6,
    }


def parse_side(text: str, model_path: str) -> dict[str, Any]:
    """`key=value,...` as options of LLM; numbers become numbers."""
    options: dict[str, Any] = {"model_path": model_path}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        options[key] = float(value) if key == "lora_alpha" else int(value) if value.isdigit() else value
    return options


def weight_bytes(model_path: str) -> int:
    """Bytes of a checkpoint's tensors on disk."""
    return sum(tensor.num_bytes for tensor in open_checkpoint(model_path).base.tensors.values())


def main() -> int:
    parser = argparse.ArgumentParser(description="Agreement of several ways of running a model with the first.")
    parser.add_argument("--clips", type=Path, required=True, help="folder written by examples/render_shapes.py")
    parser.add_argument("--model_path", default="examples/tiny_pllava", help="where a side does not say otherwise")
    parser.add_argument("--left", default="dtype=float32", help="KEY=VALUE,... options of LLM (default dtype=float32)")
    parser.add_argument("--right", action="append", required=True, help="the same for another side; repeatable")
    parser.add_argument("--questions", type=int, metavar="N", help="multiple-choice questions a clip (default: all)")
    parser.add_argument("--output_json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    try:
        requests, letters = requests_of(arguments.clips, arguments.questions)
        sides = [(text, parse_side(text, arguments.model_path)) for text in [arguments.left, *arguments.right]]
        sizes = [weight_bytes(options["model_path"]) for _, options in sides]
        answers = [run_side(text, options, requests) for text, options in sides]
        rows = [
            compare(text, side, answers[0], letters, size)
            for (text, _), side, size in zip(sides, answers, sizes, strict=True)
        ]
    except (PllavaError, OSError, KeyError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("| side | multiple choice right | answers unchanged | max / mean log-probability error | weights |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['side']} | {row['choice_accuracy_percent']:.1f} % | {row['same_as_left_percent']:.1f} % | "
            f"{row['max_logprob_error']:.4f} / {row['mean_logprob_error']:.5f} | {row['weights_mb']:.1f} MB |"
        )
    if arguments.output_json:
        arguments.output_json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
