"""The problems of a checkpoint: Problem, its kinds, and CheckpointError, which reports all problems at once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from atb_pllava.errors import WeightError

NAMES_PER_GROUP = 20  # problems of one kind that are listed. The others are counted

# Each kind of problem has a heading in the report, and a remedy. The report has the kinds in this order.
KINDS = {
    "file": ("files", "download the directory again, and check that --model_path and --weight_dir name the right ones"),
    "quant": (
        "quantisation",
        "a quantised directory is converted as a whole: convert the float checkpoint again, LoRA included, with "
        "convert_quant_weights.sh into a directory of its own",
    ),
    "missing": (
        "missing tensors",
        "config.json and the weights must be of one model; a directory with LoRA and projector only is a --weight_dir "
        "and needs its base model as --model_path",
    ),
    "unexpected": (
        "unexpected tensors",
        "the checkpoint holds more than PLLaVA reads: check that config.json belongs to it",
    ),
    "duplicate": ("tensors stored twice", "remove one of the two files or names"),
    "shape": ("wrong shapes", "config.json, base model and --weight_dir must be of the same model size"),
    "dtype": ("unsupported types", "save these tensors as one of F32, F16, BF16"),
    "value": (
        "unusable values",
        "the file is damaged or the training diverged: compare checksums, download again; where float16 is too narrow, "
        "run in bfloat16 or float32",
    ),
    "lora": (
        "LoRA",
        "LoRA needs lora_A and lora_B of one rank for linear layers of the language model, and an alpha above zero",
    ),
}


@dataclass(frozen=True, order=True)
class Problem:
    """One problem. kind: a key of KINDS. name: of the tensor or file. detail: the finding."""

    kind: str
    name: str
    detail: str


class CheckpointError(WeightError):
    """A checkpoint that cannot be loaded. `problems` has all problems. The message lists at most 20 of each kind.

    Problems are sorted by kind, name and detail. Equal problems are listed once.
    """

    def __init__(self, where: str, problems: Iterable[Problem]) -> None:
        order = list(KINDS)
        self.problems = tuple(sorted(set(problems), key=lambda problem: (order.index(problem.kind), problem)))
        super().__init__("\n".join(self._lines(where)))

    def _lines(self, where: str) -> Iterator[str]:
        count = len(self.problems)
        yield f"the checkpoint {where} cannot be loaded, {count} problem{'s' if count > 1 else ''}:"
        groups = {kind: [p for p in self.problems if p.kind == kind] for kind in KINDS}
        present = {kind: found for kind, found in groups.items() if found}
        for kind, found in present.items():
            heading, _ = KINDS[kind]
            yield f"{heading} ({len(found)}):"
            yield from (f"  {_printable(p.name)}: {_printable(p.detail)}" for p in found[:NAMES_PER_GROUP])
            if len(found) > NAMES_PER_GROUP:
                yield f"  ... and {len(found) - NAMES_PER_GROUP} more"
        yield "what to do:"
        for kind in present:
            heading, remedy = KINDS[kind]
            yield f"  {heading}: {remedy}"


def raise_if_any(where: str, problems: Sequence[Problem]) -> None:
    """Raises CheckpointError if there is a problem. `where` names the directories in the message."""
    if problems:
        raise CheckpointError(where, problems)


def _printable(text: str) -> str:
    """The text without control characters, at most 403 characters long. Names come from untrusted files."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 400 else text[:400] + "..."
