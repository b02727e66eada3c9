"""A worker is a rank other than 0: loads its shard of the model, then runs the calls of rank 0 until rank 0 stops.

Rank 0 starts workers as `python -m atb_pllava.executor.worker RANK SIZE PORT DIRECTORY OPTIONS`. Under torchrun the
command line calls `run_worker` in the process that torchrun started. If a rank ends, its sockets close. The next
collective of every other rank then fails, and all ranks end.
"""

if __name__ == "__main__":
    import signal

    # Ctrl-C reaches the whole process group, and rank 0 decides what it means. Importing torch takes seconds.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import logging
import os
import sys
import threading
from collections.abc import Callable

import msgspec
import torch

from atb_pllava.config import PreprocessorConfig
from atb_pllava.distributed.rendezvous import EXIT_PEER_LOST, Rendezvous, leave_process_group
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.errors import OutOfMemoryError, PllavaError
from atb_pllava.executor.executor import worker_loop
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.executor.shared_frames import share_memory
from atb_pllava.loader.dummy_weights import DummyWeights
from atb_pllava.loader.model_loader import fill_model, plan_model
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.loader.weight_loader import LoadPlan
from atb_pllava.model.pllava import Pllava

_MODULE = "atb_pllava.executor.worker"  # __name__ is "__main__" in a worker's process


class RunnerOptions(msgspec.Struct, frozen=True):
    """The arguments of `ModelRunner` after the model. Rank 0 chooses the values and sends them to the workers."""

    blocks: int
    block_size: int
    kv_cache_dtype: str
    decode_graphs: bool
    preprocessor: PreprocessorConfig

    def make_runner(self, model: Pllava) -> ModelRunner:
        """The model runner of one rank."""
        return ModelRunner(
            model, self.blocks, self.block_size, self.kv_cache_dtype, self.decode_graphs, self.preprocessor
        )


def start_workers(size: int, options: ModelOptions, port: int | None = None) -> Rendezvous:
    """Start ranks 1 to size - 1 with the same options. Raises as `Rendezvous.start` does."""
    return Rendezvous.start(size, _MODULE, [os.getcwd(), options.to_json()], port)


def worker_main(rank: str, size: str, port: str, directory: str, options: str) -> int:
    """The main function of a process that `start_workers` started. Returns the exit status.

    directory: the working directory of rank 0. Relative paths in the options refer to this directory.
    """
    threading.Thread(target=_exit_with_rank_0, daemon=True).start()
    os.chdir(directory)
    return run_worker(Rendezvous.connect(int(rank), int(size), int(port)), ModelOptions.from_json(options))


def _exit_with_rank_0() -> None:
    """End this process when rank 0 ends, even by a crash.

    Rank 0 holds the other end of the stdin pipe and never writes. The read therefore returns when rank 0 has ended.
    """
    os.read(0, 1)
    os._exit(EXIT_PEER_LOST)


def run_worker(rendezvous: Rendezvous, options: ModelOptions) -> int:
    """Load this rank's shard and run `worker_loop` until rank 0 stops. Returns the exit status.

    Status 0: rank 0 stopped. Status 2: this rank failed, and rank 0 reports the reason that the store holds. Status
    EXIT_PEER_LOST: another rank ended. Workers log errors only, because rank 0 logs for all ranks.
    """
    logging.getLogger("atb_pllava").setLevel(logging.ERROR)
    status = EXIT_PEER_LOST
    try:
        status = _load_and_run(rendezvous, options)
        return status
    finally:
        leave_process_group(abort=status != 0)  # its threads outlive the interpreter otherwise, and abort


def _load_and_run(rendezvous: Rendezvous, options: ModelOptions) -> int:
    """See `run_worker`. After the call nothing holds a captured graph."""
    try:
        try:
            rendezvous.heartbeat()
            share_threads(rendezvous.parallel.size)
            model, plan = plan_model(options, rendezvous.parallel)
            fill_model(model, plan, rendezvous.heartbeat, pack=True)
            rendezvous.barrier(load_fingerprint(model, plan, options), model.ops.process_group)
        except (PllavaError, MemoryError, RuntimeError) as error:
            rendezvous.fail(str(error) or type(error).__name__)
            return 2
        rendezvous.parallel.lowest(model.ops.free_memory())  # rank 0 plans the KV cache for the fullest device
        runner = receive_runner_options(rendezvous.parallel).make_runner(model)
        worker_loop(runner, rendezvous.parallel, share_memory(rendezvous.parallel))
        return 0
    except OutOfMemoryError as error:
        rendezvous.fail(str(error))
        return 2
    except RuntimeError:
        return EXIT_PEER_LOST  # a collective or the store failed, because another rank ended


def load_fingerprint(model: Pllava, plan: LoadPlan | DummyWeights, options: ModelOptions) -> str:
    """A text of all that must be equal on all ranks: weights, LoRA scale, options without paths, config and dtype."""
    return f"{plan.fingerprint()} {plan.lora_scale} {options.described()} {model.config} {model.dtype}"


def send_runner_options(parallel: TensorParallel, options: RunnerOptions) -> None:
    """On rank 0: send the options of the model runner to the workers."""
    parallel.broadcast_bytes(msgspec.msgpack.encode(options))


def receive_runner_options(parallel: TensorParallel) -> RunnerOptions:
    """On a worker: receive the options of the model runner from rank 0."""
    return msgspec.msgpack.decode(parallel.broadcast_bytes(), type=RunnerOptions)


def share_threads(size: int) -> Callable[[], None]:
    """Divide torch's threads among the ranks of this machine. The returned function restores the old number."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // size))
    return lambda: torch.set_num_threads(before)


if __name__ == "__main__":
    sys.exit(worker_main(*sys.argv[1:]))
