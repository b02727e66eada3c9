"""The two forms of a multiple-choice question: text, conversation, answer prefix and stop string.

"mvbench" is the form of PLLaVA's own multiple-choice evaluation. Each option has its own line, in the eval_mvbench
conversation. The answer begins with "Best option:(" and stops at the next parenthesis, so it is a letter.

"videobench" is the form of Video-Bench and of MindIE's scripts. The options are in one line, followed by a request for
the letter, in the model's usual conversation. The answer is free text.
"""

from dataclasses import dataclass

from precision.videobench.dataset import Question

_NUMBERS = ("one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class PromptFormat:
    """A form of questions. Conversation None is the model's usual one. `chatml_conversation` is for the 34B model."""

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
    """The question with its options. `answer_request` (None: LETTER_ONLY) ends the "videobench" form only."""
    if prompt_format == "mvbench":
        lines = "".join(f"({letter}) {text}\n" for letter, text in question.choices.items())
        return f"Question: {question.text}\nOptions:\n{lines}Only give the best option."
    options = " ".join(f"{letter}.{text}" for letter, text in question.choices.items())
    number = _NUMBERS[len(question.choices) - 1]
    letters = ", ".join(question.choices)
    # The wording of Video-Bench's README. Results are comparable only with this wording.
    last = f"Among the {number} options {letters} above, the one closest to the correct answer is:"
    return f"{question.text} {options} \n {last} {LETTER_ONLY if answer_request is None else answer_request}".strip()
