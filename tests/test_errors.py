"""Each VideoError has a kind: at every place that raises one, and after a way through another process."""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from atb_pllava.errors import VIDEO_ERROR_KINDS, VideoError
from tests.support import ROOT

SOURCES = sorted((ROOT / "atb_pllava").rglob("*.py"))
FORWARDED = {"error.kind", "answer.cause"}  # of a VideoError that is raised again


def calls(source: Path) -> Iterator[ast.Call]:
    """All calls that make a VideoError, also by `partial`."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call):
            names = [ast.unparse(part) for part in (node.func, *node.args[:1])]
            if names[0] in ("VideoError", "lost") or names == ["partial", "VideoError"]:
                yield node


def kind_of(call: ast.Call) -> ast.expr | None:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "kind"]
    return named[0] if named else (call.args[1] if len(call.args) > 1 else None)


def test_every_place_that_makes_a_video_error_names_its_kind() -> None:
    found = [(source, call) for source in SOURCES for call in calls(source)]
    assert len(found) > 40
    for source, call in found:
        kind = kind_of(call)
        assert kind is not None, f"{source}:{call.lineno}"
        words = [node.value for node in ast.walk(kind) if isinstance(node, ast.Constant)]
        is_known = bool(words) and set(words) <= set(VIDEO_ERROR_KINDS)
        assert is_known or ast.unparse(kind) in FORWARDED | {"kind"}, f"{source}:{call.lineno}"


def test_every_kind_is_in_use() -> None:
    constants = {
        node.value
        for source in SOURCES
        if source.name != "errors.py"
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(VIDEO_ERROR_KINDS) <= constants


@pytest.mark.parametrize("kind", VIDEO_ERROR_KINDS)
def test_a_video_error_survives_pickling(kind: str) -> None:
    error = pickle.loads(pickle.dumps(VideoError("a.mp4: cannot be read", kind)))
    assert (str(error), error.kind) == ("a.mp4: cannot be read", kind)


def test_a_video_error_needs_a_known_kind() -> None:
    with pytest.raises(TypeError):
        VideoError("a.mp4")
    with pytest.raises(AssertionError):
        VideoError("a.mp4", "strange")
