"""docs/serving.md and the curl lines of the README: what they show is what a running server does.

tests/test_docs.py holds that README_zh.md shows the same.
"""

import json
import re
import subprocess
import sys
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from atb_pllava.server import media_errors
from atb_pllava.server.api_error import TYPES
from atb_pllava.server.options import ServerOptions
from tests.pages import blocks, complete_lines, fences, text_of
from tests.server.running_server import PATIENCE, RunningServer
from tests.support import ROOT

PAGE = "docs/serving.md"
ADDRESS = "http://127.0.0.1:8000"
# What differs from run to run.
VOLATILE = {"id", "created", "expires_at"}


def curl_commands(name: str) -> list[tuple[str, str | None]]:
    """Each curl command of a page, and the JSON block behind the command's block, if there is one."""
    found: list[tuple[str, str | None]] = []
    shown = fences(name)
    for (language, text), (next_language, next_text) in zip(shown, [*shown[1:], ("", "")], strict=True):
        lines = list(complete_lines(text)) if language == "bash" else []
        curls = [line for line in lines if line.startswith("curl ")]
        found += [(line, None) for line in curls]
        if curls and next_language == "json":
            found[-1] = (curls[-1], next_text)
    return found


def without_volatile(value: Any) -> Any:
    """A JSON value in which what differs from run to run is only its type."""
    if isinstance(value, dict):
        return {name: type(member) if name in VOLATILE else without_volatile(member) for name, member in value.items()}
    return [without_volatile(member) for member in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("name", "count"), [("README.md", 2), (PAGE, 3)])
def test_curl_commands_answer_what_is_shown(name: str, count: int) -> None:
    found = curl_commands(name)
    assert len(found) == count
    with RunningServer() as server:
        for line, shown in found:
            assert ADDRESS in line
            done = subprocess.run(
                ["bash", "-c", line.replace(ADDRESS, server.url)], cwd=ROOT, capture_output=True, timeout=PATIENCE
            )
            said = json.loads(done.stdout)
            if shown is None:
                assert "error" not in said
            else:
                assert without_volatile(said) == without_volatile(json.loads(shown))


def test_python_examples_print_what_is_shown(server: RunningServer) -> None:
    """All examples of the page in one program, as a reader types them one after the other."""
    code = "\n".join(blocks(PAGE, "python")).replace(ADDRESS, server.url)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(blocks(PAGE, "text"))


def test_the_server_says_what_is_shown(server: RunningServer) -> None:
    said = "".join(server.stderr[-2:]).replace(server.url, ADDRESS)
    assert said in blocks(PAGE, "")


def test_the_access_log_has_the_fields_that_are_shown(server: RunningServer) -> None:
    (shown,) = [json.loads(block) for block in blocks(PAGE, "") if block.startswith("{")]
    httpx.get(f"{server.url}/version")
    assert list(json.loads(server.stdout[-1])) == list(shown)


def test_metrics_that_are_named_are_those_of_the_server(server: RunningServer) -> None:
    named = set(re.findall(r"`((?:vllm|pllava):\w+)`", text_of(PAGE)))
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    shown = {f"{one.name}_total" if one.type == "counter" else one.name for one in families}
    assert named == {name for name in shown if ":" in name and not name.endswith("_created")}


def error_rows() -> set[tuple[int, str]]:
    """(status, code) of each code in the table of errors."""
    found = set()
    for statuses, codes in re.findall(r"^\| ([\d, ]+) \| ([^|]+) \|", text_of(PAGE), re.MULTILINE):
        for code in re.findall(r"`(\w+)`", codes):
            found |= {(int(status), code) for status in statuses.split(",")}
    return found


def test_errors_of_media_have_their_rows() -> None:
    known = {(status, code) for code, status in media_errors.SOURCE_STATUS.items()}
    known |= set(media_errors.VIDEO_STATUS.values())
    known |= {(status, code) for status, code, _ in media_errors.REPLACED_TEXT.values()}
    assert known <= error_rows()


def test_codes_of_errors_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "atb_pllava" / "server").rglob("*.py"))
    for status, code in error_rows():
        assert status in TYPES
        assert f'"{code}"' in sources, code


def test_every_option_of_the_server_is_explained() -> None:
    for name in ServerOptions.__dataclass_fields__:
        assert f"--{name}" in text_of(PAGE) or name == "port", name


def test_limits_that_are_shown_are_the_defaults() -> None:
    options = ServerOptions()
    for row in (
        f"| requests that wait | {options.max_waiting}, then 429 |",
        f"| a JSON body | {options.max_body_mib} MiB |",
        f"| frames of a video | {options.max_frames} |",
        f"| registered videos | {options.max_videos_mib} MiB of frames, {options.video_ttl:g} s |",
    ):
        assert row in text_of(PAGE)
