"""Whether an answer to a multiple-choice question is right, by the rule of PLLaVA's tasks/eval/mvbench."""

_LETTERS_OF_AN_ANSWER = frozenset("abcdefg")


def is_right(pred: str, truth: str) -> bool:
    """Whether a prediction counts as right: the original's `check_ans`.

    Only the first word of each side counts, in lower case. The prediction's word must have a letter from a to g.
    Without its dots it must be part of the right option "(x)", or the right option must be part of it.
    """
    said = pred.lower().split(" ")[0]
    option = truth.lower().split(" ")[0]
    if _LETTERS_OF_AN_ANSWER.isdisjoint(said):
        return False
    return said.replace(".", "") in option or option in said
