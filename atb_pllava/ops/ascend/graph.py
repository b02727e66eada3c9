"""Capturing a decode step with torch_npu's graphs."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from atb_pllava.errors import BackendError
from atb_pllava.ops.interface import CapturedGraph


class NpuGraph(CapturedGraph):
    """A recorded decode step. On 910B the host's context lengths are part of the record: each replay replaces them."""

    def __init__(self, graph: Any, out: Tensor, has_host_lengths: bool) -> None:
        self._graph = graph
        self._out = out
        self._has_host_lengths = has_host_lengths

    def replay(self, context_lens: Sequence[int]) -> Tensor:
        if self._has_host_lengths:
            self._graph.update(cpu_update_input=[{"actual_seq_lengths_kv": list(context_lens)}])
        self._graph.replay()
        return self._out


def capture(torch_npu: Any, pool: Any, step: Callable[[], Tensor], has_host_lengths: bool) -> NpuGraph:
    """Record what `step` launches, with memory from `pool`; see `ops.interface.Backend.capture`.

    has_host_lengths: the attention operator takes the context lengths from the host (910B). On 310P they are device
    tensors: there is nothing to update, and the operators that update are 910B's.
    """
    npu = torch_npu.npu
    graph = npu.NPUGraph()
    stream = npu.current_stream()
    try:
        with npu.graph(graph, pool=pool, auto_dispatch_capture=has_host_lengths):
            out = step()
    except RuntimeError as error:
        _leave_capture(graph)
        npu.set_stream(stream)
        raise BackendError(f"the NPU cannot capture a step: {str(error).splitlines()[0]}") from None
    return NpuGraph(graph, out, has_host_lengths)


def can_update_lengths(torch_npu: Any) -> bool:
    """Whether this torch_npu has graphs whose host lengths can be replaced."""
    npu = torch_npu.npu
    return hasattr(npu, "NPUGraph") and "auto_dispatch_capture" in inspect.signature(npu.graph).parameters


def _leave_capture(graph: Any) -> None:
    """Undo what torch_npu's context manager leaves behind when ending a capture fails: operators stay intercepted."""
    mode = _get_current_dispatch_mode()
    if mode is not None and mode is graph.graph_dispatch_mode:
        mode.__exit__(None, None, None)
