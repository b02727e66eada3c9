"""Compare two sides' answers to Video-Bench questions with the right answers and with each other.

    python precision/videobench/precision_test.py --eval_npu_path NPU/sampling_data_eval.json \\
        --eval_gpu_path GPU/sampling_data_eval.json --sampling_answer_path egs/Video-Bench/Eval_QA/sampling_answer.json

prints both accuracies as MindIE's llava_video_precision_test.py does, then a table of the sets. Every question that one
of the sides was asked counts. A reply without an option, an error and a missing reply are not right, and each kind is
counted. With --legacy the accuracies are computed as in MindIE's script, which drops such questions and knows no
option F.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

import numpy as np

from atb_pllava.bench.tables import markdown
from atb_pllava.errors import ConfigError, counted
from atb_pllava.files import check_writable, write_json
from precision.command_line import Parser, run_command
from precision.confidence import paired_difference, wilson_interval
from precision.videobench.dataset import read_answers, read_json, some_of
from precision.videobench.scoring import accuracy_as_original, read_letter

Key = tuple[str, str]  # set and id
Answers = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Reply:
    """The reply of one side to one question."""

    text: str
    failed: bool

    @property
    def letter(self) -> str | None:
        """The option that the reply names, or None."""
        return None if self.failed else read_letter(self.text)


Sides = Mapping[str, Mapping[Key, Reply]]


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a <set>_eval.json. Raises ConfigError for a file of another form."""
    rows = read_json(path)
    for name, row in rows.items():
        said = row.get("output_sequence") if isinstance(row, dict) else None
        if not (isinstance(said, str) or isinstance(said, list) and said and isinstance(said[0], str)):
            raise ConfigError(f"{path}: {name!r} has no output_sequence with a text; this is no <set>_eval.json")
        if not isinstance(row.get("dataset"), str | None):
            raise ConfigError(f"{path}: {name!r} has dataset {row['dataset']!r}; it must be the name of a set")
    return rows


def read_replies(path: Path, answers: Answers) -> dict[Key, Reply]:
    """One side's replies by set and id."""
    replies = {}
    for name, row in read_results(path).items():
        said = row["output_sequence"]
        reply = Reply(said if isinstance(said, str) else said[0], "error" in row)
        replies[row.get("dataset") or _set_of(name, path, answers), name] = reply
    return replies


def _set_of(name: str, path: Path, answers: Answers) -> str:
    """The set of a question whose row has no dataset: the file's set, or the only set that has the id."""
    of_file = path.name.removesuffix("_eval.json")
    having = [dataset for dataset, items in answers.items() if name in items]
    if of_file in answers or len(having) == 1:
        return of_file if of_file in answers else having[0]
    raise ConfigError(
        f"{path}: question {name!r} has no dataset, and {len(having)} sets of the answers have its id; "
        "call the file <set>_eval.json"
    )


def right_letters(answers: Answers, asked: set[Key]) -> tuple[dict[Key, str], list[str]]:
    """The right option of each asked question, and messages about the questions that have none."""
    letters = {}
    strange = []
    for dataset, name in sorted(asked):
        text = answers.get(dataset, {}).get(name)
        letter = None if text is None else read_letter(text)
        if letter:
            letters[dataset, name] = letter
        else:
            strange.append(f"{dataset}/{name} has " + ("no right answer" if text is None else f"the answer {text!r}"))
    return letters, strange


def score(keys: Sequence[Key], right: Mapping[Key, str], sides: Sides) -> dict[str, Any]:
    """Counts and shares of both sides for some questions."""
    letters = {side: [replies[k].letter if k in replies else None for k in keys] for side, replies in sides.items()}
    row: dict[str, Any] = {"questions": len(keys)}
    for side, replies in sides.items():
        hits = sum(letter == right[key] for letter, key in zip(letters[side], keys, strict=True))
        there = [replies[key] for key in keys if key in replies]
        row[side] = {
            "right": hits,
            "accuracy": hits / len(keys),
            "interval": wilson_interval(hits, len(keys)),
            "unreadable": sum(not reply.failed and reply.letter is None for reply in there),
            "failed": sum(reply.failed for reply in there),
            "not_asked": len(keys) - len(there),
        }
    row["agreement"] = sum(a is not None and a == b for a, b in zip(*letters.values(), strict=True)) / len(keys)
    return row


def compare(answers: Answers, sides: Sides, seed: int) -> dict[str, Any]:
    """The whole comparison, as it is printed and written. `sides` is {"gpu": ..., "npu": ...}."""
    asked = set(sides["gpu"]) | set(sides["npu"])
    right, strange = right_letters(answers, asked)
    keys = [(dataset, name) for dataset, items in answers.items() for name in items if (dataset, name) in right]
    if not keys:
        raise ConfigError(f"no question of the results has a right answer: {some_of(strange) or 'they are empty'}")
    datasets = list(dict.fromkeys(dataset for dataset, _ in keys))
    hits = {
        side: np.array([key in replies and replies[key].letter == right[key] for key in keys])
        for side, replies in sides.items()
    }
    return {
        "all": score(keys, right, sides),
        "sets": {name: score([key for key in keys if key[0] == name], right, sides) for name in datasets},
        "npu_minus_gpu": {**asdict(paired_difference(hits["npu"], hits["gpu"], seed)), "seed": seed},
        "without_right_answer": strange,
        "asked_on_no_side": sum((name, key) not in asked for name in datasets for key in answers[name]),
        "differing": [_difference(key, right[key], sides) for key in keys if _differs(key, sides)],
    }


def _differs(key: Key, sides: Sides) -> bool:
    return len({replies[key].letter if key in replies else None for replies in sides.values()}) > 1


def _difference(key: Key, right: str, sides: Sides) -> dict[str, Any]:
    said = {side: replies[key].text if key in replies else None for side, replies in sides.items()}
    return {"dataset": key[0], "id": key[1], "right": right, **said}


def tables(report: Mapping[str, Any]) -> str:
    """Two Markdown tables of the sets, with a last row for all: accuracies, then counts gpu / npu of other replies."""
    sets = [*report["sets"].items(), ("all", report["all"])]
    accuracies = [
        {
            "set": name,
            "asked": row["questions"],
            "gpu": _share(row["gpu"]),
            "npu": _share(row["npu"]),
            "same option": f"{100 * row['agreement']:.1f} %",
        }
        for name, row in sets
    ]
    headings = {"unreadable": "no option", "failed": "failed", "not_asked": "not asked"}
    others = [
        {
            "set": name,
            **{title: f"{row['gpu'][count]} / {row['npu'][count]}" for count, title in headings.items()},
        }
        for name, row in sets
    ]
    return f"{markdown(accuracies)}\n\n{markdown(others)}"


def _share(side: Mapping[str, Any]) -> str:
    low, high = side["interval"]
    return f"{100 * side['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def paired_line(paired: Mapping[str, Any]) -> str:
    """One line with the difference of the sides, for people."""
    return (
        f"npu - gpu: {100 * paired['difference']:+.2f} points (95 % {100 * paired['low']:+.2f} to "
        f"{100 * paired['high']:+.2f}); right on the npu alone {paired['only_first']}, on the gpu alone "
        f"{paired['only_second']}, exact McNemar p {paired['p_value']:.3g}"
    )


def test(arguments: argparse.Namespace) -> int:
    """Compare both sides, print the tables and write --output_json. Returns the exit status."""
    if arguments.output_json is not None:
        check_writable(str(arguments.output_json), "--output_json")
    answers = read_answers(arguments.sampling_answer_path)
    report = (legacy_report if arguments.legacy else full_report)(arguments, answers)
    if arguments.output_json is not None:
        write_json(arguments.output_json, report)
    return 0


def full_report(arguments: argparse.Namespace, answers: Answers) -> dict[str, Any]:
    """Print and return the full comparison."""
    sides = {"gpu": arguments.eval_gpu_path, "npu": arguments.eval_npu_path}
    report = compare(answers, {side: read_replies(path, answers) for side, path in sides.items()}, arguments.seed or 0)
    for side in sides:
        print(f"{side} {report['all'][side]['accuracy']:.4f}")
    print(f"\n{tables(report)}\n\n{paired_line(report['npu_minus_gpu'])}")
    strange = report["without_right_answer"]
    if strange:
        print(f"{counted(len(strange), 'question')} not counted: {some_of(strange)}")
    if report["asked_on_no_side"]:
        print(f"{counted(report['asked_on_no_side'], 'question')} of these sets asked on no side, not counted")
    return report


def legacy_report(arguments: argparse.Namespace, answers: Answers) -> dict[str, Any]:
    """Compute both accuracies as MindIE's script does. Prints and returns them."""
    if arguments.seed is not None:
        raise ConfigError("--seed is of no use with --legacy, which has no intervals")
    # MindIE's script takes the first item of output_sequence, also when that is a text.
    npu, gpu = (
        {name: row["output_sequence"][0] if row["output_sequence"] else "" for name, row in read_results(path).items()}
        for path in (arguments.eval_npu_path, arguments.eval_gpu_path)
    )
    npu_accuracy, gpu_accuracy, counted = accuracy_as_original(npu, gpu, answers)
    if not counted:
        raise ConfigError("no question has a reply on both sides that the original reads; it divides by zero here")
    print(f"gpu {gpu_accuracy:.4f}\nnpu {npu_accuracy:.4f}")
    return {"legacy": True, "gpu": gpu_accuracy, "npu": npu_accuracy, "questions": counted}


def parser() -> argparse.ArgumentParser:
    """The command's options: those of MindIE's script, --legacy, --seed and --output_json."""
    parser = Parser(
        prog="python precision/videobench/precision_test.py", description="Accuracy and agreement on Video-Bench."
    )
    for name, text in (
        ("eval_npu_path", "<set>_eval.json of run_pa_videobench.sh"),
        ("eval_gpu_path", "<set>_eval.json of run_pa_videobench_gpu.sh"),
        ("sampling_answer_path", "sampling_answer.json, or ANSWER.json for a whole set"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE", help=text)
    parser.add_argument("--legacy", action="store_true", help="score exactly as MindIE's script")
    parser.add_argument("--seed", type=int, help="seed of the bootstrap interval (default 0)")
    parser.add_argument("--output_json", type=Path, metavar="FILE", help="also write everything here")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(parser().parse_args, test))
