"""Members of large JSON files: the values of json.loads, and the places of their bytes."""

import io
import json
import random
from typing import Any

import pytest

from atb_pllava.errors import ConfigError
from atb_pllava.ui import json_members as module
from atb_pllava.ui.json_members import Member, json_members


def members(content: bytes) -> list[Member]:
    return list(json_members(io.BytesIO(content), "a.json", "nested"))


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 0:
        return rng.choice([None, True, False, 0, -12, 3.25, 1e300, 12345678901234567890])
    if kind < 5:
        return "".join(rng.choices('ab"\\\n\t {}[]:,é漢😀\u2028\ud800', k=rng.randrange(12)))
    if kind == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(random_value(rng, 9)): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_members_are_those_of_json_loads(monkeypatch, seed: int, chunk: int) -> None:
    """Objects and lists of random values, with each style of blanks, whatever is read at a time."""
    monkeypatch.setattr(module, "_CHUNK", chunk)
    rng = random.Random(seed)
    values = [random_value(rng) for _ in range(rng.randrange(8))]
    whole: Any = {f"{number} {'é' * number}": value for number, value in enumerate(values)} if seed % 2 else values
    ascii_only = any("\ud800" in json.dumps(value, ensure_ascii=False) for value in values) or seed % 3 == 0
    text = json.dumps(whole, ensure_ascii=ascii_only, indent=rng.choice([None, 1, 4])) + rng.choice(["", "\n", " \r\n"])
    content = (b"\xef\xbb\xbf" if seed % 5 == 0 else b"") + text.encode()
    found = members(content)
    if isinstance(whole, dict):
        assert {member.key: member.value for member in found} == whole and len(found) == len(whole)
        for member in found:
            assert json.loads(b"{%b}" % content[member.start : member.end]) == {member.key: member.value}
    else:
        assert [member.value for member in found] == whole
        assert all(json.loads(content[member.start : member.end]) == member.value for member in found)


def test_a_nested_list_is_entered() -> None:
    content = json.dumps({"counts": {"a": [1, 2]}, "nested": [{"x": 1}, "é"], "after": 3}).encode()
    found = members(content)
    assert [(member.key, member.value) for member in found] == [
        ("counts", {"a": [1, 2]}),
        (None, {"x": 1}),
        (None, "é"),
        ("after", 3),
    ]
    assert [json.loads(content[member.start : member.end]) for member in found[1:3]] == [{"x": 1}, "é"]


@pytest.mark.parametrize(
    "content",
    [b"", b"  ", b"3", b'"a"', b"[1, 2", b"[1 2]", b"[1,]", b"[,1]", b'{"a": 1,}', b'{"a" 1}', b"{1: 2}", b'{"a"', b"{"]
    + [
        b"[1] [2]",
        b"[1]x",
        b"[\xff]",
        b'["\xc3"]',
        b"[" * 100_000,
        b"[nope]",
        b'{"nested": [1}',
        "[1]".encode("utf-16"),
    ],
)
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(ConfigError, match="^a.json is not valid JSON: at byte "):
        members(content)


def test_a_value_without_an_end_is_not_read_for_ever(monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 10)
    monkeypatch.setattr(module, "_LARGEST_MEMBER", 100)
    with pytest.raises(ConfigError, match="a value has more than"):
        members(b'["' + b"x" * 10_000 + b'"]')
