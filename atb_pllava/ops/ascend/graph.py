"""Capture and replay of a decode step with torch_npu's NPUGraph."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from atb_pllava.errors import BackendError
from atb_pllava.ops.interface import CapturedGraph


class NpuGraph(CapturedGraph):
    """A captured decode step. On 910B the graph contains the host's context lengths, and each replay replaces them."""

    def __init__(self, graph: Any, out: Tensor, has_host_lengths: bool) -> None:
        self._graph = graph
        self._out = out
        self._has_host_lengths = has_host_lengths

    def replay(self, context_lens: Sequence[int]) -> Tensor:
        if self._has_host_lengths:
            self._graph.update(cpu_update_input=[{"actual_seq_lengths_kv": list(context_lens)}])
        self._graph.replay()
        return self._out

    def free(self) -> None:
        self._graph = None


def capture(torch_npu: Any, pool: Any, step: Callable[[], Tensor], has_host_lengths: bool) -> NpuGraph:
    """Capture `step` with memory from `pool`. See `ops.interface.Backend.capture`.

    has_host_lengths: the attention operator takes the context lengths from the host, as on 910B. The lengths of 310P
    are device tensors, which need no update.
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
    """End torch_npu's dispatch mode after a failed capture. Otherwise torch_npu would keep intercepting operators."""
    mode = _get_current_dispatch_mode()
    if mode is not None and mode is graph.graph_dispatch_mode:
        mode.__exit__(None, None, None)
