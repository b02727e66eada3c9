"""A multiple-choice question as PLLaVA is asked it: its text, its conversation, how the answer begins and ends.

"mvbench" is the form PLLaVA's own multiple-choice evaluation uses: options on lines of their own in the eval_mvbench
conversation, and an answer that begins with "Best option:(" and is over at the next parenthesis, so that it is a
letter. "videobench" is the form of Video-Bench and of MindIE's scripts: the options in one line with a request for
the letter, in the model's usual conversation; the answer is free text.
"""

from dataclasses import dataclass

from precision.videobench.dataset import Question

_NUMBERS = ("one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class PromptFormat:
    """conversation None is the model's usual one; the second name is for 34B's chat format."""

    conversation: str | None = None
    chatml_conversation: str | None = None
    answer_prefix: str | None = None
    stop: tuple[str, ...] = ()


FORMATS = {
    "mvbench": PromptFormat("eval_mvbench", "eval_mvbench_llavanext", "Best option:(", (")",)),
    "videobench": PromptFormat(),
}
LETTER_ONLY = "Answer with the letter of the option alone and explain nothing."


def question_text(question: Question, prompt_format: str, answer_request: str | None) -> str:
    """The question with its options; `answer_request` (None: LETTER_ONLY) ends the "videobench" form only."""
    if prompt_format == "mvbench":
        lines = "".join(f"({letter}) {text}\n" for letter, text in question.choices.items())
        return f"Question: {question.text}\nOptions:\n{lines}Only give the best option."
    options = " ".join(f"{letter}.{text}" for letter, text in question.choices.items())
    number = _NUMBERS[len(question.choices) - 1]
    letters = ", ".join(question.choices)
    # The benchmark's protocol (README of Video-Bench): results are comparable only with these words.
    last = f"Among the {number} options {letters} above, the one closest to the correct answer is:"
    return f"{question.text} {options} \n {last} {LETTER_ONLY if answer_request is None else answer_request}".strip()
