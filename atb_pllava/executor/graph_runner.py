"""Decode steps that the device has recorded once and launches as one: hundreds of small kernels cost one launch.

A recording knows its batch size, so batches are padded to powers of two; it knows its tensors, so every step is written
into the same ones. For backends that can capture; called by `engine.runner`.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from atb_pllava.errors import BackendError
from atb_pllava.executor.model_input import ModelInput
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.interface import CapturedGraph, CapturingBackend, ForwardBatch, LayerCache, SequenceBatch

logger = logging.getLogger(__name__)


class GraphRunner:
    """The recordings of one model and KV cache, one for each padded batch size, made when a size first occurs.

    columns: blocks of the longest sequence that is recorded for. When a recording fails, that is logged and every
    later step runs operator by operator.
    """

    def __init__(self, model: Pllava, backend: CapturingBackend, cache: Sequence[LayerCache], columns: int) -> None:
        self._model, self._backend, self._cache, self._columns = model, backend, cache, columns
        self._recorded: dict[int, tuple[_DecodeInputs, CapturedGraph]] = {}
        self._works = True

    def fits(self, step: ModelInput) -> bool:
        """Whether every sequence of the step decodes one token, within `columns` blocks."""
        only_decodes = 0 < step.decoding == len(step.query_lens) == len(step.logits_indices) and not step.embed_slices
        return self._works and only_decodes and max(map(len, step.block_tables)) <= self._columns

    def forward(self, step: ModelInput) -> Tensor:
        """Run a step that `fits`: float32 logits [B, vocabulary]."""
        size = 1 << (step.decoding - 1).bit_length()
        if size not in self._recorded:
            return self._record(size, step)[: step.decoding]
        inputs, captured = self._recorded[size]
        lens = inputs.fill(step)
        return captured.replay(lens)[: step.decoding].clone()

    def _record(self, size: int, step: ModelInput) -> Tensor:
        """The step's logits [size, vocabulary], computed as always, which also warms up; then the recording."""
        inputs = _DecodeInputs(size, self._columns, self._model.ops.device)
        lens = inputs.fill(step)
        logits: Tensor = self._model(inputs.batch(lens), self._cache)
        try:
            captured = self._backend.capture(lambda: self._model(inputs.batch(lens), self._cache))
        except BackendError as error:
            self._works = False
            logger.warning("decoding without graphs: %s", error)
        else:
            self._recorded[size] = inputs, captured
            logger.debug("recorded the decode step of %d sequences", size)
        return logits


class _DecodeInputs:
    """One tensor [4 + columns, size] int64 for all inputs of a decode step: one copy to the device a step."""

    def __init__(self, size: int, columns: int, device: torch.device) -> None:
        self._host = torch.zeros(4 + columns, size, dtype=torch.int64)
        self._device = self._host.to(device)
        self._ids, self._positions, self._slots, self._lens = self._device[:4]
        self._rows = torch.arange(size, device=device)

    def fill(self, step: ModelInput) -> list[int]:
        """Write a step and its padding, rows with slot -1 and no context; the context lengths [size]."""
        used, size = step.decoding, self._host.shape[1]
        self._host.zero_()
        self._host[2] = -1
        for row, values in enumerate((step.token_ids, step.positions, step.slot_mapping, step.context_lens)):
            self._host[row, :used] = torch.tensor(values)
        for i, table in enumerate(step.block_tables):
            self._host[4 : 4 + len(table), i] = torch.tensor(table)
        self._device.copy_(self._host)
        return step.context_lens + [0] * (size - used)

    def batch(self, lens: Sequence[int]) -> ForwardBatch:
        """The inputs as a batch; `lens` are the host's lengths of this moment."""
        tables = self._device[4:].T
        decode = SequenceBatch(tuple(range(len(lens) + 1)), tuple(lens), tables, self._lens)
        nothing = SequenceBatch((0,), (), tables[:0])
        return ForwardBatch(self._ids, self._positions, self._slots, decode, nothing, self._rows)
