"""The Ray cluster of a caption run: the connection to it, and how many actors with which resources it takes."""

import logging
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data

import atb_pllava
from atb_pllava.errors import ConfigError

# What Ray calls the devices of each backend. `auto` takes the first of them that the cluster has.
_RESOURCES = {"ascend": "NPU", "cuda": "GPU", "cpu": "CPU"}
_MOST_MEDIA_WORKERS = 8
_SECONDS_TO_CONNECT = 10.0


@dataclass(frozen=True)
class ActorPool:
    """`size` actors. `options` are arguments of Ray's `map_batches`: what each actor reserves.

    media_workers: the share of an actor in the cores of its machine.
    """

    size: int
    options: dict[str, Any]
    media_workers: int


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect this process to the cluster at an address, as `ray.init` understands it.

    Ray copies this package to the machines, so that all run the same version. Without an address, `ray.init` takes
    RAY_ADDRESS, then a cluster of this machine, else starts one for this run. Raises ConfigError when there is no
    connection.
    """
    _check_open(address)
    package = Path(atb_pllava.__file__).parent
    try:
        ray.init(address or None, runtime_env={"py_modules": [str(package)]}, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--ray {address}: no connection to the cluster: {error}") from None
    ray.data.DataContext.get_current().enable_progress_bars = False  # the run shows its own
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def _check_open(address: str) -> None:
    """Raises ConfigError when nothing listens at HOST:PORT. Ray itself would try for ten minutes."""
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), _SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--ray {address}: no Ray cluster answers there ({error}); see `ray start`") from None


def actor_pool(replicas: int | None, cards: int, backend: str) -> ActorPool:
    """The actors for a model on `cards` devices each. `replicas` None: as many as the cluster has devices for.

    On CPUs it is one actor a machine, unless `replicas` is given, and the actors share the cores. Raises ConfigError
    when the cluster has too few devices.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    names = [_RESOURCES[backend]] if backend in _RESOURCES else list(_RESOURCES.values())
    resource = next((name for name in names if any(machine.get(name) for machine in machines)), names[-1])
    able = [machine for machine in machines if machine.get(resource, 0) >= (1 if resource == "CPU" else cards)]
    places = [1 if resource == "CPU" else int(machine[resource] // cards) for machine in able]
    size = replicas or sum(places)
    each = math.ceil(size / len(able)) if able else 0
    cpus = int(min((machine.get("CPU", 0) for machine in able), default=0))
    enough = bool(able) and (each <= cpus if resource == "CPU" else size <= sum(places))
    if not enough:
        raise ConfigError(
            f"{size or 1} actors with {cards} {resource} each are more than the cluster has: "
            f"{sum(machine.get(resource, 0) for machine in machines):g} {resource} on {len(machines)} machines; "
            "lower --replicas or --world_size, or add machines"
        )
    share = max(cpus // each, 1)
    options: dict[str, dict[str, Any]] = {
        "CPU": {"num_cpus": share},
        "GPU": {"num_gpus": cards},
        "NPU": {"resources": {"NPU": cards}},
    }
    return ActorPool(size, options[resource], min(share, _MOST_MEDIA_WORKERS))
