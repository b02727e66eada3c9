"""EngineCoreOutput: what a step of the engine core says about one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

from atb_pllava.engine.outputs import TokenLogprobs
from atb_pllava.engine.request import Request, RequestTimes
from atb_pllava.errors import PllavaError


@dataclass(frozen=True)
class EngineCoreOutput:
    """The new tokens of answer `index` of a request.

    finish_reason is None until the answer ends. A failed sequence has no token and an `error`. times, preemptions and
    num_cached_tokens are final when the answer ends.
    """

    request_id: str
    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    finish_reason: str | None
    error: PllavaError | None
    times: RequestTimes
    preemptions: int
    num_cached_tokens: int

    @classmethod
    def of(
        cls,
        sequence: Request,
        token_ids: Sequence[int] = (),
        logprobs: Sequence[TokenLogprobs] = (),
        error: PllavaError | None = None,
    ) -> "EngineCoreOutput":
        """The output of a sequence after its new tokens were appended."""
        return cls(
            sequence.request_id,
            sequence.index,
            token_ids,
            logprobs,
            sequence.status.finish_reason,
            error,
            sequence.times,
            sequence.preemptions,
            sequence.num_cached_tokens,
        )
