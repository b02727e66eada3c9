"""The command line and variables that start MindIE's PA runner with PLLaVA, once for each device."""

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import atb_pllava
from atb_pllava.errors import ConfigError
from atb_pllava.mindie.contract import RUNNER_CONTRACT, check_contract
from atb_pllava.mindie.locate import find_examples
from atb_pllava.mindie.permissions import CHECKS_ARE_OFF, LIBRARY_MODE, permission_problems

RUNNER = Path(atb_pllava.__file__).resolve().parent / "mindie" / "runner.py"

# What MindIE's own scripts export for this model family (examples/models/llava/run_pa.sh); a value that is set wins.
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
    """The command to execute and its variables, from the given ones. ConfigError when something it needs is missing."""
    if not RUNNER.is_file():
        raise ConfigError(f"{RUNNER} does not exist; MindIE's runner is started from a clone of the repository")
    home = find_examples(atb_llm)
    if home is None:
        raise ConfigError(f"MindIE's example programs are neither beside nor in {atb_llm}; they belong to ATB models")
    problems = check_contract(home, RUNNER_CONTRACT)
    if problems:
        raise ConfigError("MindIE's runner differs from what is known here:\n  " + "\n  ".join(problems))
    _check_places([Path.cwd(), Path(str(options["model_path"]))], variables)
    values = {**HOST_VARIABLES, **variables}
    values["ATB_LLM_BENCHMARK_FILEPATH"] = os.path.abspath(values["ATB_LLM_BENCHMARK_FILEPATH"])
    values["PYTHONPATH"] = _joined(variables.get("PYTHONPATH"), RUNNER.parents[2], atb_llm.parent, home)
    started = [] if world_size == 1 else _torchrun(world_size, variables.get("MASTER_PORT"))
    return [sys.executable, *started, str(RUNNER), "--options", json.dumps(options)], values


def _check_places(places: Sequence[Path], variables: Mapping[str, str]) -> None:
    """The host looks at the directory it is started in, too, and ends in a traceback."""
    name, off = CHECKS_ARE_OFF
    if variables.get(name) != off:
        for place in places:
            for what, remedy in permission_problems(place, LIBRARY_MODE):
                raise ConfigError(f"{what}, which MindIE refuses: {remedy}, start elsewhere, or export {name}={off}")


def _torchrun(world_size: int, port: str | None) -> Sequence[str]:
    place = ("--master_addr", "127.0.0.1", "--master_port", port or str(_free_port()))
    return ("-m", "torch.distributed.run", "--nproc_per_node", str(world_size), *place)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _joined(given: str | None, *more: Path) -> str:
    present = given.split(os.pathsep) if given else []
    return os.pathsep.join([*present, *(str(path) for path in dict.fromkeys(more) if str(path) not in present)])
