"""Reads the environment for the command line: torchrun's ranks, the port, the compiler, a key, MindIE's switches."""

import os

from atb_pllava.errors import ConfigError


def rank() -> int:
    """This process's rank among the processes that torchrun started. 0 without torchrun."""
    given = os.environ.get("RANK", "0")
    return int(given) if given.isascii() and given.isdigit() else 0


def started_by_torchrun(world_size: int | None) -> bool:
    """Whether torchrun started this process as one of several. Raises ConfigError when `world_size` says otherwise."""
    started = os.environ.get("WORLD_SIZE")
    if started is not None and world_size is not None and started != str(world_size):
        raise ConfigError(
            f"WORLD_SIZE is {started} and --world_size {world_size}: torchrun has decided, leave one of them out"
        )
    return started not in (None, "1") and "RANK" in os.environ


def compiler() -> str | None:
    """The C++ compiler for the CPU kernels that CXX names. None for any."""
    return os.environ.get("CXX") or None


def kernel_dir() -> str | None:
    """The folder of compiled kernels below XDG_CACHE_HOME. None for ~/.cache, when the variable names no folder."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.join(caches, "atb_pllava") if os.path.isabs(caches) else None


def master_port() -> int | None:
    """MASTER_PORT, the port of the ranks' rendezvous. None for any. Raises ConfigError for no port number."""
    given = os.environ.get("MASTER_PORT", "")
    if given and not (given.isascii() and given.isdigit() and 0 < int(given) < 65536):
        raise ConfigError(f"MASTER_PORT is {given!r}; it must be a port number from 1 to 65535")
    return int(given) if given else None


def api_key() -> str | None:
    """The API key of the server in ATB_PLLAVA_API_KEY. None when the variable is not set."""
    return os.environ.get("ATB_PLLAVA_API_KEY")


def upload_folder() -> str | None:
    """The folder for the page's uploads in GRADIO_TEMP_DIR. None for the system's temporary folder.

    Raises ConfigError when the variable names no folder.
    """
    given = os.environ.get("GRADIO_TEMP_DIR") or None
    if given is not None and not os.path.isdir(given):
        raise ConfigError(f"GRADIO_TEMP_DIR is {given!r}; it must be a folder")
    return given


def use_upload_folder(folder: str | None) -> None:
    """Make gradio keep its files in `folder`. Components that exist already go on using their own."""
    if folder is None:
        os.environ.pop("GRADIO_TEMP_DIR", None)
    else:
        os.environ["GRADIO_TEMP_DIR"] = folder


def host_benchmark() -> str | None:
    """The path of benchmark.csv by MindIE's variables. None when off. Raises ConfigError for an unknown value."""
    enabled = os.environ.get("ATB_LLM_BENCHMARK_ENABLE", "0").lower()
    if enabled not in ("0", "1", "false", "true", ""):
        raise ConfigError(f"ATB_LLM_BENCHMARK_ENABLE is {enabled!r}; it must be 0 or 1")
    wanted = os.environ.get("ATB_LLM_BENCHMARK_FILEPATH") or os.path.join("benchmark_result", "benchmark.csv")
    return wanted if enabled in ("1", "true") else None


def terminal_moves_its_cursor() -> bool:
    """Whether the terminal, by its name in TERM, understands escape sequences."""
    return os.environ.get("TERM", "dumb") not in ("", "dumb")


def replica_environment(number: int, count: int, cards: int, key: str) -> dict[str, str]:
    """The environment of replica `number` of `count`: `cards` cards of its own, a share of the cores, and an API key.

    The cards are taken in order from ASCEND_RT_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES, or are numbered from 0.
    Raises ConfigError when a variable names too few cards.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_PORT"}  # each takes a free one
    for variable in ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        given = [card.strip() for card in os.environ.get(variable, "").split(",") if card.strip()]
        if given and len(given) < count * cards:
            raise ConfigError(
                f"{variable} names {len(given)} cards, and --replicas {count} with {cards} each needs {count * cards}"
            )
        chosen = given or [str(card) for card in range(count * cards)]
        environment[variable] = ",".join(chosen[number * cards : (number + 1) * cards])
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // (count * cards), 1)))
    environment["ATB_PLLAVA_API_KEY"] = key
    return environment
