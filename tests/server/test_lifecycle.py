"""How a server starts, drains and ends, and what its clients and its supervisor see."""

import os
import signal
import socket
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.testclient import TestClient

from atb_pllava.cli import extras
from atb_pllava.cli.verbs import main
from atb_pllava.server.app import create_app
from atb_pllava.server.listening import open_socket
from atb_pllava.server.options import ServerOptions
from atb_pllava.server.state import ServerState
from tests.server.running_server import PATIENCE, RunningServer
from tests.server.support import CHAT, error_of, events_of, served, tiny_llm, wait_until
from tests.support import run_main

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
LONG = {**HELLO, "max_tokens": 1500, "ignore_eos": True, "stream": True}


class LongStream:
    """A stream that another thread reads. `text` is what it got, once it has ended."""

    def __init__(self, url: str) -> None:
        self.text = ""
        self.error: Exception | None = None
        self._url = url
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._has_begun.wait(PATIENCE)

    def end(self) -> str:
        """Wait for the end of the stream. Returns its text, or raises the client's error."""
        self._thread.join(PATIENCE)
        if self.error is not None:
            raise self.error
        return self.text

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url + CHAT, json=LONG, timeout=PATIENCE) as response:
                for text in response.iter_text():
                    self.text += text
                    self._has_begun.set()
        except Exception as error:
            self.error = error


def test_port_in_use_ends_the_command_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with open_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        status, _, errors = run_main(capsys, main, "serve", "--port", port, "--model_path", "/no/such/checkpoint")
    assert status == 2
    assert errors.count("\n") == 1
    assert f"port {port} of 127.0.0.1 is in use" in errors
    assert "--port" in errors


def test_first_sigterm_drains_and_exits_with_0() -> None:
    with RunningServer() as server:
        stream = LongStream(server.url)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        refused = httpx.post(server.url + CHAT, json=HELLO)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1
        events = events_of(stream.end())
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(kind: signal.Signals) -> None:
    with RunningServer() as server:
        stream = LongStream(server.url)
        server.process.send_signal(kind)
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        server.process.send_signal(kind)
        assert server.wait() == 0
        (error,) = [event["error"] for event in events_of(stream.end()) if "error" in event]
        assert error["code"] == "shutting_down"


def test_requests_that_outlast_the_timeout_get_an_error() -> None:
    with RunningServer("--shutdown_timeout", 0.2) as server:
        stream = LongStream(server.url)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        events = events_of(stream.end())
        assert events[-1]["error"]["code"] == "shutting_down"


def test_unfinished_upload_does_not_hold_up_the_end() -> None:
    """The bytes of an upload are lost with the server, so it does not wait for them."""
    with RunningServer("--shutdown_timeout", 10**5) as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=PATIENCE) as connection:
            head = ["POST /v1/videos HTTP/1.1", "Host: test", "Content-Type: multipart/form-data; boundary=x"]
            part = ["--x", 'Content-Disposition: form-data; name="file"; filename="clip.mp4"', "", "the beginning"]
            connection.sendall("\r\n".join([*head, "Content-Length: 9999", "", *part]).encode())
            wait_until(lambda: num_upload_files(server.process.pid) == 1)
            server.process.send_signal(signal.SIGTERM)
            assert server.wait() == 0
            connection.settimeout(PATIENCE)
            assert b" 200 " not in connection.recv(4096)


def num_upload_files(process_id: int) -> int:
    """The deleted files that a process has open: those of uploads under way."""
    folder = Path(f"/proc/{process_id}/fd")
    links = [os.readlink(file) for file in folder.iterdir() if file.exists() or file.is_symlink()]
    return len([link for link in links if link.startswith(tempfile.gettempdir()) and link.endswith("(deleted)")])


def test_dead_rank_fails_every_request_and_ends_the_process() -> None:
    before = set(os.listdir("/dev/shm"))
    with RunningServer("--world_size", 2) as server:
        streams = [LongStream(server.url) for _ in range(3)]
        rank = worker_of(server.process.pid)
        os.kill(rank, signal.SIGKILL)
        for stream in streams:
            assert events_of(stream.end())[-1]["error"]["type"] == "ServiceUnavailableError"
        assert server.wait() == 1
        assert not Path(f"/proc/{rank}").exists()
    wait_until(lambda: set(os.listdir("/dev/shm")) <= before)  # other programs have files there for moments


def worker_of(process_id: int) -> int:
    """The process of rank 1: the child that is no media worker."""
    children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    words = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in children}
    ranks = [child for child, command in words.items() if "media" not in command and "resource_tracker" not in command]
    assert ranks, words
    return ranks[0]


def test_dead_engine_in_the_middle_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_llm() as llm, served(llm) as state, TestClient(create_app(state)) as client:
        assert client.get("/health").status_code == 200
        step = llm.engine.core.step

        def fail_later() -> Any:
            if llm.engine.stats().running == 4:
                raise ValueError("secret")
            return step()

        monkeypatch.setattr(llm.engine.core, "step", fail_later)
        body = {**LONG, "stream": False}
        with ThreadPoolExecutor(4) as pool:
            responses = list(pool.map(lambda _: client.post(CHAT, json=body), range(4)))
        for response in [*responses, client.post(CHAT, json=HELLO), client.get("/health"), client.get("/v1/models")]:
            assert (response.status_code, error_of(response)["code"]) == (503, "engine_dead")
            assert "secret" not in response.text
        assert state.admission.num_active == 0


def test_server_that_loads_says_so() -> None:
    state = ServerState("tiny", ServerOptions())
    with TestClient(create_app(state)) as client:
        for response in (client.get("/health"), client.post(CHAT, json=HELLO)):
            assert (response.status_code, error_of(response)["code"]) == (503, "loading")
            assert int(response.headers["retry-after"]) >= 1
        assert client.get("/version").status_code == 200
    state.close()


def test_api_keys_of_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# our keys\nfirst-key\nsecond-key\n")
    with RunningServer("--api_key_file", keys) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        for key in ("first-key", "second-key"):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        assert "-key" not in "".join(server.stdout + server.stderr)


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--api_key_file", "/no/such/file"], {}, "--api_key_file /no/such/file cannot be read"),
        (["--api_key_file", "pyproject.toml"], {"ATB_PLLAVA_API_KEY": "x"}, "both given"),
        ([], {"ATB_PLLAVA_API_KEY": "two words"}, "visible ASCII"),
        (["--port", "70000"], {}, "port is 70000"),
        (["--host", "256.1.1.1"], {}, "no address of this machine"),
        (["--max_waiting", "0"], {}, "max_waiting is 0"),
        (["--root_path", "pllava"], {}, "root_path"),
        (["--cors_origins", "example.com"], {}, "CORS origin"),
        (["--port", "0", "--model_path", "/no/such/checkpoint"], {}, "/no/such/checkpoint"),
    ],
)
def test_wrong_options_are_one_message(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, _, errors = run_main(capsys, main, "serve", *options)
    assert status == 2
    assert errors.count("\n") == 1
    assert message in errors


def test_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    status, _, errors = run_main(capsys, main, "serve")
    line = f"{sys.executable} -m pip install {' '.join(extras.EXTRAS['serve'])}"
    assert (status, errors) == (2, f"error: this needs uvicorn; install: {line}\n")
