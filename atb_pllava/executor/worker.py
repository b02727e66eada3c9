"""The processes of a tensor-parallel model: started together, compared with each other, stopped together.

Rank 0 is the process the user has. It starts the others itself, or finds itself among those torchrun started. They
meet at a store on the loopback interface, load their parts, compare what they loaded, and then follow rank 0. When one
stops, its sockets close, the next collective of every other rank fails, and all stop.
"""

import hashlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import Store

from atb_pllava.config import KV_CACHE_DTYPES
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.errors import BackendError, ConfigError, OutOfMemoryError, PllavaError
from atb_pllava.executor.executor import worker_loop
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.loader.model_loader import fill_model, plan_model
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.model.pllava import Pllava

logger = logging.getLogger(__name__)

HEARTBEAT_TIMEOUT = 60.0  # a starting rank that shows no progress for so long is given up
EXIT_PEER_LOST = 3  # exit status of a rank that ended because another one did
_HEARTBEAT_INTERVAL = 1.0
_SECONDS_TO_STOP = 5.0
_STORE_TIMEOUT = timedelta(seconds=60)
_COLLECTIVE_TIMEOUT = timedelta(days=7)  # followers wait for work as long as the user thinks
_FOLLOW = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; rank 0 decides what it means
sys.path.insert(0, {root!r})
from atb_pllava.executor.worker import worker_main
sys.exit(worker_main(*sys.argv[1:]))
"""


@dataclass
class Rendezvous:
    """One rank's link to the others: the store they all meet at and, on rank 0, the processes it started."""

    parallel: TensorParallel
    store: Store
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    _last_heartbeat: float = 0.0

    @classmethod
    def start(cls, size: int, options: ModelOptions, port: int | None = None) -> "Rendezvous":
        """Start ranks 1 to size - 1 on this machine; `port` of the loopback interface is for the store (None: any).

        Raises ConfigError when the port is taken.
        """
        if dist.is_initialized():
            raise BackendError("this process already has a tensor-parallel model; close() it before the next one")
        store, port = _listen(size, port)
        workers = cls(TensorParallel(0, size), store)
        program = _FOLLOW.format(root=str(Path(__file__).resolve().parents[2]))
        for rank in range(1, size):
            arguments = [str(rank), str(size), str(port), options.to_json()]
            workers.processes.append(
                subprocess.Popen([sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE)
            )
        return workers

    @classmethod
    def among_torchrun(cls) -> "Rendezvous":
        """This rank among those that torchrun started; it has put rank, size and address into the environment."""
        try:
            store, rank, size = next(dist.rendezvous("env://"))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"RANK and WORLD_SIZE are set, but the ranks cannot meet: {error}") from None
        return cls(TensorParallel(rank, size), store)

    def heartbeat(self) -> None:
        """Called often while loading: followers show that they live, rank 0 looks whether they do."""
        now = time.monotonic()
        if now - self._last_heartbeat < _HEARTBEAT_INTERVAL:
            return
        self._last_heartbeat = now
        if self.parallel.rank:
            self.store.set(f"heartbeat/{self.parallel.rank}", str(now))
        else:
            self._raise_if_one_ended()

    def barrier(self, model: Pllava, described: str) -> None:
        """Wait until every rank has loaded, and make sure that all loaded what is `described`; then collectives work.

        Raises BackendError naming the rank that failed, ended, hangs or differs.
        """
        rank, size = self.parallel.rank, self.parallel.size
        self.store.set(
            f"loaded/{rank}", hashlib.sha256(f"{described} {model.config} {model.dtype}".encode()).hexdigest()
        )
        if rank == 0:
            for other in range(1, size):
                self._wait_for(other)
            mine, rest = self.store.get("loaded/0"), range(1, size)
            odd = [other for other in rest if self.store.get(f"loaded/{other}") != mine]
            self.store.set("go", f"rank {odd[0]} has other weights or options than rank 0" if odd else "")
        verdict = self._verdict()
        if verdict:
            raise BackendError(f"{verdict}; all ranks were stopped")
        _init_group(self.store, self.parallel, model.ops.process_group)

    def fail(self, reason: str) -> None:
        """Leave word for rank 0 of what went wrong here."""
        self.store.set(f"error/{self.parallel.rank}", reason)

    def stop(self) -> None:
        """End what is still running and free ports and memory; safe to call twice."""
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
        if dist.is_initialized():
            dist.destroy_process_group()

    def kill(self) -> None:
        """End the followers at once; they wait in a collective that will never come."""
        for process in self.processes:
            process.kill()
        self.stop()

    def failure_reason(self) -> str | None:
        """Which rank ended and why, when one did."""
        ended = {rank: p.returncode for rank, p in enumerate(self.processes, start=1) if p.poll() is not None}
        for rank in range(1, self.parallel.size):
            if self._has(f"error/{rank}"):
                return f"rank {rank} failed: {self.store.get(f'error/{rank}').decode()}"
        causes = {rank: status for rank, status in ended.items() if status != EXIT_PEER_LOST} or ended
        return ", ".join(f"rank {rank} ended with status {status}" for rank, status in causes.items()) or None

    def _raise_if_one_ended(self) -> None:
        reason = self.failure_reason()
        if reason is not None:
            raise BackendError(f"{reason}; all ranks were stopped")

    def _wait_for(self, rank: int) -> None:
        last, seen = b"", time.monotonic()
        while not self._has(f"loaded/{rank}"):
            self._raise_if_one_ended()
            sign = self.store.get(f"heartbeat/{rank}") if self._has(f"heartbeat/{rank}") else b""
            if sign != last:
                last, seen = sign, time.monotonic()
            if time.monotonic() - seen > HEARTBEAT_TIMEOUT:
                raise BackendError(
                    f"rank {rank} has not moved for {HEARTBEAT_TIMEOUT:.0f} s while loading; all ranks were stopped"
                )
            time.sleep(0.05)

    def _has(self, key: str) -> bool:
        """Whether a rank has set `key`."""
        if hasattr(self.store, "check"):
            return bool(self.store.check([key]))
        try:  # torch 2.1
            self.store.wait([key], timedelta(milliseconds=10))
        except RuntimeError:
            return False
        return True

    def _verdict(self) -> str:
        while not self._has("go"):
            time.sleep(0.05)
        verdict: str = self.store.get("go").decode()
        return verdict


def worker_main(rank: str, size: str, port: str, options: str) -> int:
    """The whole life of a process that rank 0 started; its exit status."""
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    store = dist.TCPStore("127.0.0.1", int(port), int(size), False, timeout=_STORE_TIMEOUT)
    workers = Rendezvous(TensorParallel(int(rank), int(size)), store)
    return run_worker(workers, ModelOptions.from_json(options))


def _end_with_rank_0() -> None:
    """Rank 0 holds the other end of our stdin and never writes: when it is gone, however it went, so are we."""
    os.read(0, 1)
    os._exit(EXIT_PEER_LOST)


def run_worker(workers: Rendezvous, options: ModelOptions) -> int:
    """Load this rank's part and worker_loop rank 0 until it stops; the exit status. Says nothing: rank 0 does."""
    logging.getLogger("atb_pllava").setLevel(logging.ERROR)
    try:
        try:
            workers.heartbeat()
            share_threads(workers.parallel.size)
            model, plan = plan_model(options, workers.parallel)
            fill_model(model, plan, workers.heartbeat, pack=True)
            workers.barrier(model, f"{plan.fingerprint()} {plan.lora_scale} {options.described()}")
        except (PllavaError, MemoryError, RuntimeError) as error:
            workers.fail(str(error) or type(error).__name__)
            return 2
        worker_loop(ModelRunner(model, *receive_worker_options(workers.parallel)), workers.parallel)
        return 0
    except OutOfMemoryError as error:
        workers.fail(str(error))
        return 2
    except RuntimeError:
        return EXIT_PEER_LOST  # a collective or the store failed: another rank ended, rank 0 knows or is gone itself
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # its threads outlive the interpreter otherwise, and abort


def send_worker_options(
    parallel: TensorParallel, blocks: int, block_size: int, kv_cache_dtype: str, decode_graphs: bool
) -> None:
    numbers = [blocks, block_size, KV_CACHE_DTYPES.index(kv_cache_dtype), int(decode_graphs)]
    parallel.broadcast(torch.tensor(numbers))


def receive_worker_options(parallel: TensorParallel) -> tuple[int, int, str, bool]:
    """What `ModelRunner` takes behind the model, from rank 0."""
    blocks, block_size, kind, graphs = parallel.broadcast(torch.empty(4, dtype=torch.int64)).tolist()
    return blocks, block_size, KV_CACHE_DTYPES[kind], bool(graphs)


def share_threads(size: int) -> Callable[[], None]:
    """Divide the cores among the ranks of this machine; the result undoes it."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // size))
    return lambda: torch.set_num_threads(before)


def _listen(size: int, port: int | None) -> tuple[Store, int]:
    """A store that only this machine can reach, and its port."""
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
        "127.0.0.1", bound, size, True, timeout=_STORE_TIMEOUT, wait_for_workers=False,
        master_listen_fd=listener.detach())  # fmt: skip
    return store, bound


def _init_group(store: Store, parallel: TensorParallel, process_group: str) -> None:
    # Gloo otherwise listens on the interface of the host's name, which other machines can reach.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group(
        process_group, store=dist.PrefixStore("group", store), rank=parallel.rank, world_size=parallel.size,
        timeout=_COLLECTIVE_TIMEOUT)  # fmt: skip
