"""The chat page in a real browser: answers are those of LLM, errors are shown, answers can be stopped."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from atb_pllava import LLM
from tests.server.running_server import RunningServer
from tests.support import ROOT, raw_config, write_checkpoint
from tests.ui.browser import Browser, open_browser
from tests.ui.prefix_proxy import prefix_proxy

pytest.importorskip("gradio")
CLIP = ROOT / "examples" / "videos" / "red_circle_moves_left.mp4"
OTHER = ROOT / "examples" / "videos" / "yellow_square_turns_purple.mp4"
KEY = "a-key"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page_server(browser: Browser) -> Iterator[RunningServer]:
    with RunningServer("--ui") as server:
        yield server


def open_page(browser: Browser, url: str) -> None:
    browser.driver.get(f"{url}/ui/")
    browser.wait(lambda: "tokens" in browser.find("#about_model").text)


def upload(browser: Browser, path: Path) -> None:
    browser.find("#video input[type=file]").send_keys(str(path))


def ask(browser: Browser, question: str) -> str:
    """Type a question and return the answer that the page shows."""
    before = len(bubbles(browser))
    browser.find("#question textarea").send_keys(f"{question}\n")
    browser.wait(lambda: len(bubbles(browser)) == before + 2 and bubbles(browser)[-1].endswith("."))
    return bubbles(browser)[-1]


def bubbles(browser: Browser) -> list[str]:
    """The lines of the chat. The page holds each one twice, one of them for screen readers."""
    return browser.texts("#chat .bubble-wrap .message-content") or browser.texts("#chat .message.panel-full-width")


def turn(role: str, text: str, *videos: Path) -> dict[str, Any]:
    parts: list[dict[str, str]] = [{"video": str(path)} for path in videos]
    return {"role": role, "content": [*parts, {"text": text}] if videos else text}


def test_answers_are_those_of_llm(browser: Browser, page_server: RunningServer) -> None:
    """A question, a second one about the same video, and one about a second video, in one conversation."""
    open_page(browser, page_server.url)
    upload(browser, CLIP)
    browser.wait(lambda: len(browser.texts("#frames .caption-label")) == 16)
    assert browser.texts("#frames .caption-label")[:2] == ["0.00 s", "0.20 s"]
    assert browser.find("#about_video").text == "16 of 25 frames, 160x120 pixels, 2.5 s"
    questions = ["What color is the circle?", "Where does it move?", "What shape is in the second video?"]
    shown = [ask(browser, question) for question in questions[:2]]
    browser.find("#video button[aria-label=Clear]").click()
    browser.wait(lambda: not browser.texts("#frames .caption-label"))
    upload(browser, OTHER)
    browser.wait(lambda: len(browser.texts("#frames .caption-label")) == 16)
    shown.append(ask(browser, questions[2]))
    messages: list[dict[str, Any]] = []
    with LLM(ROOT / "examples" / "tiny_pllava") as llm:
        for question, videos in zip(questions, [(CLIP,), (), (OTHER,)], strict=True):
            messages.append(turn("user", question, *videos))
            (answer,) = llm.generate({"messages": messages}, max_tokens=200)
            messages.append(turn("assistant", answer.text))
    assert shown == [message["content"] for message in messages[1::2]]


def test_a_file_that_is_no_video_is_an_error_on_the_page(
    browser: Browser, page_server: RunningServer, tmp_path: Path
) -> None:
    broken = tmp_path / "notes.mp4"
    broken.write_text("no video at all")
    open_page(browser, page_server.url)
    upload(browser, broken)
    message = browser.wait(lambda: " ".join(browser.texts(".toast-wrap .toast-body")))
    assert "video" in message and str(tmp_path) not in message and "Traceback" not in message
    browser.find("#question textarea").send_keys("\n")
    browser.wait(lambda: "Write a question first." in " ".join(browser.texts(".toast-wrap .toast-body")))


@pytest.mark.parametrize("width", [400, 768, 1280])
def test_nothing_is_wider_than_the_window(browser: Browser, page_server: RunningServer, width: int) -> None:
    browser.set_width(width)
    try:
        open_page(browser, page_server.url)
        upload(browser, CLIP)
        browser.wait(lambda: len(browser.texts("#frames .caption-label")) == 16)
        assert browser.overflow == 0
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_loads_nothing_from_other_hosts(browser: Browser, page_server: RunningServer) -> None:
    open_page(browser, page_server.url)
    upload(browser, CLIP)
    browser.wait(lambda: len(browser.texts("#frames .caption-label")) == 16)
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    loaded = browser.driver.execute_script(script)
    assert loaded and all(url.startswith((f"{page_server.url}/", "data:", "blob:")) for url in loaded)


def test_a_key_is_asked_for_and_a_prefix_is_kept(browser: Browser) -> None:
    """Behind a proxy under /pllava, with an API key: the page asks for it, and then answers."""
    environment = {**os.environ, "ATB_PLLAVA_API_KEY": KEY}
    with RunningServer("--ui", "--root_path", "/pllava", env=environment) as server:
        target = server.url.removesuffix("/pllava")
        with prefix_proxy(target, "/pllava") as url:
            browser.driver.get(f"{url}/ui/")
            browser.wait(lambda: browser.find("input[type=password]"))
            log_in(browser, "wrong")
            browser.wait(lambda: "Incorrect" in browser.find("body").text)
            log_in(browser, KEY)
            browser.wait(lambda: "tokens" in browser.find("#about_model").text)
            upload(browser, CLIP)
            browser.wait(lambda: len(browser.texts("#frames .caption-label")) == 16)
            assert ask(browser, "What color is the circle?") == "The circle is red."
            browser.driver.get("about:blank")
        assert httpx.get(f"{target}/v1/models").status_code == 401


def test_stop_ends_the_answer_and_the_request(browser: Browser, tmp_path: Path) -> None:
    """A model with random weights writes up to 1024 tokens. After Stop, the engine has nothing to do."""
    checkpoint = write_checkpoint(tmp_path / "model", raw_config())
    with RunningServer("--ui", "--model_path", checkpoint, "--max_output_length", "1000") as server:
        open_page(browser, server.url)
        browser.find("#settings button").click()
        browser.find("#question textarea").send_keys("Tell me a long story.\n")
        browser.wait(lambda: bubbles(browser)[-1:] and len(bubbles(browser)) == 2)
        browser.find("#stop").click()
        browser.wait(lambda: running_requests(server.url) == 0)
        browser.driver.get("about:blank")


def log_in(browser: Browser, key: str) -> None:
    browser.find("input[type=text]").send_keys("me")
    browser.find("input[type=password]").send_keys(f"{key}\n")


def running_requests(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    line = next(line for line in lines if line.startswith("vllm:num_requests_running{"))
    return float(line.split()[-1])
