"""CUDA and NPU graphs of decode steps: a captured step launches hundreds of small kernels at once.

A graph has one batch size, so batches are padded to powers of two. A graph reads the same tensors at each replay, so
every step is copied into these tensors. `executor.model_runner` uses a GraphRunner for backends with
Feature.GRAPH_CAPTURE. `Backend.capture` records the graph.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from atb_pllava.errors import BackendError
from atb_pllava.executor.model_input import ModelInput
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.forward_batch import ForwardBatch, SequenceBatch
from atb_pllava.ops.interface import CapturedGraph, LayerCache

logger = logging.getLogger(__name__)


class GraphRunner:
    """The captured graphs of one model and KV cache, one for each padded batch size.

    A graph is captured when its batch size first occurs. If a capture fails, a warning is logged, and every later step
    runs without graphs. max_blocks_per_seq: columns of a graph's block table, the bound on the blocks of a sequence.
    """

    def __init__(self, model: Pllava, cache: Sequence[LayerCache], max_blocks_per_seq: int) -> None:
        self._model = model
        self._cache = cache
        self._max_blocks_per_seq = max_blocks_per_seq
        self._captured: dict[int, tuple[_DecodeInputs, CapturedGraph]] = {}
        self._works = True

    def fits(self, step: ModelInput) -> bool:
        """Whether every sequence of the step decodes one token and has at most max_blocks_per_seq blocks."""
        only_decodes = 0 < step.decoding == len(step.query_lens) == len(step.logits_indices) and not step.embed_slices
        return self._works and only_decodes and max(map(len, step.block_tables)) <= self._max_blocks_per_seq

    def forward(self, step: ModelInput) -> Tensor:
        """Run a step for which `fits` is True: float32 logits [B, vocabulary]."""
        size = padded_batch_size(step.decoding)
        if size not in self._captured:
            return self._capture(size, step)[: step.decoding]
        inputs, graph = self._captured[size]
        lens = inputs.fill(step)
        return graph.replay(lens)[: step.decoding].clone()

    def free(self) -> None:
        """Free all captured graphs."""
        for _, graph in self._captured.values():
            graph.free()
        self._captured.clear()

    def _capture(self, size: int, step: ModelInput) -> Tensor:
        """Run the step without a graph, as a warm-up, then capture the step. Returns the logits [size, vocabulary]."""
        inputs = _DecodeInputs(size, self._max_blocks_per_seq, self._model.ops.device)
        batch = inputs.batch(inputs.fill(step))
        logits: Tensor = self._model(batch, self._cache)
        try:
            graph = self._model.ops.capture(lambda: self._model(batch, self._cache))
        except BackendError as error:
            self._works = False
            logger.warning("decoding without graphs: %s", error)
        else:
            self._captured[size] = (inputs, graph)
            logger.debug("captured the decode step of %d sequences", size)
        return logits


def padded_batch_size(sequences: int) -> int:
    """The batch size of the graph that decodes this number of sequences: the next power of two."""
    return 1 << (sequences - 1).bit_length()


def padded_batch_sizes(most: int) -> list[int]:
    """The batch sizes of all graphs for up to `most` sequences, the largest first.

    The graphs share memory, and the largest graph needs the most.
    """
    return [1 << bits for bits in reversed(range(padded_batch_size(most).bit_length()))]


class _DecodeInputs:
    """All inputs of a decode step in one int64 tensor [4 + max_blocks_per_seq, size], so that a step needs one copy.

    Rows 0 to 3 are token ids, positions, slot mapping and context lengths. The other rows are the block tables.
    """

    def __init__(self, size: int, max_blocks_per_seq: int, device: torch.device) -> None:
        self._host = torch.zeros(4 + max_blocks_per_seq, size, dtype=torch.int64)
        self._device = self._host.to(device)
        self._logits_indices = torch.arange(size, device=device)
        self._no_prompts = SequenceBatch.of([], [], self._device[4:].T[:0])

    def fill(self, step: ModelInput) -> list[int]:
        """Copy a step and its padding (see `Backend.capture`) to the device. Returns the context lengths [size]."""
        used = step.decoding
        size = self._host.shape[1]
        self._host.zero_()
        self._host[2] = -1
        for row, values in enumerate((step.token_ids, step.positions, step.slot_mapping, step.context_lens)):
            self._host[row, :used] = torch.tensor(values)
        for i, table in enumerate(step.block_tables):
            self._host[4 : 4 + len(table), i] = torch.tensor(table)
        self._device.copy_(self._host)
        return step.context_lens + [0] * (size - used)

    def batch(self, lens: Sequence[int]) -> ForwardBatch:
        """The inputs as a ForwardBatch. `lens` are the context lengths [size] of the step being captured."""
        token_ids, positions, slot_mapping, context_lens = self._device[:4]
        decode = SequenceBatch(tuple(range(len(lens) + 1)), tuple(lens), self._device[4:].T, context_lens)
        return ForwardBatch(token_ids, positions, slot_mapping, decode, self._no_prompts, self._logits_indices)
