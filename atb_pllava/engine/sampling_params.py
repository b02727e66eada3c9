"""How the tokens of an answer are chosen: the options of one request."""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from atb_pllava.config import option
from atb_pllava.errors import RequestError, check_number, check_whole_number

# Lowest and largest value of each whole number in SamplingParams. seed and logprobs may also be None.
_WHOLE_NUMBERS = {
    "max_tokens": (1, 2**31),
    "top_k": (0, 2**31),
    "seed": (0, 2**63 - 1),
    "logprobs": (-1, 2**31),
    "n": (1, 16),
    "num_beams": (1, 16),
}

# Lowest and largest value of each other number.
_NUMBERS = {"temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "repetition_penalty": (0.01, 100.0)}

_MOST_STOP_STRINGS = 64


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. The default is greedy, as in every published PLLaVA script.

    max_tokens: the largest number of tokens to generate. temperature: 0 is greedy. Above 0, tokens are sampled.
    top_k (0: off) and top_p restrict sampling to the most probable tokens. repetition_penalty divides the positive and
    multiplies the negative logits of tokens that the prompt or the answer already has. seed makes a sampled answer
    repeatable, whatever other requests are in the batch. stop: the answer ends before any of these strings.
    ignore_eos: the answer does not end at an end-of-sequence token. logprobs: k returns the k largest log-probabilities
    at each token and the token's own, -1 all of them. n: the number of answers, sampled independently. n above 1 needs
    a temperature above 0, since all greedy answers would be equal. num_beams above 1 searches with so many beams for
    the likeliest answer. Beam search needs temperature 0, and has neither n above 1 nor stop strings nor logprobs.

    Raises RequestError naming the field, its value and the allowed values.
    """

    max_tokens: int = 200
    temperature: float = field(default=0.0, metadata=option("0 (default): the likeliest token", "X"))
    top_p: float = field(default=1.0, metadata=option("sample from the likeliest, up to this sum", "X"))
    top_k: int = field(default=0, metadata=option("sample from the K likeliest (0: all)", "K"))
    repetition_penalty: float = field(default=1.0, metadata=option("above 1: fewer repetitions (default 1: off)", "X"))
    seed: int | None = field(default=None, metadata=option("makes sampled answers repeatable"))
    stop: tuple[str, ...] = ()
    ignore_eos: bool = field(default=False, metadata=option("always generate --max_output_length tokens"))
    logprobs: int | None = None
    n: int = 1
    num_beams: int = field(default=1, metadata=option("above 1: beam search with N beams (default 1: off)"))

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        for name, (lowest, largest) in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is not None or name not in ("seed", "logprobs"):
                error = partial(RequestError, param=name)
                object.__setattr__(self, name, check_whole_number(name, value, lowest, largest, error))
        for name, (least, most) in _NUMBERS.items():
            check_number(name, getattr(self, name), least, most, partial(RequestError, param=name))
        if self.top_p == 0:
            raise RequestError("top_p is 0; it must be above 0 and at most 1", param="top_p")
        if not all(isinstance(s, str) and s for s in self.stop) or len(self.stop) > _MOST_STOP_STRINGS:
            raise RequestError(f"stop must be at most {_MOST_STOP_STRINGS} strings, none of them empty", param="stop")
        self._check_answers()

    @property
    def num_sequences(self) -> int:
        """Sequences that the engine computes together for one request."""
        return max(self.n, self.num_beams)

    def recorded(self) -> dict[str, Any]:
        """The fields by name, for the settings of a run.

        n and num_beams are left out while they are 1, so that results from before these fields can be resumed.
        """
        return {name: value for name, value in asdict(self).items() if name not in ("n", "num_beams") or value > 1}

    def check_streamed(self) -> None:
        """Raises RequestError for options with which no single answer grows."""
        if self.num_sequences > 1:
            name = "num_beams" if self.num_beams > 1 else "n"
            raise RequestError(
                f"{name} is {self.num_sequences}, and a stream has one answer that grows: use generate", param=name
            )

    def _check_answers(self) -> None:
        """Raises RequestError for options that n above 1 or beam search excludes."""
        if self.n > 1 and self.temperature == 0:
            raise RequestError(
                f"n is {self.n} with temperature 0; greedy answers are equal: raise temperature, or n is 1",
                param="n",
            )
        if self.num_beams == 1:
            return
        excluded = {
            "temperature": (self.temperature, 0),
            "n": (self.n, 1),
            "stop": (self.stop, ()),
            "logprobs": (self.logprobs, None),
        }
        for name, (value, allowed) in excluded.items():
            if value != allowed:
                raise RequestError(
                    f"num_beams is {self.num_beams} and {name} is {value!r}; "
                    f"with beam search, leave {name} at {allowed!r}",
                    param=name,
                )
