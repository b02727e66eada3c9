"""Calls of ModelRunner methods on every rank: `Executor` on rank 0, `worker_loop` on the other ranks.

Rank 0 broadcasts the method's name and its arguments as msgpack. The method's signature states the types of the
arguments. Nothing is pickled. Only RANK_METHODS can be called. An array among the arguments goes through memory that
the ranks share. Without shared memory, rank 0 broadcasts the array after the call.
"""

import math
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar, get_type_hints

import msgspec
import numpy as np
import torch

from atb_pllava.config import EngineConfig
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.errors import BackendError, PllavaError
from atb_pllava.executor.graph_runner import padded_batch_sizes
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.executor.warm_up_progress import WarmUpProgress
from atb_pllava.ops.interface import Backend, Feature

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

RANK_METHODS = (
    ModelRunner.encode_frames,
    ModelRunner.pool_frames,
    ModelRunner.free_video,
    ModelRunner.copy_blocks,
    ModelRunner.forward,
    ModelRunner.warm_up_prompt,
    ModelRunner.warm_up_decode,
)
"""The methods that all ranks run together. Arguments are numbers, sequences of numbers, structs, and one array at most.

A method with an array ends its reading by a barrier of all ranks, because the next call overwrites shared memory.
"""

_LARGEST_WARM_UP = 512  # sequences: larger graphs take memory that most loads never need
_STOP = "stop"  # a method's name that ends the workers


class RankCall(msgspec.Struct, frozen=True, array_like=True):
    """One call: the method's name, and the arguments as msgpack. The method's signature states their types."""

    method: str
    arguments: msgspec.Raw


class ArrayHeader(msgspec.Struct, frozen=True, array_like=True):
    """The dtype and shape of an array argument. `is_shared`: the array is in shared memory, else broadcast next."""

    dtype: str
    shape: list[int]
    is_shared: bool


def frames_at_once(config: EngineConfig, ops: Backend, ranks: int) -> int:
    """The most frames that all ranks together put through the vision tower in one call."""
    return (config.vision_batch or ops.preferred_vision_batch) * ranks


class Executor:
    """Rank 0's handle of all ranks: `call` runs a ModelRunner method on every rank.

    If any rank fails, the ranks are no longer in lockstep. The executor then calls `on_failure`, which shuts all ranks
    down and returns the cause, or None for an unknown cause. The failed call raises BackendError with the cause in
    place of a RuntimeError. Every later call raises that BackendError.

    shared: the result of `share_memory` on rank 0. None: arrays are broadcast.
    """

    def __init__(
        self,
        runner: ModelRunner,
        parallel: TensorParallel,
        on_failure: Callable[[], PllavaError | None] = lambda: None,
        shared: np.ndarray | None = None,
    ) -> None:
        self.runner = runner
        self.parallel = parallel
        self._shared = shared
        self._on_failure = on_failure
        self._failure: PllavaError | None = None

    def call(
        self,
        method: Callable[Concatenate[ModelRunner, Arguments], Result],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Result:
        """Run one of RANK_METHODS on every rank with the same positional arguments. Returns rank 0's result."""
        assert not named, "arguments are positional"
        own_method: Callable[..., Result] = getattr(self.runner, method.__name__)
        if self.parallel.size == 1:
            return own_method(*arguments)
        if self._failure is not None:
            raise self._failure
        try:
            _send_call(self.parallel, self._shared, method.__name__, *arguments)
            return own_method(*arguments)
        except BaseException as error:
            self._failure = BackendError(f"the ranks are out of step after {error!r}; load the model anew")
            self.runner.free_graphs()
            self._failure = self._on_failure() or self._failure
            if isinstance(error, RuntimeError):
                raise self._failure from None
            raise

    def warm_up(self, max_batch_size: int, frames: int) -> None:
        """Compile the kernels and capture the graphs of all batch sizes, so that the first requests need not wait.

        frames: the most frames to encode at once, see `frames_at_once`. Graphs of more than _LARGEST_WARM_UP sequences
        are captured when a step first needs them.
        Long work logs its progress. Nothing happens on a backend without Feature.GRAPH_CAPTURE.
        """
        if not self.runner.ops.supports(Feature.GRAPH_CAPTURE):
            return
        sizes = padded_batch_sizes(min(max_batch_size, _LARGEST_WARM_UP))
        progress = WarmUpProgress(1 + len(sizes))
        self.call(ModelRunner.warm_up_prompt, frames)
        progress.add()
        for size in sizes:
            self.call(ModelRunner.warm_up_decode, size)
            progress.add()
        self.runner.ops.synchronize()
        progress.finish()

    def free_video(self, video_id: int) -> None:
        """Free a video's features and embeddings on every rank. After a failure nothing happens."""
        if self._failure is None:
            self.call(ModelRunner.free_video, video_id)

    def stop(self) -> None:
        """End the workers. Every later call raises BackendError."""
        if self.parallel.size > 1 and self._failure is None:
            self._failure = BackendError("this model was closed; load it anew")
            self.runner.free_graphs()
            _send_call(self.parallel, None, _STOP)


def worker_loop(runner: ModelRunner, parallel: TensorParallel, shared: np.ndarray | None = None) -> None:
    """Run each call of rank 0 on this rank's `runner`, until `Executor.stop` on rank 0.

    shared: the result of `share_memory` on this rank.
    """
    decoders = {method.__name__: _arguments_decoder(method, shared) for method in RANK_METHODS}
    while True:
        call = msgspec.msgpack.decode(parallel.broadcast_bytes(), type=RankCall)
        if call.method == _STOP:
            runner.free_graphs()
            return
        arguments = decoders[call.method].decode(call.arguments)
        for argument in arguments:
            if isinstance(argument, np.ndarray) and not _is_within(argument, shared):
                parallel.broadcast(torch.from_numpy(argument))
        getattr(runner, call.method)(*arguments)


def _send_call(parallel: TensorParallel, shared: np.ndarray | None, method: str, *arguments: object) -> None:
    """On rank 0: send a call to the other ranks. Shared memory is written before they hear of the call."""
    to_broadcast: list[np.ndarray] = []

    def place(argument: object) -> ArrayHeader:
        if not isinstance(argument, np.ndarray):
            raise TypeError(f"a {type(argument).__name__} cannot be sent to the other ranks")
        header = ArrayHeader(argument.dtype.name, list(argument.shape), is_shared=True)
        if shared is not None and argument.nbytes <= shared.nbytes:
            _view(shared, argument.dtype, argument.shape)[...] = argument
            return header
        to_broadcast.append(argument)
        return msgspec.structs.replace(header, is_shared=False)

    encoded = msgspec.Raw(msgspec.msgpack.encode(arguments, enc_hook=place))
    parallel.broadcast_bytes(msgspec.msgpack.encode(RankCall(method, encoded)))
    for array in to_broadcast:
        parallel.broadcast(torch.from_numpy(np.require(array, requirements=["C", "W"])))


def _arguments_decoder(
    method: Callable[..., object], shared: np.ndarray | None
) -> "msgspec.msgpack.Decoder[tuple[object, ...]]":
    """A msgpack decoder of a method's arguments, by the types in the method's signature.

    An array is a view of shared memory, or an empty array that receives a broadcast.
    """

    def array_of(_: type, header: object) -> np.ndarray:
        described = msgspec.convert(header, ArrayHeader)
        dtype = np.dtype(described.dtype)
        if not described.is_shared:
            return np.empty(described.shape, dtype)
        assert shared is not None, "rank 0 shares memory that this rank has not opened"
        return _view(shared, dtype, described.shape)

    types = [kind for name, kind in get_type_hints(method).items() if name != "return"]
    return msgspec.msgpack.Decoder(tuple[tuple(types)], dec_hook=array_of)  # type: ignore[misc]


def _view(shared: np.ndarray, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    """The first bytes of shared memory as an array."""
    return shared[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _is_within(array: np.ndarray, shared: np.ndarray | None) -> bool:
    """Whether the array is a view of shared memory."""
    return shared is not None and np.may_share_memory(array, shared)
