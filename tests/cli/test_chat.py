"""`chat`: questions line by line, commands, and what Ctrl-C does."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from atb_pllava import LLM
from atb_pllava.cli.extras import EXTRAS, import_with_extra
from atb_pllava.cli.server_answerer import ServerAnswerer
from atb_pllava.cli.verbs import main
from atb_pllava.client.api_client import ApiClient
from atb_pllava.errors import ConfigError
from tests.server.running_server import RunningServer
from tests.support import ROOT, run_main

TINY = ROOT / "examples" / "tiny_pllava"
CLIP = ROOT / "examples" / "videos" / "red_circle_moves_left.mp4"
OTHER = ROOT / "examples" / "videos" / "yellow_square_turns_purple.mp4"
QUESTIONS = ["What color is the circle?", "Where does it move?"]


def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: list[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return run_main(capsys, main, "chat", *arguments)


def test_answers_are_those_of_llm(monkeypatch, capsys, tmp_path: Path) -> None:
    """The second question sees the first turn, /reset forgets it, /video asks about another video."""
    saved = tmp_path / "chat.json"
    lines = [*QUESTIONS, f"/save {saved}", "/reset", QUESTIONS[1], f"/video {OTHER}", "What shape is it?"]
    status, out, err = chat(monkeypatch, capsys, lines, CLIP, "--model_path", TINY)
    with LLM(TINY) as llm:
        first = llm.chat(CLIP, QUESTIONS[0]).text
        second = llm.chat(CLIP, QUESTIONS[1], history=[(QUESTIONS[0], first)]).text
        again = llm.chat(CLIP, QUESTIONS[1]).text
        other = llm.chat(OTHER, "What shape is it?").text
    assert (status, out.splitlines()) == (0, [first, second, again, other])
    assert f"{CLIP}: 16 frames" in err and f"{OTHER}: 16 frames" in err
    turns = [{"question": QUESTIONS[0], "answer": first}, {"question": QUESTIONS[1], "answer": second}]
    assert json.loads(saved.read_text()) == {"media": [str(CLIP)], "turns": turns}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "/nothing is no command; there are /video PATH, /reset"),
        ("/video", "write /video PATH"),
        ("/reset now", "write /reset"),
        ("/video 'a", "a quote is not closed"),
        ("/video missing.mp4", "missing.mp4: cannot be opened"),
        ("/save /", "/save '/' cannot be written"),
    ],
)
def test_a_wrong_line_is_one_message_and_the_chat_goes_on(monkeypatch, capsys, line: str, message: str) -> None:
    status, out, err = chat(monkeypatch, capsys, [line, QUESTIONS[0]], CLIP, "--model_path", TINY, "--quiet")
    assert (status, out) == (2, "The circle is red.\n")
    assert err.count("error: ") == 1 and message in err


def test_a_missing_video_ends_the_command(monkeypatch, capsys) -> None:
    status, out, err = chat(monkeypatch, capsys, QUESTIONS, "missing.mp4", "--model_path", TINY)
    assert (status, out) == (2, "") and "error: missing.mp4: cannot be opened" in err


def test_a_server_gives_the_same_answers(monkeypatch, capsys) -> None:
    """The server's own model, a second question, another video. At the end the server has no video any more."""
    lines = [*QUESTIONS, f"/video {OTHER}", "What shape is it?"]
    here = chat(monkeypatch, capsys, lines, CLIP, "--model_path", TINY)
    with RunningServer() as server:
        there = chat(monkeypatch, capsys, lines, CLIP, "--server", server.url, "--max_output_length", 200)
        assert httpx.get(f"{server.url}/v1/videos").json()["data"] == []
    assert there[:2] == here[:2] and len(there[1].splitlines()) == 3
    assert f"asking tiny_pllava at {server.url}" in there[2] and f"{CLIP}: 16 frames" in there[2]


def test_a_video_that_the_server_has_forgotten_is_uploaded_again() -> None:
    with RunningServer() as server, ApiClient(server.url) as client, ServerAnswerer(client, {}, None) as answerer:
        answerer.open([str(CLIP)])
        first = "".join(answerer.ask(QUESTIONS[0], []))
        (video,) = httpx.get(f"{server.url}/v1/videos").json()["data"]
        client.delete_video(video["id"])
        assert "".join(answerer.ask(QUESTIONS[0], [])) == first == "The circle is red."


@pytest.mark.parametrize("option", ["--model_path=x", "--world_size=2", "--max_batch_size=3"])
def test_options_that_a_server_has_decided_are_refused(monkeypatch, capsys, option: str) -> None:
    status, _, err = chat(monkeypatch, capsys, [], "--server", "http://127.0.0.1:9", option)
    name = option.partition("=")[0]
    assert (status, err) == (2, f"error: --server asks a model that is loaded already: leave out {name}\n")


@pytest.mark.parametrize(
    ("url", "message"),
    [("localhost:8000", "it must be a URL such as http://"), ("http://127.0.0.1:9", "cannot be reached")],
)
def test_a_server_that_is_not_there(monkeypatch, capsys, url: str, message: str) -> None:
    status, _, err = chat(monkeypatch, capsys, [], "--server", url)
    assert status == 2 and message in err and err.count("\n") == 1


def test_a_missing_extra_names_the_line_that_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ConfigError, match=f"this needs httpx; install: .* install {' '.join(EXTRAS['serve'])}"):
        import_with_extra("atb_pllava.client.api_client", "serve")


def test_the_extras_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (serve,) = re.findall(r"^serve = \[(.*)\]", text, re.MULTILINE)
    (ui,) = re.findall(r"^ui = \[(.*)\]", text, re.MULTILINE)
    assert re.findall(r'"([a-z_-]+)>=', serve) == list(EXTRAS["serve"])
    assert re.findall(r'"([a-z_]+)(?:>=|\[)', ui) == ["atb_pllava", "gradio"]
    assert EXTRAS["ui"] == (*EXTRAS["serve"], "gradio")
    (tables,) = re.findall(r"^tables = \[(.*)\]", text, re.MULTILINE)
    assert re.findall(r'"([a-z_-]+)>=', tables) == list(EXTRAS["tables"])


def test_ctrl_c_ends_the_answer_and_not_the_chat() -> None:
    """In a terminal: the answer stops, the next question is answered, and Ctrl-D leaves with status 0."""
    leader, follower = pty.openpty()
    words = ["chat", str(CLIP), "--model_path", str(TINY), "--ignore_eos", "--max_output_length", "1500"]
    command = [sys.executable, "-m", "atb_pllava", *words]
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True
    )
    os.close(follower)
    shown = _until(leader, "type /help.\r\n> ")
    os.write(leader, f"{QUESTIONS[0]}\n".encode())
    shown = _until(leader, "The circle is red.")
    process.send_signal(signal.SIGINT)
    shown = _until(leader, "first words after")
    os.write(leader, b"/reset\n")
    shown += _until(leader, "begins anew.\r\n> ")
    os.write(leader, b"\x04")
    assert process.wait(30) == 0
    os.close(leader)
    assert "Traceback" not in shown


def _until(descriptor: int, words: str, seconds: float = 60) -> str:
    """What a terminal shows until the words are there."""
    shown = ""
    deadline = time.monotonic() + seconds
    while words not in shown:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{words!r} was not shown: {shown!r}"
        shown += os.read(descriptor, 65536).decode(errors="replace")
    return shown
