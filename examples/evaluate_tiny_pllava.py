"""Measures examples/tiny_pllava on held-out clips, through the Python API of atb_pllava.

    python examples/evaluate_tiny_pllava.py --count 200 --seed 900000

The command renders the clips of these seeds, which are not used in training, and encodes them as H.264. It reports
the percentage of correct multiple-choice answers by kind (MVBench prompt), of correct facts in captions, and of correct
answers about direction. Questions about direction are asked with the 16 frames in order and shuffled. A model that
looks at the order of frames must fail when they are shuffled. Every answer is compared with the clip's specification.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

import numpy as np
from render_shapes import make_clip, render, sample_indices, write_video
from shape_questions import choice_prompt, chosen_letter, facts, plain_prompt, questions, score_caption

from atb_pllava.cli import Parser

Answerer = Callable[[list[dict], int], list[str]]


def read_frames(video: Path) -> np.ndarray:
    """All frames of a video as uint8 [count, height, width, 3]."""
    import av

    with av.open(str(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def product(model: str, batch: int) -> Answerer:
    """A function that answers with atb_pllava: requests and the most tokens to generate, to texts."""
    from atb_pllava import LLM, SamplingParams

    llm = LLM(model, dtype="float32")

    def answer(requests: list[dict], tokens: int) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(requests), batch):
            texts += [
                out.text for out in llm.generate(requests[start : start + batch], SamplingParams(max_tokens=tokens))
            ]
            print(f"{len(texts)}/{len(requests)} answers", file=sys.stderr)
        return texts

    return answer


def _percent(values: Sequence[int]) -> float:
    return round(100 * float(np.mean(values)), 2)


def measure_choices(answer: Answerer, videos: dict[int, Path], most: int | None) -> dict:
    """Percentage of multiple-choice questions answered with the right letter, by kind and over all.

    At most `most` questions a clip are asked; None asks all.
    """
    asked = []
    for seed in videos:
        every = questions(make_clip(seed))
        picks = np.random.default_rng([seed, 4]).permutation(len(every))[:most]
        asked += [(seed, every[int(k)]) for k in picks]
    texts = answer([{"prompt": choice_prompt(q), "video": str(videos[seed])} for seed, q in asked], 12)
    right: dict[str, list[int]] = {}
    for (_, question), text in zip(asked, texts, strict=True):
        right.setdefault(question.task, []).append(int(chosen_letter(text) == "ABCD"[question.correct]))
    every = [value for values in right.values() for value in values]
    kinds = {task: _percent(values) for task, values in sorted(right.items())}
    return {"all": _percent(every), "questions": len(every), **kinds}


def measure_captions(answer: Answerer, videos: dict[int, Path]) -> dict:
    """Percentage of facts that captions state correctly, by kind and over all."""
    prompt = plain_prompt("Describe the video.")
    texts = answer([{"prompt": prompt, "video": str(path)} for path in videos.values()], 64)
    totals: dict[str, np.ndarray] = {}
    for seed, text in zip(videos, texts, strict=True):
        for kind, pair in score_caption(text, facts(make_clip(seed))).items():
            totals[kind] = totals.get(kind, np.zeros(2, int)) + np.array(pair)
    right, asked = sum(totals.values())
    kinds = {kind: round(100 * int(pair[0]) / int(pair[1]), 2) for kind, pair in totals.items()}
    return {"all": round(100 * int(right) / int(asked), 2), "facts": int(asked), **kinds}


def measure_directions(answer: Answerer, videos: dict[int, Path]) -> dict:
    """Percentage of correct answers about direction, with the frames in order and shuffled."""
    rng = np.random.default_rng(0)
    requests: dict[str, list[dict]] = {"ordered": [], "shuffled": []}
    truth = []
    for seed, path in videos.items():
        asked = [question for question in questions(make_clip(seed)) if question.task == "direction"]
        if not asked:
            continue
        frames = read_frames(path)
        frames = frames[sample_indices(len(frames))]
        for question in asked:
            truth.append("ABCD"[question.correct])
            for name, order in (("ordered", np.arange(len(frames))), ("shuffled", rng.permutation(len(frames)))):
                requests[name].append({"prompt": choice_prompt(question), "frames": frames[order]})
    report: dict = {"questions": len(truth)}
    for name, part in requests.items():
        letters = [chosen_letter(text) for text in answer(part, 12)]
        report[name] = _percent([int(a == b) for a, b in zip(letters, truth, strict=True)])
    return report


def evaluate(answer: Answerer, count: int, seed: int, most: int | None = None) -> dict:
    """Renders `count` clips from `seed` on and measures all three accuracies.

    At most `most` multiple-choice questions a clip are asked; None asks all.
    """
    with tempfile.TemporaryDirectory() as folder:
        videos = {number: Path(folder) / f"{number}.mp4" for number in range(seed, seed + count)}
        for number, path in videos.items():
            clip = make_clip(number)
            write_video(path, render(clip), clip.fps, clip.crf)
        return {
            "clips": count,
            "choice": measure_choices(answer, videos, most),
            "caption": measure_captions(answer, videos),
            "direction": measure_directions(answer, videos),
        }


def main() -> None:
    """Runs the command line, which the docstring of this file describes."""
    here = Path(__file__).resolve().parent
    parser = Parser(
        prog="python examples/evaluate_tiny_pllava.py", description="Measure the tiny checkpoint on held-out clips."
    )
    parser.add_argument("--model", default=str(here / "tiny_pllava"), help="folder of the checkpoint")
    parser.add_argument("--count", type=int, default=200, help="number of clips")
    parser.add_argument("--seed", type=int, default=900000, help="seed of the first clip")
    parser.add_argument("--questions", type=int, help="most multiple-choice questions per clip; default: all, about 9")
    parser.add_argument("--batch", type=int, default=64, help="requests handed over at a time")
    parser.add_argument("--reference", action="store_true", help="answer with transformers instead of atb_pllava")
    options = parser.parse_args()
    if options.reference:
        require_packages("transformers")
        from tiny_reference import reference

        answer = reference(Path(options.model))
    else:
        answer = product(options.model, options.batch)
    print(json.dumps(evaluate(answer, options.count, options.seed, options.questions), indent=1))


if __name__ == "__main__":
    main()
