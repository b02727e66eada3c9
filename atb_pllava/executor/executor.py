"""Calls of ModelRunner methods on every rank: `Executor` on rank 0, `worker_loop` on the other ranks.

Rank 0 broadcasts the method's name and its arguments as msgpack, then each tensor among the arguments. The method's
signature states the types of the arguments. Nothing is pickled. Only RANK_METHODS can be called.
"""

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar, get_type_hints

import msgspec
import torch
from torch import Tensor

from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.errors import BackendError, PllavaError
from atb_pllava.executor.model_runner import ModelRunner

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

RANK_METHODS = (ModelRunner.encode_frames, ModelRunner.pool_frames, ModelRunner.free_video, ModelRunner.forward)
"""The methods that all ranks run together. Arguments are numbers, sequences of numbers, structs or tensors."""

_STOP = "stop"  # a method's name that ends the workers


class RankCall(msgspec.Struct, frozen=True, array_like=True):
    """One call: the method's name, and the arguments as msgpack. The method's signature states their types."""

    method: str
    arguments: msgspec.Raw


class TensorHeader(msgspec.Struct, frozen=True, array_like=True):
    """The dtype and shape of a tensor argument. The tensor's values are broadcast after the call."""

    dtype: str
    shape: list[int]


class Executor:
    """Rank 0's handle of all ranks: `call` runs a ModelRunner method on every rank.

    If any rank fails, the ranks are no longer in lockstep. The executor then calls `on_failure`, which shuts all ranks
    down and returns the cause, or None for an unknown cause. The failed call raises BackendError with the cause in
    place of a RuntimeError. Every later call raises that BackendError.
    """

    def __init__(
        self, runner: ModelRunner, parallel: TensorParallel, on_failure: Callable[[], PllavaError | None] = lambda: None
    ) -> None:
        self.runner = runner
        self.parallel = parallel
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
            _broadcast_call(self.parallel, method.__name__, *arguments)
            return own_method(*arguments)
        except BaseException as error:
            self._failure = BackendError(f"the ranks are out of step after {error!r}; load the model anew")
            self._failure = self._on_failure() or self._failure
            if isinstance(error, RuntimeError):
                raise self._failure from None
            raise

    def free_video(self, video_id: int) -> None:
        """Free a video's features and embeddings on every rank. After a failure nothing happens."""
        if self._failure is None:
            self.call(ModelRunner.free_video, video_id)

    def stop(self) -> None:
        """End the workers. Every later call raises BackendError."""
        if self.parallel.size > 1 and self._failure is None:
            self._failure = BackendError("this model was closed; load it anew")
            _broadcast_call(self.parallel, _STOP)


def worker_loop(runner: ModelRunner, parallel: TensorParallel) -> None:
    """Run each call of rank 0 on this rank's `runner`, until `Executor.stop` on rank 0."""
    decoders = {method.__name__: _arguments_decoder(method) for method in RANK_METHODS}
    while True:
        call = msgspec.msgpack.decode(parallel.broadcast_bytes(), type=RankCall)
        if call.method == _STOP:
            return
        arguments = decoders[call.method].decode(call.arguments)
        _broadcast_tensors(parallel, arguments)
        getattr(runner, call.method)(*arguments)


def _broadcast_call(parallel: TensorParallel, method: str, *arguments: object) -> None:
    encoded = msgspec.Raw(msgspec.msgpack.encode(arguments, enc_hook=_tensor_header))
    parallel.broadcast_bytes(msgspec.msgpack.encode(RankCall(method, encoded)))
    _broadcast_tensors(parallel, arguments)


def _broadcast_tensors(parallel: TensorParallel, arguments: tuple[object, ...]) -> None:
    """Broadcast the tensors among the arguments. The other ranks receive the values into their own tensors."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            parallel.broadcast(argument.contiguous())


def _arguments_decoder(method: Callable[..., object]) -> "msgspec.msgpack.Decoder[tuple[object, ...]]":
    """A msgpack decoder of a method's arguments, by the types in the method's signature."""
    types = [kind for name, kind in get_type_hints(method).items() if name != "return"]
    return msgspec.msgpack.Decoder(tuple[tuple(types)], dec_hook=_empty_tensor)  # type: ignore[misc]


def _tensor_header(value: object) -> TensorHeader:
    if not isinstance(value, Tensor):
        raise TypeError(f"a {type(value).__name__} cannot be sent to the other ranks")
    return TensorHeader(str(value.dtype).removeprefix("torch."), list(value.shape))


def _empty_tensor(_: type, header: object) -> Tensor:
    """A contiguous CPU tensor of the header's dtype and shape, to receive values into."""
    described = msgspec.convert(header, TensorHeader)
    return torch.empty(described.shape, dtype=getattr(torch, described.dtype))
