"""The judge's prompts. The words are ours. The criteria and the form of the reply are the published ones.

A verdict is {"pred": "yes" or "no", "score": 0 to 5} for short answers and {"score": 0 to 5} for each aspect of
VCGBench. Scores from other prompts or from another judge are not comparable with published scores.
"""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """The criteria, and whether the verdict has a yes or no besides its score."""

    criteria: str
    has_pred: bool = False

    @property
    def system(self) -> str:
        """The system message."""
        return (
            "You grade what an assistant says about a video. You do not see the video: you are given a question, the "
            f"correct answer and the assistant's. {self.criteria} Other words for the same thing are as good."
        )

    @property
    def contract(self) -> str:
        """The wanted form of the reply, at the end of the user's message."""
        form = '{"pred": "yes", "score": 4}' if self.has_pred else '{"score": 4}'
        pred = "whether the answer is right as 'pred', 'yes' or 'no', and " if self.has_pred else ""
        return (
            f"Reply with {pred}a whole number from 0 (worst) to 5 (best) as 'score', as one Python dictionary and "
            f"nothing else. For example: {form}"
        )


@dataclass(frozen=True)
class Case:
    """One case to judge: a prompt, and the texts that it is about, by their headings."""

    prompt: Prompt
    fields: Mapping[str, str]

    def messages(self) -> list[dict[str, str]]:
        """The chat that asks for a verdict."""
        texts = "\n".join(f"{heading}: {value}" for heading, value in self.fields.items())
        return [
            {"role": "system", "content": self.prompt.system},
            {"role": "user", "content": f"{texts}\n\n{self.prompt.contract}"},
        ]

    def verdict(self, reply: str) -> dict[str, Any] | None:
        """The verdict in a reply, also inside a sentence or a code block. None when the reply has none."""
        for found in re.findall(r"\{[^{}]*\}", reply):
            said = _dictionary(found)
            score = said.get("score")
            pred = str(said.get("pred")).lower()
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 5:
                continue
            if not self.prompt.has_pred:
                return {"score": score}
            if pred in ("yes", "no"):
                return {"pred": pred, "score": score}
        return None


def _dictionary(text: str) -> dict[str, Any]:
    """A dictionary written in Python or JSON. Empty for other text."""
    for read in (ast.literal_eval, json.loads):
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}


ANSWER = Prompt("Decide whether the assistant's answer means what the correct one does, and how well it fits.", True)
CORRECTNESS = Prompt(
    "Score how far the assistant's answer agrees with the facts of the correct one: nothing wrong, nothing misread."
)
DETAIL = Prompt(
    "Score how detailed the assistant's answer is against the correct one: no main point left out, and said in "
    "particular rather than in general."
)
CONTEXT = Prompt(
    "Score how well the assistant's answer catches what the video is about as the correct one tells it: its themes "
    "and mood, and nothing that does not belong there."
)
TEMPORAL = Prompt(
    "Score how well the assistant's answer keeps the order of events of the correct one; another wording may not "
    "change what comes first and what later."
)
CONSISTENCY = Prompt(
    "You are given two questions with the same meaning, one correct answer and the assistant's two answers. Score how "
    "well the two answers agree with each other and with the correct one, without contradicting it."
)
