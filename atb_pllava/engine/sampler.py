"""Logits to tokens. Each request is sampled separately, so its answer does not depend on the batch."""

import numpy as np
import torch
from torch import Tensor

from atb_pllava.engine.outputs import TokenLogprobs
from atb_pllava.errors import BackendError


class SamplingState:
    def __init__(self, params, prompt_token_ids, index=0):
        self.params, self.prompt_token_ids, self.index = params, prompt_token_ids, index
        self.generated = []
        self.generator = None
        if params.temperature:
            self.generator = torch.Generator()
            self.generator.manual_seed((params.seed or 0) + index)

    def append(self, token):
        self.generated.append(token)

    def fork(self, index):
        return SamplingState(self.params, self.prompt_token_ids, index)


from dataclasses import dataclass


@dataclass(frozen=True)
class SampledToken:
    token: int
    logprobs: TokenLogprobs | None


def not_finite_error():
    return BackendError("the model's logits are not finite; check the weights, the dtype and the backend")


def sample(logits, states):
    out = []
    for row, state in zip(logits, states):
        if not bool(torch.isfinite(row).all()):
            out.append(None)
        else:
            out.append(SampledToken(_choose(row, state), _logprobs(row, state.params.logprobs)))
    return out


def _choose(logits: Tensor, request) -> int:
    params = request.params
    if params.repetition_penalty != 1.0:
        logits = _penalise(logits, request)
    if params.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()).cpu().double() / params.temperature  # float64: no temperature above 0 overflows
    if 0 < params.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], float("-inf"))
    if params.top_p < 1.0:
        best, order = logits.sort(descending=True)
        above = best.softmax(0).cumsum(0) - best.softmax(0)  # probability of all more probable tokens
        logits = logits.index_fill(0, order[above >= params.top_p], float("-inf"))
    return int(torch.multinomial(logits.softmax(0), 1, generator=request.generator))


def _penalise(logits: Tensor, request) -> Tensor:
    """Divide the positive and multiply the negative logits of tokens in the prompt or answer.

    The formula is that of CTRL (arXiv 1909.05858), as in transformers' RepetitionPenaltyLogitsProcessor.
    """
    seen = torch.tensor(sorted({*request.prompt_token_ids, *request.generated}), device=logits.device)
    old = logits[seen]
    penalty = request.params.repetition_penalty
    return logits.index_copy(0, seen, torch.where(old > 0, old / penalty, old * penalty))


def _logprobs(logits: Tensor, wanted: int | None) -> TokenLogprobs | None:
    if wanted is None:
        return None
    row = logits.log_softmax(0).cpu()
    if wanted < 0:
        return np.asarray(row.numpy(), dtype=np.float32)
    best = row.topk(min(wanted, len(row)))
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
