"""Compares the headers of a checkpoint with the tensors a model needs. Each function finds problems of one kind."""

import re
from collections.abc import Iterator, Mapping, Sequence

from atb_pllava.loader.checkpoint import FLOAT_DTYPES, INT8, StoredTensor, WeightDir, lora_target
from atb_pllava.loader.problems import Problem
from atb_pllava.loader.quant_description import DESCRIPTION, scale_and_zero_names
from atb_pllava.loader.tensor_values import read_tensor

LORA_TARGET = re.compile(r"language_model\..*(_proj|lm_head)\.weight")

Shapes = Mapping[str, Sequence[int]]
Tensors = Mapping[str, StoredTensor]
LoraPairs = dict[str, tuple[StoredTensor, StoredTensor]]


def compare_names(weights: Tensors, shapes: Shapes) -> Iterator[Problem]:
    """Problems: tensors that the checkpoint lacks, and tensors of the checkpoint that the model does not have."""
    for name in shapes.keys() - weights.keys():
        yield Problem("missing", name, f"{list(shapes[name])} is needed")
    for name in weights.keys() - shapes.keys():
        tensor = weights[name]
        yield Problem("unexpected", name, f"{list(tensor.shape)} in {tensor.file}")


def compare_shapes(weights: Tensors, shapes: Shapes) -> Iterator[Problem]:
    """Problems: tensors whose shape differs from the model's."""
    for name in weights.keys() & shapes.keys():
        tensor = weights[name]
        if not fits(tensor.shape, shapes[name]):
            detail = f"{list(tensor.shape)} in {tensor.file}, {list(shapes[name])} is needed"
            yield Problem("shape", name, detail)


def check_dtypes(tensors: Tensors, shapes: Shapes) -> Iterator[Problem]:
    """Problems: unsupported dtypes. A weight with scales must be int8, and every other tensor float."""
    for name, tensor in tensors.items():
        scale_name, _ = scale_and_zero_names(name)
        is_int8 = name in shapes and scale_name in shapes
        if tensor.dtype not in ((INT8,) if is_int8 else FLOAT_DTYPES):
            why = f"; int8 is for what {DESCRIPTION} names, in the decoder's layers" if tensor.dtype == INT8 else ""
            yield Problem("dtype", name, f"{tensor.dtype} in {tensor.file}{why}")


def fits(stored: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether the shapes are equal. One scale a row may also be stored as [n] instead of [n, 1]."""
    is_column = len(wanted) == 2 and wanted[1] == 1
    return tuple(stored) == tuple(wanted) or (is_column and tuple(stored) == (wanted[0],))


def check_zero(biases: Tensors) -> Iterator[Problem]:
    """Problems: biases of norms that are not 0. LLaMA's norms have no bias. The values are read from the files."""
    for name, tensor in biases.items():
        if tensor.dtype not in FLOAT_DTYPES or bool(read_tensor(tensor).any()):
            yield Problem("value", name, f"is not 0 in {tensor.file}; LLaMA's norms have no bias")


def pair_loras(loras: Tensors, shapes: Shapes) -> tuple[LoraPairs, list[Problem]]:
    """The pair lora_A [r, in], lora_B [out, r] for each weight name, and the problems with LoRA tensors."""
    pairs: LoraPairs = {}
    problems = []
    for target in sorted({lora_target(name) for name in loras}):
        stem = target.removesuffix("weight")
        a = loras.get(stem + "lora_A.weight")
        b = loras.get(stem + "lora_B.weight")
        wrong = _why_not_a_pair(target, a, b, shapes)
        if wrong:
            problems.append(Problem("lora", target, wrong))
        else:
            assert a is not None and b is not None
            pairs[target] = (a, b)
    ranks = sorted({a.shape[0] for a, _ in pairs.values()})
    if len(ranks) > 1:
        problems.append(Problem("lora", "rank", f"differs between layers: {ranks}; one alpha / r cannot serve all"))
    return pairs, problems


def _why_not_a_pair(target: str, a: StoredTensor | None, b: StoredTensor | None, shapes: Shapes) -> str | None:
    """The reason why lora_A and lora_B cannot be merged into the weight `target`. None if they can."""
    if target not in shapes:
        return "LoRA for a tensor this model does not have"
    if not LORA_TARGET.fullmatch(target):
        return "LoRA for something that is no linear layer of the language model"
    if a is None or b is None:
        return f"lora_{'A' if a is None else 'B'} is missing"
    if not _makes_weight(a.shape, b.shape, shapes[target]):
        return f"lora_B {list(b.shape)} @ lora_A {list(a.shape)} does not make {list(shapes[target])}, in {a.file}"
    return None


def _makes_weight(a: Sequence[int], b: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether the shapes a [r, in] and b [out, r] fit a weight [out, in], with r of at least 1."""
    return len(a) == len(b) == 2 and a[0] == b[1] >= 1 and [b[0], a[1]] == list(weight)


def check_directories(base: WeightDir, delta: WeightDir | None) -> Iterator[Problem]:
    """The problems of each directory, and of meaningless combinations: two LoRAs, or int8 weights with a LoRA."""
    yield from base.problems
    if delta is not None:
        yield from delta.problems
        yield from _check_single_lora(base, delta)
    for directory in (base, delta):
        if directory and directory.int8.names and (delta or directory.lora_targets):
            # A LoRA is merged before the weights are rounded to int8.
            yield Problem("quant", str(directory.path), "is quantised; it takes neither LoRA nor a --weight_dir")


def _check_single_lora(base: WeightDir, delta: WeightDir) -> Iterator[Problem]:
    """A problem if both directories have LoRA, or if `delta` replaces weights below the LoRA of `base`."""
    trained_on = base.lora_targets
    if trained_on and (delta.lora_targets or trained_on & delta.tensors.keys()):
        detail = f"holds LoRA already, and {delta.path} brings its own LoRA or the weights below it; name one"
        yield Problem("lora", str(base.path), f"double LoRA: this directory {detail}")
