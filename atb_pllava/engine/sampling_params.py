"""How the tokens of an answer are chosen: the options of one request."""

from dataclasses import dataclass
from math import isfinite

from atb_pllava.errors import RequestError

_MOST_STOP_STRINGS = 64


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. The default is greedy, as in every published PLLaVA script.

    max_tokens: the largest number of tokens to generate. temperature: 0 is greedy; above 0, tokens are sampled.
    top_k (0: off) and top_p restrict sampling to the most probable tokens. repetition_penalty divides the positive and
    multiplies the negative logits of tokens that the prompt or the answer already has. seed makes a sampled answer
    repeatable, whatever other requests are in the batch. stop: the answer ends before any of these strings.
    ignore_eos: the answer does not end at an end-of-sequence token. logprobs: k returns the k largest
    log-probabilities of each token, -1 all of them.

    Raises RequestError naming the field, its value and the allowed values.
    """

    max_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        _check_whole("max_tokens", self.max_tokens, 1, 2**31)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p is 0; it must be above 0 and at most 1")
        _check_whole("top_k", self.top_k, 0, 2**31)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, -1, 2**31)
        if not all(isinstance(s, str) and s for s in self.stop) or len(self.stop) > _MOST_STOP_STRINGS:
            raise RequestError(f"stop must be at most {_MOST_STOP_STRINGS} strings, none of them empty")


def _check_whole(name: str, value: object, lowest: int, largest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= largest:
        raise RequestError(f"{name} is {value!r}; it must be a whole number from {lowest} to {largest}")


def _check_number(name: str, value: object, lowest: float, largest: float) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not good or not lowest <= value <= largest:  # type: ignore[operator]
        raise RequestError(f"{name} is {value!r}; it must be a number from {lowest:g} to {largest:g}")
