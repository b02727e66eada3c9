"""How the ranks of a tensor-parallel model find each other: a key-value store, the worker processes, and a barrier.

Rank 0 is the user's process. Rank 0 starts the other ranks, or torchrun has started all ranks. All ranks connect to a
store on the loopback interface. A loading rank writes heartbeats to the store. `Rendezvous.barrier` waits until every
rank has loaded, compares fingerprints of the loaded weights, and makes the process group.

The fingerprint is any string. `executor.worker` is the program of the workers.
"""

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import Store

from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.errors import BackendError, ConfigError

HEARTBEAT_TIMEOUT = 60.0  # seconds without a heartbeat after which rank 0 gives up a loading rank
EXIT_PEER_LOST = 3  # exit status of a rank that ended because another rank ended
_HEARTBEAT_INTERVAL = 1.0
_POLL_INTERVAL = 0.05
_SECONDS_TO_STOP = 5.0
_STORE_TIMEOUT = timedelta(seconds=60)
_COLLECTIVE_TIMEOUT = timedelta(days=7)  # between two requests of the user, workers wait in a collective
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


@dataclass
class Rendezvous:
    """One rank's connection to the other ranks: the store and, on rank 0, the processes that rank 0 started."""

    parallel: TensorParallel
    store: Store
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    _last_heartbeat: float = 0.0

    @classmethod
    def start(cls, size: int, module: str, arguments: Sequence[str], port: int | None = None) -> "Rendezvous":
        """Start ranks 1 to size - 1 on this machine. Each rank runs `python -m module RANK SIZE PORT ARGUMENTS...`.

        port: the store's port on the loopback interface. None takes a free port. The working directory of the ranks is
        the folder that holds this package, so that all ranks import the same code. The stdin of each rank is a pipe
        that closes when this process ends.
        Raises ConfigError if the port is taken. Raises BackendError if this process already has a process group.
        """
        if dist.is_initialized():
            raise BackendError("this process already has a tensor-parallel model; close() it before the next one")
        store, port = _listen(size, port)
        rendezvous = cls(TensorParallel(0, size), store)
        # With PYTHONSAFEPATH, `python -m` does not look for the module in the working directory.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        for rank in range(1, size):
            command = [sys.executable, "-m", module, str(rank), str(size), str(port), *arguments]
            rendezvous.processes.append(
                subprocess.Popen(command, cwd=_PACKAGE_PARENT, env=environment, stdin=subprocess.PIPE)
            )
        return rendezvous

    @classmethod
    def connect(cls, rank: int, size: int, port: int) -> "Rendezvous":
        """Connect a rank that `start` started to the store of rank 0."""
        store = dist.TCPStore("127.0.0.1", port, size, False, timeout=_STORE_TIMEOUT)
        return cls(TensorParallel(rank, size), store)

    @classmethod
    def among_torchrun(cls) -> "Rendezvous":
        """Connect a rank that torchrun started. Rank, size and address are in the environment variables of torchrun.

        Raises ConfigError if the store cannot be reached.
        """
        try:
            store, rank, size = next(dist.rendezvous("env://"))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"RANK and WORLD_SIZE are set, but the ranks cannot meet: {error}") from None
        return cls(TensorParallel(rank, size), store)

    def heartbeat(self) -> None:
        """On a worker: write a heartbeat to the store. On rank 0: raise BackendError if a worker has ended or failed.

        Loading calls `heartbeat` after every tensor. At most one call a second has an effect.
        """
        now = time.monotonic()
        if now - self._last_heartbeat < _HEARTBEAT_INTERVAL:
            return
        self._last_heartbeat = now
        if self.parallel.rank:
            self.store.set(f"heartbeat/{self.parallel.rank}", str(now))
        else:
            self._raise_if_one_ended()

    def barrier(self, fingerprint: str, process_group: str) -> None:
        """Wait until every rank has loaded, compare the fingerprints, and make the process group for collectives.

        fingerprint: a text of everything that must be equal on all ranks. process_group: the `backend` argument of
        `torch.distributed.init_process_group`.
        Raises BackendError that names a rank which failed, ended, hangs or has another fingerprint.
        """
        rank = self.parallel.rank
        self.store.set(f"loaded/{rank}", hashlib.sha256(fingerprint.encode()).hexdigest())
        if rank == 0:
            self._compare_ranks()
        while not self._has("go"):
            time.sleep(_POLL_INTERVAL)
        difference = self.store.get("go").decode()
        if difference:
            raise BackendError(f"{difference}; all ranks were stopped")
        _init_process_group(self.store, self.parallel, process_group)

    def fail(self, reason: str) -> None:
        """Write the reason of this rank's failure to the store. Rank 0 reads it with `failure_reason`."""
        self.store.set(f"error/{self.parallel.rank}", reason)

    def stop(self) -> None:
        """Wait for the workers to end, kill those that still run after 5 s, and free ports and memory.

        A second call does nothing.
        """
        deadline = time.monotonic() + _SECONDS_TO_STOP
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
        self.processes.clear()
        leave_process_group()

    def kill(self) -> None:
        """Kill the workers at once, because workers may wait in a collective that rank 0 will never join."""
        for process in self.processes:
            process.kill()
        leave_process_group(abort=True)
        self.stop()

    def failure_reason(self) -> str | None:
        """The ranks that failed or ended, with the reason. None if all ranks are alive."""
        ended = {rank: p.returncode for rank, p in enumerate(self.processes, start=1) if p.poll() is not None}
        for rank in range(1, self.parallel.size):
            if self._has(f"error/{rank}"):
                return f"rank {rank} failed: {self.store.get(f'error/{rank}').decode()}"
        # A rank that ended because of another rank is a consequence, not the cause.
        causes = {rank: status for rank, status in ended.items() if status != EXIT_PEER_LOST} or ended
        return ", ".join(f"rank {rank} ended with status {status}" for rank, status in causes.items()) or None

    def _compare_ranks(self) -> None:
        """On rank 0: wait for each worker, compare the fingerprints, and write the result under the key "go".

        The result is "" if all fingerprints are equal, else a message that names the first differing rank.
        """
        workers = range(1, self.parallel.size)
        for rank in workers:
            self._wait_until_loaded(rank)
        expected = self.store.get("loaded/0")
        different = [rank for rank in workers if self.store.get(f"loaded/{rank}") != expected]
        self.store.set("go", f"rank {different[0]} has other weights or options than rank 0" if different else "")

    def _raise_if_one_ended(self) -> None:
        reason = self.failure_reason()
        if reason is not None:
            raise BackendError(f"{reason}; all ranks were stopped")

    def _wait_until_loaded(self, rank: int) -> None:
        last_heartbeat = b""
        last_change = time.monotonic()
        while not self._has(f"loaded/{rank}"):
            self._raise_if_one_ended()
            heartbeat = self.store.get(f"heartbeat/{rank}") if self._has(f"heartbeat/{rank}") else b""
            if heartbeat != last_heartbeat:
                last_heartbeat = heartbeat
                last_change = time.monotonic()
            if time.monotonic() - last_change > HEARTBEAT_TIMEOUT:
                raise BackendError(
                    f"rank {rank} has not moved for {HEARTBEAT_TIMEOUT:.0f} s while loading; all ranks were stopped"
                )
            time.sleep(_POLL_INTERVAL)

    def _has(self, key: str) -> bool:
        """Whether a rank has set `key` in the store."""
        if hasattr(self.store, "check"):
            return bool(self.store.check([key]))
        try:  # torch 2.1
            self.store.wait([key], timedelta(milliseconds=10))
        except RuntimeError:
            return False
        return True


def leave_process_group(*, abort: bool = False) -> None:
    """Destroy the process group of this rank, if there is one. The rank's captured graphs are gone by then.

    abort: other ranks may have ended. NCCL otherwise waits for them: its communicators are aborted (torch 2.6 and
    later), which also ends collectives that run.
    """
    if not dist.is_initialized():
        return
    abort_group = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if abort and abort_group is not None and "nccl" in str(dist.get_backend_config()):
        abort_group()
    else:
        dist.destroy_process_group()


def _listen(size: int, port: int | None) -> tuple[Store, int]:
    """A key-value store on the loopback interface, and its port. `port` None takes a free port."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port or 0))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "no port number"
        raise ConfigError(f"MASTER_PORT {port} cannot be used: {reason}; choose another, or unset it") from None
    listener.listen(size)
    bound: int = listener.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1",
        bound,
        size,
        True,
        timeout=_STORE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, bound


def _init_process_group(store: Store, parallel: TensorParallel, backends: str) -> None:
    # By default gloo listens on the interface of the host's name, which other machines can reach.
    # NCCL chooses an interface of its own. All ranks are on this machine.
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    dist.init_process_group(
        backends,
        store=dist.PrefixStore("group", store),
        rank=parallel.rank,
        world_size=parallel.size,
        timeout=_COLLECTIVE_TIMEOUT,
    )
