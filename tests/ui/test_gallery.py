"""The results gallery in a real browser, and what its server gives to others."""

import http.client
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from atb_pllava.batch.result_key import Key
from atb_pllava.cli.gallery import _files
from atb_pllava.cli.verbs import main
from atb_pllava.errors import ConfigError
from atb_pllava.files import write_json
from precision.evaluate.mvbench import MVBench
from tests.support import EXAMPLES, begun_log, run_main
from tests.ui.browser import Browser, open_browser
from tests.ui.running_gallery import RunningGallery, running_gallery

pytest.importorskip("gradio")
CLIPS = sorted((EXAMPLES / "videos").glob("*.mp4"))
WIDE = 1280
# What a caption must not do to the page: run as HTML, as a template, as Markdown.
HOSTILE = "<img src=x onerror='window.owned=1'> <script>window.owned=1</script> ${1+1} {{value}} **bold** &lt;b&gt;"
RARE = "the only heron"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[Path]:
    """A caption log of 25 rows, and a predict file about 24 of them with one other answer."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "secret.mp4").write_bytes(CLIPS[0].read_bytes())
    (folder / "notes.txt").write_text("private")
    log = folder / "captions.jsonl"
    texts = {}
    with begun_log(log, {"prompts": {"1": "Describe the video."}}) as file:
        for number in range(25):
            clip = CLIPS[number % 4]
            place = folder / f"{number:02}.mp4"
            place.symlink_to(clip)
            row: dict[str, Any] = {"path": f"{number:02}.mp4", "prompt": "1", "text": f"text {number}", "flags": []}
            if number == 3:
                row["text"] = HOSTILE
            if number == 12:
                row = {"path": "12.mp4", "prompt": "1", "error": f"{HOSTILE} broken", "kind": "corrupt"}
            if number == 17:
                row |= {"text": RARE, "flags": ["loops"], "start_seconds": 1, "end_seconds": 1.5}
            file.add(Key(f"{number:02}", 1, 1, str(place)), row)
            if number != 20:
                texts[str(place)] = row.get("text", "")
    texts[str(folder / "05.mp4")] = "another text"
    write_json(folder / "predict_result.json", texts)
    return [log, folder / "predict_result.json"]


@pytest.fixture(scope="module")
def gallery(results: list[Path]) -> Iterator[RunningGallery]:
    with running_gallery(*results) as running:
        yield running


def open_page(browser: Browser, gallery: RunningGallery) -> None:
    browser.driver.get(gallery.url)
    browser.wait(lambda: ids(browser))


def ids(browser: Browser) -> list[str]:
    """The ids of the rows on the page."""
    return browser.texts("#rows .result .id")


def place(browser: Browser) -> str:
    return browser.texts("#place")[0]


def choose(browser: Browser, name: str) -> None:
    """Choose a filter, and wait for its first page."""
    browser.find("#filter input").click()
    (option,) = browser.wait(
        lambda: [o for o in browser.driver.find_elements("css selector", "[role=option]") if o.text.startswith(name)]
    )
    option.click()


def search(browser: Browser, words: str) -> None:
    from selenium.webdriver.common.keys import Keys

    box = browser.find("#search input, #search textarea")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.BACKSPACE, f"{words}\n")


# The page


def test_answers_are_side_by_side_with_the_video(browser: Browser, gallery: RunningGallery) -> None:
    open_page(browser, gallery)
    assert ids(browser) == [f"{number:02}" for number in range(10)]
    assert browser.texts("#files tr") == [
        "results\trows\terrors\tright\twrong\tflagged",
        "captions.jsonl\t25\t1\t0\t0\t1",
        "predict_result.json\t24\t0\t0\t0\t0",
    ]
    answers = [" ".join(text.split()) for text in browser.texts("#rows .result:nth-child(6) article")]
    assert answers == ["captions.jsonl Describe the video. text 5", "predict_result.json another text"]
    videos = "[...document.querySelectorAll('#rows video')]"
    browser.driver.execute_script(f"{videos}.slice(0, 4).forEach(v => v.play())")
    lengths = browser.wait(
        lambda: browser.driver.execute_script(
            f"const v = {videos}.map(v => v.duration);return v.length == 10 && v.slice(0, 4).every(d => d > 0) && v"
        )
    )
    assert lengths[:4] == pytest.approx([4.2, 2.458, 2.5, 5.6], abs=0.01)


def test_texts_are_no_html(browser: Browser, gallery: RunningGallery) -> None:
    open_page(browser, gallery)
    assert browser.texts("#rows .result:nth-child(4) .text") == [HOSTILE, HOSTILE]
    search(browser, "broken")
    browser.wait(lambda: ids(browser) == ["12"])
    assert browser.texts("#rows .error") == [f"error (corrupt): {HOSTILE} broken"]
    assert browser.driver.execute_script("return window.owned === undefined")
    assert browser.driver.execute_script("return document.querySelectorAll('#rows b, #rows script').length") == 0


def test_pages_go_forth_and_back(browser: Browser, gallery: RunningGallery) -> None:
    open_page(browser, gallery)
    assert place(browser) == "rows 1 to 10 of 25" and not browser.find("#back").is_enabled()
    for numbers in (range(10, 20), range(20, 25)):
        browser.find("#forth").click()
        browser.wait(lambda numbers=numbers: ids(browser) == [f"{number:02}" for number in numbers])
    browser.wait(lambda: place(browser) == "rows 21 to 25 of 25" and not browser.find("#forth").is_enabled())
    browser.find("#back").click()
    browser.wait(lambda: ids(browser)[:1] == ["10"])
    browser.find("#back").click()
    browser.wait(lambda: ids(browser)[:1] == ["00"])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("errors (1)", ["12"]),
        ("disagreement (2)", ["05", "12"]),
        ("missing (1)", ["20"]),
        ("flag: loops (1)", ["17"]),
    ],
)
def test_filters(browser: Browser, gallery: RunningGallery, name: str, expected: list[str]) -> None:
    open_page(browser, gallery)
    choose(browser, name)
    browser.wait(lambda: ids(browser) == expected)
    browser.wait(
        lambda: (
            place(browser) == f"{len(expected)} row{'s' * (len(expected) > 1)} of this kind among rows 1 to 25 of 25"
        )
    )


def test_search(browser: Browser, gallery: RunningGallery) -> None:
    open_page(browser, gallery)
    search(browser, "HERON")
    browser.wait(lambda: ids(browser) == ["17"])
    assert browser.texts("#rows .mark") == ["loops"]
    assert browser.find("#rows video").get_attribute("src").endswith("/media/0/17#t=1,1.5")
    search(browser, "no such word")
    browser.wait(lambda: browser.texts("#rows") == ["No row is like this."])
    search(browser, "")
    browser.wait(lambda: len(ids(browser)) == 10)


def test_wrong_answers_of_an_evaluation(browser: Browser, tmp_path: Path) -> None:
    """Two folders of the benchmarks' results: one model is wrong about question 1, the other about question 2."""
    for folder, wrong in (("npu", 1), ("gpu", 2)):
        (tmp_path / folder).mkdir()
        rows = [
            {
                "pred": "(A" if number == wrong else "(B) y",
                "gt": "(B) y",
                "task_type": "shapes",
                "video_path": str(CLIPS[0]),
                "question": f"Which one {number}?\n(A) x\n(B) y",
            }
            for number in range(4)
        ]
        MVBench().score(tmp_path / folder, rows)
    with running_gallery(tmp_path / "npu", tmp_path / "gpu") as running:
        open_page(browser, running)
        choose(browser, "wrong (2)")
        browser.wait(lambda: len(ids(browser)) == 2)
        assert browser.texts("#rows .mark") == ["wrong", "right", "right", "wrong"]
        assert browser.texts("#rows h3")[:2] == ["npu/all_results.json", "gpu/all_results.json"]
        first, right = browser.texts("#rows .result:first-child > div:first-child .asked")
        assert first.startswith("Which one 1?") and right == "Right: (B) y"
        browser.driver.get("about:blank")


def test_a_hundred_thousand_rows(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    with path.open("w") as file:
        for number in range(100_000):
            said = {"error": "broken"} if number % 20_000 == 7 else {"text": f"a text about {number}"}
            file.write(json.dumps({"id": f"{number}.mp4", "settings": "x", **said}) + "\n")
    with running_gallery(path) as running:
        open_page(browser, running)
        assert place(browser) == "rows 1 to 10 of 100000"
        choose(browser, "errors (5)")
        browser.wait(lambda: ids(browser) == [f"{number}.mp4" for number in range(7, 100_000, 20_000)])
        choose(browser, "all (100000)")
        browser.wait(lambda: len(ids(browser)) == 10)
        search(browser, "text about 99999")
        browser.wait(lambda: ids(browser) == ["99999.mp4"])
        browser.driver.get("about:blank")


@pytest.mark.parametrize("width", [400, 768, WIDE])
def test_nothing_is_wider_than_the_window(browser: Browser, gallery: RunningGallery, width: int) -> None:
    browser.set_width(width)
    try:
        open_page(browser, gallery)
        assert browser.overflow == 0
        texts = browser.driver.execute_script(
            "return [...document.querySelectorAll('#rows article')].map(e => e.getBoundingClientRect().width)"
        )
        assert min(texts) > 200
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_comes_from_another_host(browser: Browser, gallery: RunningGallery) -> None:
    open_page(browser, gallery)
    loaded = browser.driver.execute_script("return performance.getEntriesByType('resource').map(r => r.name)")
    assert len(loaded) > 5 and all(url.startswith(gallery.url) for url in loaded)


# The server


def answer(url: str, path: str) -> tuple[int, bytes]:
    """Status and body of a GET of exactly this path. Other clients would tidy it."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.putrequest("GET", path, skip_host=False)
        connection.endheaders()
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def server(results: list[Path]) -> Iterator[str]:
    """The URL of a gallery whose results name two media, and files that are none."""
    folder = results[0].parent
    write_json(
        folder / "named.json",
        {
            str(folder / "00.mp4"): "a video",
            str(folder / "notes.txt"): "no medium",
            "/etc/passwd": "no medium",
            str(folder): "a folder",
            str(folder / "gone.mp4"): "not there",
            "http://127.0.0.1:1/a.mp4": "a URL",
            str(folder / "00.mp4") + "\0.mp4": "no path",
        },
    )
    with running_gallery(folder / "named.json") as running:
        yield running.url


def test_a_medium_that_is_named_is_served(server: str) -> None:
    whole = CLIPS[0].read_bytes()
    assert answer(server, "/media/0/0") == (200, whole)
    part = httpx.get(f"{server}/media/0/0", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])
    assert part.headers["content-type"] == "video/mp4" and part.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("row", ["1", "2", "3", "4", "5", "6", "7", "-1", "99999999999999999999"])
def test_a_row_without_a_medium_has_none(server: str, row: str) -> None:
    status, body = answer(server, f"/media/0/{row}")
    assert status == 404 and body == b'{"detail":"no such medium"}'


FOLDER = "FOLDER"


@pytest.mark.parametrize(
    "path",
    [
        "/media/0/../../etc/passwd",
        "/media/0/..%2f..%2fetc%2fpasswd",
        "/media/%2e%2e/%2e%2e/etc/passwd",
        "/media//etc/passwd",
        "/media/0/0/../../../etc/passwd",
        "/media/1/0",
        "/media/-1/0",
        "/media/0x0/0",
        "/../../../../etc/passwd",
        "//etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=FOLDER/secret.mp4",
        "/gradio_api/file=FOLDER/00.mp4",
        "/gradio_api/file=FOLDER/named.json",
        "/gradio_api/file=FOLDER/notes.txt",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file/FOLDER/notes.txt",
        "/gradio_api/file=../pyproject.toml",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/static/../../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd",
    ],
)
def test_no_other_file_is_served(server: str, results: list[Path], path: str) -> None:
    status, body = answer(server, path.replace(FOLDER, str(results[0].parent)))
    assert status in (400, 403, 404, 405, 422), body[:200]
    assert b"root:" not in body and b"private" not in body and b"ftyp" not in body and b"[project]" not in body


def test_a_search_that_names_a_file_does_not_publish_it(results: list[Path]) -> None:
    """gradio copies files that inputs name to where it serves them, unless its check of paths is on."""
    words = {"path": str(results[0].parent / "notes.txt"), "meta": {"_type": "gradio.FileData"}}
    with running_gallery(*results, has_traceback=True) as gallery, httpx.Client(base_url=gallery.url) as client:
        actions = [action for action in client.get("/config").json()["dependencies"] if len(action["inputs"]) == 3]
        assert actions
        for action in actions:
            path = f"/gradio_api/call/{action['api_name']}"
            event_id = client.post(path, json={"data": ["all", words, None]}).json()["event_id"]
            events = client.get(f"{path}/{event_id}", timeout=60).text
            assert "event: error" in events and "/file=" not in events


def test_nothing_is_uploaded(server: str) -> None:
    response = httpx.post(f"{server}/gradio_api/upload", files={"files": ("a.mp4", b"x" * 1000)})
    assert response.status_code in (400, 413)


def test_only_this_machine_is_let_in(server: str) -> None:
    """Nothing listens at the port on this machine's other addresses. A wildcard address is said aloud."""
    port = urlsplit(server).port
    with open("/proc/net/tcp") as table:
        addresses = {line.split()[1] for line in table if line.split()[3] == "0A"}
    assert [address for address in addresses if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_an_address_for_all_is_warned_about(results: list[Path]) -> None:
    with running_gallery(results[0], "--host", "0.0.0.0") as running:
        pass
    assert "warning: whoever reaches this address sees the results" in "".join(running.stderr)


# The command


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no.jsonl"], "no.jsonl cannot be read: No such file"),
        ([str(CLIPS[0])], "is not valid JSON"),
        ([str(EXAMPLES)], "has none of all_results.json, final_results-*.json"),
        ([str(EXAMPLES / "videos" / "clips.json")], "is no result"),
        (["a.json", "--port", "65536"], "--port is 65536"),
        (["a.json", "--host", "no.such.host.invalid"], "host is 'no.such.host.invalid'"),
    ],
)
def test_a_wrong_argument_is_one_line(capsys, arguments: list[str], message: str) -> None:
    port = [] if "--port" in arguments else ["--port", "0"]
    status, out, err = run_main(capsys, main, "gallery", *port, *arguments)
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err


def test_the_file_of_a_folder_is_the_one_that_says_most(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").touch()
    assert _files([str(tmp_path)]) == [str(tmp_path / "answers.jsonl")]
    (tmp_path / "inference_results.json").touch()
    assert _files([str(tmp_path)]) == [str(tmp_path / "inference_results.json")]
    for name in ("final_results-b.json", "final_results-a.json"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="results of several judges, .*-a.json, .*-b.json: name one"):
        _files([str(tmp_path)])
    (tmp_path / "all_results.json").touch()
    assert _files([str(tmp_path), "x.json"]) == [str(tmp_path / "all_results.json"), "x.json"]


def test_missing_packages_are_named(capsys, monkeypatch, results: list[Path]) -> None:
    from atb_pllava.cli import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "gradio" else object())
    status, _, err = run_main(capsys, main, "gallery", results[0])
    line = f"{sys.executable} -m pip install {' '.join(extras.EXTRAS['ui'])}"
    assert status == 2 and err == f"error: this needs gradio; install: {line}{os.linesep}"
