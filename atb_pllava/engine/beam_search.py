"""Beam search for one request: which beams continue with which tokens, and which hypotheses have finished.

The module knows logits and token ids. It knows no model, KV cache or request.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atb_pllava.engine.sampler import NOT_FINITE
from atb_pllava.errors import BackendError


@dataclass(frozen=True)
class Hypothesis:
    """A finished beam.

    token_ids: the generated tokens, including the end-of-sequence token. score: the sum of their log-probabilities,
    divided by the number of tokens (a length penalty of 1). is_stopped: whether an end-of-sequence token ended the
    beam. Otherwise max_tokens did.
    """

    token_ids: list[int]
    score: float
    is_stopped: bool


class BeamSearch:
    """The beams of one request, step by step. The caller computes the logits of the running beams.

    The hypotheses equal those of transformers 5.9, `generate(num_beams=num_beams, do_sample=False, length_penalty=1.0,
    early_stopping=False)`. The order of equal scores is that of torch.topk on the device, there and here.

    Transformers 4.37 sometimes searches longer. There, the estimate of `_may_improve` also counts a hypothesis that has
    just finished. So the older version sometimes finds a longer hypothesis with a higher score. It also writes the
    first end-of-sequence token in the place of any other.

    The repetition penalty applies to log-probabilities, as in transformers. Without beam search it applies to logits,
    so one beam with a repetition penalty is not the same as greedy decoding.
    """

    def __init__(
        self,
        num_beams: int,
        max_tokens: int,
        stop_token_ids: frozenset[int],
        repetition_penalty: float = 1.0,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self.num_beams = num_beams
        self.max_tokens = max_tokens
        self.stop_token_ids = stop_token_ids
        self.repetition_penalty = repetition_penalty
        self._penalised_prompt = torch.tensor(sorted(set(prompt_token_ids)), dtype=torch.int64)
        # At most len(stop_token_ids) candidates a beam end it, so num_beams candidates remain that continue.
        self._num_candidates = max(2, 1 + len(stop_token_ids)) * num_beams
        # Running beams, best first: generated tokens and the sum of their log-probabilities.
        self.tokens: list[list[int]] = [[]]
        self.cumulative_logprobs: list[float] = [0.0]
        self.finished: list[Hypothesis] = []  # best first, at most num_beams

    @property
    def is_finished(self) -> bool:
        """Whether no beam runs any more."""
        return not self.tokens

    def best(self) -> Hypothesis:
        """The finished hypothesis with the highest score."""
        return self.finished[0]

    def step(self, logits: Tensor) -> list[int]:
        """Continue the running beams by one token, from their next logits [running beams, vocabulary] float32.

        Returns the index of the old beam that each new running beam continues. `self.tokens[i][-1]` is the new token
        of beam i. The first step has one beam. The list is empty when the search has finished.
        Raises BackendError when the logits are not finite.
        """
        return self.advance(self.rank(logits).cpu())

    def rank(self, logits: Tensor) -> Tensor:
        """The first half of `step`: the best continuations of all running beams, without waiting for the device.

        Returns int32 [3, candidates] on the device, best first: the bits of the cumulative log-probabilities in
        float32, beams, and tokens. One tensor holds all of them, so that one copy brings them to the host.
        """
        logprobs = logits.log_softmax(-1)
        if self.repetition_penalty != 1.0:
            logprobs = self._penalise(logprobs)
        cumulative = torch.tensor(self.cumulative_logprobs).to(logits.device, non_blocking=True)
        scores = (logprobs + cumulative[:, None]).flatten()
        best = scores.topk(min(self._num_candidates, len(scores)))
        values = torch.where(logits.isfinite().all(), best.values, torch.nan)
        vocabulary = logits.shape[-1]
        beams = best.indices.div(vocabulary, rounding_mode="floor")
        return torch.stack([values.view(torch.int32), beams.int(), (best.indices % vocabulary).int()])

    def advance(self, candidates: Tensor) -> list[int]:
        """The second half of `step`: continue and finish beams, from the result of `rank` on the host."""
        logprobs = candidates[0].view(torch.float32)
        if math.isnan(logprobs[0]):
            raise BackendError(NOT_FINITE)
        length = len(self.tokens[0]) + 1
        scores = (logprobs / length).tolist()
        beams, tokens = candidates[1:].tolist()
        continued: list[int] = []  # ranks of the candidates
        for rank, (beam, token) in enumerate(zip(beams, tokens, strict=True)):
            is_stopped = token in self.stop_token_ids
            if not is_stopped and length < self.max_tokens:
                continued.append(rank)
            elif rank < self.num_beams:  # a worse candidate is there only to leave num_beams beams that continue
                self.finished.append(Hypothesis([*self.tokens[beam], token], scores[rank], is_stopped))
        self.finished = sorted(self.finished, key=lambda hypothesis: -hypothesis.score)[: self.num_beams]
        continued = continued[: self.num_beams] if self._may_improve(scores, continued) else []
        self.tokens = [[*self.tokens[beams[rank]], tokens[rank]] for rank in continued]
        self.cumulative_logprobs = logprobs[continued].tolist()
        return [beams[rank] for rank in continued]

    def _may_improve(self, scores: list[float], continued: list[int]) -> bool:
        """Whether a running beam may still displace a finished hypothesis.

        The estimate is transformers' for `early_stopping=False`: the score of the best running beam at its present
        length. The estimate can be too low, because a longer beam with the same sum has a higher score.
        """
        if not continued:
            return False
        return len(self.finished) < self.num_beams or scores[continued[0]] > self.finished[-1].score

    def _penalise(self, logprobs: Tensor) -> Tensor:
        """Multiply the log-probabilities of tokens in the prompt or in the beam.

        As transformers' RepetitionPenaltyLogitsProcessor, which divides positive numbers: a log-probability is never
        positive.
        """
        prompt = self._penalised_prompt.expand(len(self.tokens), -1)
        generated = torch.tensor(self.tokens, dtype=torch.int64)
        seen = torch.cat([prompt, generated], dim=1).to(logprobs.device, non_blocking=True)
        return logprobs.scatter(1, seen, logprobs.gather(1, seen) * self.repetition_penalty)
