"""Logits to tokens, for all rows of a step at once. A row's token does not depend on the other rows.

Shapes: `L` rows, one a sequence, `V` tokens of the vocabulary.
"""

import copy
import secrets
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from atb_pllava.engine.logits_processors import keep_top_k, keep_top_p, penalise, weights_of
from atb_pllava.engine.outputs import TokenLogprobs
from atb_pllava.engine.sampling_params import SamplingParams

NOT_FINITE = "the model's logits are not finite; check the weights, the dtype and the backend"

_BLOCK = 256  # tokens: about the square root of V, so that no sum in `draw` has more than some hundred terms
_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)  # a device may round smaller numbers to 0

_Key = TypeVar("_Key", bound=Hashable)


class SamplingState:
    """What the sampler knows of one sequence: its options, the tokens it has seen and its random numbers.

    The random numbers of a token depend on the seed, on `index` and on the token's position in the answer only. They
    are words of Philox4x64-10 (Salmon et al., SC 2011): the key is (seed, index), the counter is the position. Without
    a seed in `params`, the operating system gives one. index: number of the answer among the answers of one request.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int], index: int = 0) -> None:
        self.params = params
        self.uniforms = (0.0, 0.0)  # two random numbers from 0 to 1 for the next token, unused when greedy
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._position = 0  # of the next token in the answer
        self._seen: dict[int, None] = dict.fromkeys(prompt_token_ids) if params.repetition_penalty != 1.0 else {}
        self._start_stream(index)

    @property
    def seen(self) -> np.ndarray:
        """The distinct tokens of the prompt and the answer, int64. Empty without a repetition penalty."""
        return np.fromiter(self._seen, np.int64, len(self._seen))

    def append(self, token: int) -> None:
        """Take the chosen token into the sequence."""
        self._position += 1
        if self.params.repetition_penalty != 1.0:
            self._seen[token] = None
        self._next_uniforms()

    def fork(self, index: int) -> "SamplingState":
        """A copy with another index: it has seen the same tokens and has other random numbers from here on."""
        forked = copy.copy(self)
        forked._seen = dict(self._seen)
        forked._start_stream(index)
        return forked

    def _start_stream(self, index: int) -> None:
        self._stream: np.random.Philox | None = None
        if self.params.temperature > 0:
            key = np.array([self._seed, index], np.uint64)
            self._stream = np.random.Philox(key=key, counter=self._position)
        self._next_uniforms()

    def _next_uniforms(self) -> None:
        """Take the four words of the next counter. The last two are unused.

        64 bits give numbers near 0 the full precision of a float. `draw` needs it for improbable tokens.
        """
        if self._stream is not None:
            first, second, _, _ = self._stream.random_raw(4).tolist()
            self.uniforms = (first * 2.0**-64, second * 2.0**-64)


@dataclass(frozen=True)
class SampledToken:
    """A chosen token, and log-probabilities if the request wants them.

    The log-probabilities are the model's: before repetition penalty, temperature, top_k and top_p.
    """

    token: int
    logprobs: TokenLogprobs | None


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[SampledToken | None]:
    """The next token of each sequence, from its row of logits [L, V] float32 on any device.

    None stands for a row that is not finite, which means a broken operator or broken weights. All that the host needs
    travels in one copy from the device. At most two small tensors travel to the device.
    """
    assert len(logits) == len(states), f"{len(logits)} rows of logits for {len(states)} sequences"
    if not states:
        return []
    penalties = [state.params.repetition_penalty for state in states]
    scores = penalise(logits, [state.seen for state in states], penalties)
    tokens, order = _choose(scores, states)
    counts = _rows_by(state.params.logprobs for state in states)
    wanted = {count: rows for count, rows in counts.items() if count is not None}
    logprobs = [_logprobs(_select(logits, rows), _reorder(tokens, order, rows), n) for n, rows in wanted.items()]
    # 0 * inf and 0 * NaN are NaN. On a CPU, this takes a seventh of the time of isfinite and all.
    is_finite = logits.mul(0).sum(1) == 0

    finite_rows, token_ids, *logprob_bits = _to_host([is_finite, tokens, *logprobs])
    token_of = dict(zip(order, token_ids.tolist(), strict=True))
    logprobs_of = {
        row: _unpacked(bits, count, token_of[row])
        for (count, rows), table in zip(wanted.items(), logprob_bits, strict=True)
        for row, bits in zip(rows, table, strict=True)
    }
    return [
        SampledToken(token_of[row], logprobs_of.get(row)) if good else None
        for row, good in enumerate(finite_rows.tolist())
    ]


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids [L] drawn with probabilities proportional to weights [L, V], by two numbers from 0 to 1, [L, 2].

    The first number chooses a block of tokens, the second one a token of the block. Short sums keep float32 exact
    enough: a token's probability is off by a relative 1e-4 at most, however small it is, and by a few 1e-7 at a
    probability near 1. One sum over the whole vocabulary would lose a probability of 1e-9.
    """
    blocks = pad(weights, (0, -weights.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))  # [L, V / 256, 256]
    block = _invert(blocks.sum(2), uniforms[:, :1])
    members = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, _BLOCK)).squeeze(1)  # [L, 256]
    return (block * _BLOCK + _invert(members, uniforms[:, 1:])).squeeze(1)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Columns [L, 1] drawn from weights [L, N]: the inverse of their cumulative distribution at uniform [L, 1].

    Ascending order keeps the sums precise where they are small. A weight of 0 is never drawn.
    """
    ascending, order = weights.sort(dim=1, stable=True)
    cumulative = ascending.cumsum(1)
    place = (cumulative <= uniform * cumulative[:, -1:]).sum(1, keepdim=True)
    return order.gather(1, place.clamp(max=weights.shape[1] - 1))  # a number that float32 rounds to 1: the largest


class _Method(NamedTuple):
    """How to choose a row's token: its maximum, or by a draw with these filters."""

    draws: bool
    top_k: bool
    top_p: bool


_GREEDY = _Method(False, False, False)


def _choose(scores: Tensor, states: Sequence[SamplingState]) -> tuple[Tensor, list[int]]:
    """Tokens [L] from penalised scores [L, V], and the number of the row of each token."""
    methods = _rows_by(_method(state.params, scores.shape[1]) for state in states)
    order = [row for rows in methods.values() for row in rows]
    if set(methods) == {_GREEDY}:
        return scores.argmax(1), order
    controls = torch.from_numpy(_controls([states[row] for row in order])).to(scores.device, non_blocking=True)
    tokens = []
    sizes = [len(rows) for rows in methods.values()]
    for (method, rows), some in zip(methods.items(), controls.split(sizes), strict=True):
        group = _select(scores, rows)
        largest = max(states[row].params.top_k for row in rows)
        tokens.append(_draw(group, some, method, largest) if method.draws else group.argmax(1))
    return torch.cat(tokens), order


def _method(params: SamplingParams, vocab_size: int) -> _Method:
    return _Method(True, 0 < params.top_k < vocab_size, params.top_p < 1.0) if params.temperature > 0 else _GREEDY


def _controls(states: Sequence[SamplingState]) -> np.ndarray:
    """What a draw needs of each state, float32 [L, 5]: temperature, top_k, top_p and two random numbers."""
    return np.array(
        [
            (max(state.params.temperature, _SMALLEST_TEMPERATURE), state.params.top_k, state.params.top_p)
            + state.uniforms
            for state in states
        ],
        np.float32,
    )


def _draw(scores: Tensor, controls: Tensor, method: _Method, largest_top_k: int) -> Tensor:
    """Tokens [L] by one method. The filters come in the order of transformers: temperature, top-k, top-p."""
    temperature, top_k, top_p, _, _ = controls.split(1, dim=1)  # [L, 1] each
    weights = weights_of(scores, temperature)
    if method.top_k:
        weights = keep_top_k(weights, scores, top_k, largest_top_k)
    if method.top_p:
        weights = keep_top_p(weights, top_p)
    return draw(weights, controls[:, 3:])


def _logprobs(logits: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Log-probabilities of logits [R, V] as int32: the bits [R, V], or [R, 2 * count + 1].

    The latter are `count` token ids, the bits of as many values, and the bits of the `chosen` tokens' [R] values.
    """
    rows = logits.log_softmax(1)
    if count < 0:
        return rows.view(torch.int32)
    best = rows.topk(min(count, logits.shape[1]), dim=1)
    # In a row that is not finite, `draw` may choose a number beyond the vocabulary.
    of_chosen = rows.gather(1, chosen.clamp(max=logits.shape[1] - 1).unsqueeze(1))
    return torch.cat([best.indices.int(), best.values.view(torch.int32), of_chosen.view(torch.int32)], dim=1)


def _unpacked(bits: np.ndarray, count: int, chosen: int) -> TokenLogprobs:
    """One row of `_logprobs` on the host. An array is a copy, which does not keep the other rows in memory.

    The chosen token is the last entry of the dict when it is not among the largest.
    """
    if count < 0:
        return np.array(bits.view(np.float32))
    ids, values = np.split(bits[:-1], 2)
    logprobs = dict(zip(ids.tolist(), values.view(np.float32).tolist(), strict=True))
    logprobs.setdefault(chosen, float(bits[-1:].view(np.float32)[0]))
    return logprobs


def _rows_by(keys: Iterable[_Key]) -> dict[_Key, list[int]]:
    """The rows of each key, ascending."""
    rows: dict[_Key, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return rows


def _select(matrix: Tensor, rows: Sequence[int]) -> Tensor:
    """Ascending rows of a matrix. No index travels to the device."""
    return matrix if len(rows) == len(matrix) else torch.stack([matrix[row] for row in rows])


def _reorder(tokens: Tensor, order: Sequence[int], rows: Sequence[int]) -> Tensor:
    """The tokens of `rows`, from tokens that belong to the rows in `order`. No index travels to the device."""
    if list(rows) == list(order):
        return tokens
    place_of = {row: place for place, row in enumerate(order)}
    return torch.stack([tokens[place_of[row]] for row in rows])


def _to_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Whole numbers and bits as int32 arrays of the same shapes, by one copy from the device."""
    packed = torch.cat([tensor.int().flatten() for tensor in tensors]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
    parts = np.split(packed, ends)
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
