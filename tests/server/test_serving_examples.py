"""examples/serving/: the scripts do what they say with a running server, and the other files fit the program."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from atb_pllava import LLM
from atb_pllava.cli.environment import api_key
from atb_pllava.cli.extras import EXTRAS
from atb_pllava.cli.verbs import parse
from atb_pllava.server.options import ServerOptions
from tests.server.running_server import PATIENCE, RunningServer
from tests.server.support import VIDEOS
from tests.support import ROOT

FOLDER = ROOT / "examples" / "serving"
CLIP = str(VIDEOS[0])
KEY = "a-key"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=PATIENCE
    )


def served_arguments(words: list[str]) -> Any:
    """The options of `serve` behind these words, as the program understands them."""
    return parse(["serve", *words])


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_ask_server_py(server: RunningServer, tiny: LLM, options: list[str]) -> None:
    done = run(
        sys.executable, "examples/serving/ask_server.py", CLIP, "Is there a circle?", "--url", server.url, *options
    )
    assert done.stdout == tiny.chat(CLIP, "Is there a circle?").text + "\n", done.stderr


def test_ask_server_sh_with_a_key(tiny: LLM) -> None:
    questions = ["Describe the video.", "Is it \"quoted\", 'quoted' and {braced}?"]
    with RunningServer(env={"ATB_PLLAVA_API_KEY": KEY}) as server:
        done = run("bash", "examples/serving/ask_server.sh", CLIP, *questions, URL=server.url, ATB_PLLAVA_API_KEY=KEY)
        assert done.stdout == "".join(f"{tiny.chat(CLIP, question).text}\n" for question in questions), done.stderr
        videos = httpx.get(f"{server.url}/v1/videos", headers={"Authorization": f"Bearer {KEY}"}).json()
        assert videos["data"] == []


def test_ask_server_sh_ends_with_the_servers_error(server: RunningServer) -> None:
    done = run("bash", "examples/serving/ask_server.sh", "README.md", "What is it?", URL=server.url)
    assert done.returncode != 0


def test_load_test(server: RunningServer) -> None:
    options = {"PYTHON": sys.executable, "MAX_OUTPUT_LENGTH": "2", "PYTHONPATH": str(ROOT)}
    done = run("bash", "examples/serving/load_test.sh", server.url, CLIP, **options)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"== (\d+) at once", done.stdout) == ["1", "8", "64"]
    answered = re.findall(r"^\| +(\d+) \| +(\d+) \|", done.stdout, re.MULTILINE)
    assert answered == [("4", "0"), ("32", "0"), ("256", "0")]


def instructions(name: str) -> list[tuple[str, str]]:
    """(keyword, rest) of each instruction of a Dockerfile."""
    text = re.sub(r"^#.*\n", "", (FOLDER / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.mindie"])
def test_a_dockerfile_copies_what_exists_and_installs_the_extra(name: str) -> None:
    found = instructions(name)
    assert {keyword for keyword, _ in found} <= {
        "ARG", "FROM", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD",
    }  # fmt: skip
    for keyword, rest in found:
        if keyword == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
    (installed,) = [rest for keyword, rest in found if keyword == "RUN" and "pip install" in rest]
    assert set(EXTRAS["serve"]) <= set(installed.split())
    assert ("EXPOSE", str(ServerOptions().port)) in found


def test_the_command_of_the_image_is_understood() -> None:
    found = dict(instructions("Dockerfile"))
    command = json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"])
    assert command[:4] == ["python", "-m", "atb_pllava", "serve"]
    assert served_arguments(command[4:]).host == "0.0.0.0"
    assert "/health" in found["HEALTHCHECK"]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.mindie"])
def test_the_options_in_a_dockerfiles_comments_are_understood(name: str) -> None:
    comments = re.findall(r"^# ?(.*)$", (FOLDER / name).read_text(), re.MULTILINE)
    text = "\n".join(comments).replace("\\\n", " ")
    runs = [shlex.split(line) for line in text.splitlines() if line.strip().startswith("docker run")]
    assert runs
    for words in runs:
        image = next(i for i, word in enumerate(words) if word in ("atb_pllava", "atb_pllava_npu"))
        served_arguments(words[image + 1 :])


def test_the_deployment_of_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    (container,) = pod["containers"]
    arguments = served_arguments(container["args"])
    assert pod["terminationGracePeriodSeconds"] > arguments.shutdown_timeout
    assert container["ports"] == [{"containerPort": arguments.port}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": arguments.port}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (variable,) = container["env"]
    monkeypatch.setenv(variable["name"], KEY)
    assert api_key() == KEY


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(FOLDER / "atb-pllava.service")
    return parser


def test_the_unit_of_systemd() -> None:
    service = unit()["Service"]
    python, *words = service["ExecStart"].split()
    assert python == f"{service['WorkingDirectory']}/.venv/bin/python"
    assert words[:3] == ["-m", "atb_pllava", "serve"]
    assert int(service["TimeoutStopSec"]) > served_arguments(words[3:]).shutdown_timeout
    assert service["Restart"] == "on-failure"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
def test_systemd_finds_nothing_wrong_in_the_unit(tmp_path: Path) -> None:
    text = (FOLDER / "atb-pllava.service").read_text()
    place = unit()["Service"]["WorkingDirectory"]
    copy = tmp_path / "atb-pllava.service"
    copy.write_text(text.replace(f"{place}/.venv/bin/python", sys.executable).replace(place, str(ROOT)))
    done = run("systemd-analyze", "verify", "--man=no", str(copy))
    assert (done.returncode, done.stderr) == (0, "")
