"""Launcher: starts the ranks, loads the model on all ranks, and makes the executor. One rank needs no new process."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from atb_pllava.config import EngineConfig, PreprocessorConfig, option
from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.errors import BackendError, PllavaError
from atb_pllava.executor.executor import Executor, frames_at_once
from atb_pllava.executor.shared_frames import share_memory
from atb_pllava.executor.worker import (
    RunnerOptions,
    load_fingerprint,
    send_runner_options,
    share_threads,
    start_workers,
)
from atb_pllava.loader.model_loader import fill_model, plan_model
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.model.pllava import Pllava

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParallelOptions:
    """The number of processes that hold the model, and the port of their rendezvous.

    `world_size` None means 1, or the number of processes that torchrun started. Rank r takes the r-th visible GPU or
    NPU. Ranks on a CPU share the CPU. `master_port` is a port of the loopback interface. None means a free port.
    """

    world_size: int | None = field(default=None, metadata=option("devices to split the model over (default 1)"))
    master_port: int | None = None


class Launcher:
    """Starts, loads and stops all ranks, from rank 0.

    `rendezvous` is the connection to ranks that torchrun started. None: `launch` starts ranks 1 to world_size - 1.
    The constructor reads the checkpoint's headers and allocates no memory for the model.
    """

    def __init__(self, options: ModelOptions, parallel: ParallelOptions, rendezvous: Rendezvous | None = None) -> None:
        size = 1 if parallel.world_size is None else parallel.world_size
        self.options = options
        self.rendezvous = rendezvous
        self.parallel = rendezvous.parallel if rendezvous else TensorParallel(0, size)
        self.model, self.plan = plan_model(options, self.parallel)
        self.executor: Executor | None = None
        self._port = parallel.master_port
        self._owner = os.getpid()
        self._restore_threads: Callable[[], None] = lambda: None

    def __str__(self) -> str:
        """Which checkpoint, in what dtype, on which device."""
        options = self.options
        on_top = "" if options.weight_dir is None else f", weight_dir={options.weight_dir!r}"
        ranks = "" if self.parallel.size == 1 else f", world_size={self.parallel.size}"
        dtype = str(self.model.dtype).removeprefix("torch.")
        backend = self.model.ops
        return f"{options.model_path!r}{on_top}, dtype={dtype}, backend={backend}, device={backend.device}{ranks}"

    def launch(
        self, config: EngineConfig, preprocessor: PreprocessorConfig, plan_blocks: Callable[[Pllava, int], int]
    ) -> Executor:
        """Load the model on every rank. Returns the executor, whose KV cache has `plan_blocks(model, free)` blocks.

        free: the bytes that are free after loading, on the rank that has the fewest.
        """
        if self.parallel.size > 1 and self.rendezvous is None:
            self.rendezvous = start_workers(self.parallel.size, self.options, self._port)
        with self._stopped_on_error():
            self._load()
            blocks = plan_blocks(self.model, self.parallel.lowest(self.model.ops.free_memory()))
            options = RunnerOptions(
                blocks, config.block_size, config.kv_cache_dtype, config.decode_graphs, preprocessor
            )
            if self.rendezvous is not None:
                send_runner_options(self.parallel, options)
            runner = options.make_runner(self.model)
            frames = frames_at_once(config, self.model.ops, self.parallel.size)
            side = self.model.config.vision.image_size
            frame_bytes = side * side * 3  # uint8
            shared = None if self.rendezvous is None else share_memory(self.parallel, frames * frame_bytes)
            self.executor = Executor(runner, self.parallel, self._stop_after_loss, shared)
            self.executor.warm_up(config.max_batch_size, frames)
        return self.executor

    def close(self) -> None:
        """Stop the other ranks, if there are any, and free their memory. A second call does nothing.

        The call also does nothing in a forked child, because the ranks belong to the parent process.
        """
        if self.rendezvous is None or os.getpid() != self._owner:
            return
        try:
            if self.executor is not None:
                self.executor.stop()
        except RuntimeError:
            self.rendezvous.kill()
        self.rendezvous.stop()
        self._restore_threads()

    def _load(self) -> None:
        """Load this rank's shard of the model, and wait until every other rank has loaded its shard."""
        if self.rendezvous is None:
            fill_model(self.model, self.plan, pack=True)
            return
        self._restore_threads = share_threads(self.parallel.size)
        fill_model(self.model, self.plan, self.rendezvous.heartbeat, pack=True)
        fingerprint = load_fingerprint(self.model, self.plan, self.options)
        self.rendezvous.barrier(fingerprint, self.model.ops.process_group)
        text = self.model.config.text
        logger.debug(
            "%d ranks: a token costs each of them %d all-reduces of %d values, and a gather of %d logits",
            self.parallel.size,
            2 * text.num_hidden_layers + 1,
            text.hidden_size,
            text.vocab_size,
        )

    @contextmanager
    def _stopped_on_error(self) -> Iterator[None]:
        """Kill the other ranks if the body raises. Otherwise they would wait for rank 0 in a collective."""
        try:
            yield
        except BaseException:
            if self.rendezvous is not None:
                self.rendezvous.kill()
            self._restore_threads()
            raise

    def _stop_after_loss(self) -> PllavaError | None:
        """Kill all other ranks after one rank was lost. Returns an error that names the lost rank, None if unknown."""
        if self.rendezvous is None:
            return None
        time.sleep(0.2)  # a process that has just died needs a moment to be seen as dead
        reason = self.rendezvous.failure_reason()
        self.rendezvous.kill()
        return None if reason is None else BackendError(f"{reason}; all ranks were stopped")
