"""Reads msModelSlim's quant_model_description.json: which tensors of a quantised directory are int8 weights.

The file is one JSON object with the type of every tensor ("FLOAT" or "W8A16") and a few fields about the directory.
msModelSlim has two names for the file, and both are read. The types are compared with the headers here. The values of
tensors are checked during loading. `checkpoint.py` has the names of msModelSlim's weight files.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atb_pllava.errors import ConfigError
from atb_pllava.files import read_config_json
from atb_pllava.loader.checkpoint import FLOAT_DTYPES, INT8, StoredTensor, canonical_name
from atb_pllava.loader.problems import CheckpointError, Problem
from atb_pllava.ops.int8 import GROUP_SIZES, QuantConfig

DESCRIPTION = "quant_model_description.json"  # msModelSlim's "ascendV1"
DESCRIPTIONS = (DESCRIPTION, "quant_model_description_w8a16.json")
QUANT_TYPE = "W8A16"
FLOAT = "FLOAT"
VERSION = "1.0.0"


def describe(int8: Iterable[str], others: Iterable[str], group_size: int) -> dict[str, Any]:
    """The contents of quant_model_description.json.

    int8: the names of the int8 weights, their scales and their zero points. others: the names of all other tensors.
    """
    types = {**dict.fromkeys(others, FLOAT), **dict.fromkeys(int8, QUANT_TYPE)}
    return {"version": VERSION, "model_quant_type": QUANT_TYPE, "group_size": group_size, **dict(sorted(types.items()))}


def scale_and_zero_names(name: str) -> tuple[str, str]:
    """The names of the scale and the zero point of an int8 weight: `x.weight_scale` and `x.weight_offset`."""
    return name + "_scale", name + "_offset"


def read_description(path: Path, stored: Sequence[StoredTensor]) -> tuple[QuantConfig, list[Problem]]:
    """The int8 weights of a directory, from its quant_model_description.json, and the problems with that file.

    A directory without the file has no int8 weights. Raises CheckpointError at once if the file cannot be read, because
    otherwise the report would also list every int8 tensor.
    """
    files = [path / name for name in DESCRIPTIONS if os.path.lexists(path / name)]
    if not files:
        return QuantConfig(), []
    try:
        raw = read_config_json(files[0])
    except ConfigError as error:
        raise CheckpointError(str(path), [Problem("quant", str(files[0]), str(error))]) from None
    # The name of every tensor has a dot, and no other field's name has one.
    types = {canonical_name(key): value for key, value in raw.items() if "." in key}
    fields = {key: value for key, value in raw.items() if "." not in key}
    problems = [*_check_fields(files[0], fields)]
    problems += _compare(files[0], types, {canonical_name(t.key): t for t in stored})
    if len(files) > 1:
        problems.append(Problem("quant", str(path), f"has both {' and '.join(DESCRIPTIONS)}; one of them is stale"))
    names = {name for name, kind in types.items() if kind == QUANT_TYPE and name.endswith(".weight")}
    group_size = raw.get("group_size") or 0
    return QuantConfig(frozenset(names), group_size if group_size in GROUP_SIZES else 0), problems


def _check_fields(file: Path, fields: Mapping[str, Any]) -> Iterator[Problem]:
    """A problem for each field with an unsupported value. An unknown field must be empty or false."""
    if fields.get("model_quant_type") != QUANT_TYPE:
        detail = f"model_quant_type is {fields.get('model_quant_type')!r}; only {QUANT_TYPE!r} is supported"
        yield Problem("quant", str(file), detail)
    group_size = fields.get("group_size") or 0
    if isinstance(group_size, bool) or group_size not in GROUP_SIZES:
        detail = f"group_size is {group_size!r}; it must be one of {', '.join(map(str, GROUP_SIZES))}"
        yield Problem("quant", str(file), detail)
    for key, value in fields.items():
        if key not in ("model_quant_type", "group_size", "version", "metadata") and value:
            yield Problem("quant", str(file), f"{key} is {value!r}, which is not supported")


def _compare(file: Path, types: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[Problem]:
    """A problem for each difference between the types in the description `file` and the headers of the tensors."""
    for name in types.keys() - tensors.keys():
        yield Problem("quant", name, f"{types[name]} in {file.name}, but no file holds it")
    for name in tensors.keys() - types.keys():
        yield Problem("quant", name, f"in {tensors[name].file.name}, but not in {file.name}")
    for name in types.keys() & tensors.keys():
        kind = types[name]
        tensor = tensors[name]
        if kind not in (FLOAT, QUANT_TYPE):
            yield Problem("quant", name, f"{kind!r} in {file.name}; only {FLOAT} and {QUANT_TYPE} are supported")
        elif kind == FLOAT and tensor.dtype not in FLOAT_DTYPES:
            yield Problem("quant", name, f"{FLOAT} in {file.name}, {tensor.dtype} in {tensor.file.name}")
        elif kind == QUANT_TYPE:
            yield from _check_int8(file, name, types, tensors)


def _check_int8(
    file: Path, name: str, types: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[Problem]:
    """The problems of one W8A16 tensor: an int8 weight without scale or zero point, or a scale without its weight."""
    if name.endswith(".weight"):
        if tensors[name].dtype != INT8:
            yield Problem("quant", name, f"{QUANT_TYPE} in {file.name}, {tensors[name].dtype} in its file")
        for needed in scale_and_zero_names(name):
            if types.get(needed) != QUANT_TYPE:
                yield Problem("quant", needed, f"is not {QUANT_TYPE} in {file.name}, its weight is")
        return
    weight = name.removesuffix("_scale").removesuffix("_offset")
    if weight == name or types.get(weight) != QUANT_TYPE:
        yield Problem("quant", name, f"{QUANT_TYPE} in {file.name}, but belongs to no {QUANT_TYPE} weight")
