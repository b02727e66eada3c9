"""The command and the environment variables that start `mindie/runner.py` once for each device."""

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import atb_pllava
from atb_pllava.errors import ConfigError
from atb_pllava.mindie.contract import RUNNER_CONTRACT, check_contract
from atb_pllava.mindie.host_model import CHECKS_ARE_OFF, LIBRARY_MODE, permission_problems
from atb_pllava.mindie.locate import find_examples, site_directories

PACKAGE = Path(atb_pllava.__file__).resolve().parent
RUNNER = PACKAGE / "mindie" / "runner.py"

# MindIE's own scripts export these for LLaVA (examples/models/llava/run_pa.sh). A variable that is set keeps its value.
HOST_VARIABLES = {
    "INF_NAN_MODE_ENABLE": "1",
    "ATB_OPERATION_EXECUTE_ASYNC": "1",
    "TASK_QUEUE_ENABLE": "1",
    "ATB_CONVERT_NCHW_TO_ND": "1",
    "ATB_CONTEXT_WORKSPACE_SIZE": "0",
    "ATB_LLM_BENCHMARK_ENABLE": "1",
    "ATB_LLM_BENCHMARK_FILEPATH": "benchmark.csv",
}


def runner_command(
    atb_llm: Path, options: Mapping[str, object], world_size: int, variables: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The command to execute, and its environment variables: `variables` with MindIE's and PYTHONPATH.

    `options` go to the runner as JSON. Raises ConfigError when MindIE's example programs are missing or differ from
    RUNNER_CONTRACT, and when MindIE would refuse the mode of the current or the model directory.
    """
    home = find_examples(atb_llm)
    if home is None:
        raise ConfigError(f"MindIE's example programs are neither beside nor in {atb_llm}; they belong to ATB models")
    problems = check_contract(home, RUNNER_CONTRACT)
    if problems:
        raise ConfigError("MindIE's runner differs from what is known here:\n  " + "\n  ".join(problems))
    _check_places([Path.cwd(), Path(str(options["model_path"]))], variables)
    values = {**HOST_VARIABLES, **variables}
    values["ATB_LLM_BENCHMARK_FILEPATH"] = os.path.abspath(values["ATB_LLM_BENCHMARK_FILEPATH"])
    values["PYTHONPATH"] = _python_path(variables.get("PYTHONPATH"), atb_llm.parent, home)
    torchrun = [] if world_size == 1 else _torchrun(world_size, variables.get("MASTER_PORT"))
    return [sys.executable, *torchrun, str(RUNNER), "--options", json.dumps(options)], values


def _check_places(places: Sequence[Path], variables: Mapping[str, str]) -> None:
    """Raises ConfigError for a directory whose mode MindIE refuses. MindIE itself would end in a traceback."""
    name, off = CHECKS_ARE_OFF
    if variables.get(name) != off:
        for place in places:
            for what, remedy in permission_problems(place, LIBRARY_MODE):
                raise ConfigError(f"{what}, which MindIE refuses: {remedy}, start elsewhere, or export {name}={off}")


def _torchrun(world_size: int, port: str | None) -> Sequence[str]:
    rendezvous = ("--master_addr", "127.0.0.1", "--master_port", port or str(_free_port()))
    return ("-m", "torch.distributed.run", "--nproc_per_node", str(world_size), *rendezvous)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _python_path(given: str | None, *host: Path) -> str:
    """PYTHONPATH with `given` first, then MindIE's directories, then the directory that holds this package.

    A clone of this repository has a folder `examples` too, so MindIE's directories come before the clone. A
    site-packages directory is left out: every start of Python has it on sys.path, behind the standard library.
    """
    present = given.split(os.pathsep) if given else []
    wanted = list(host)
    if PACKAGE.parent not in [place.resolve() for place in site_directories()]:
        wanted.append(PACKAGE.parent)
    return os.pathsep.join([*present, *(str(path) for path in dict.fromkeys(wanted) if str(path) not in present)])
