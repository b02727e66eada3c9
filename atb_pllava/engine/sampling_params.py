"""How the tokens of an answer are chosen: the options of one request."""

from dataclasses import dataclass, field

from atb_pllava.config import option
from atb_pllava.errors import RequestError, check_number, check_whole_number

# Lowest and largest value of each whole number in SamplingParams. seed and logprobs may also be None.
_WHOLE_NUMBERS = {"max_tokens": (1, 2**31), "top_k": (0, 2**31), "seed": (0, 2**63 - 1), "logprobs": (-1, 2**31)}

_MOST_STOP_STRINGS = 64


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. The default is greedy, as in every published PLLaVA script.

    max_tokens: the largest number of tokens to generate. temperature: 0 is greedy. Above 0, tokens are sampled.
    top_k (0: off) and top_p restrict sampling to the most probable tokens. repetition_penalty divides the positive and
    multiplies the negative logits of tokens that the prompt or the answer already has. seed makes a sampled answer
    repeatable, whatever other requests are in the batch. stop: the answer ends before any of these strings.
    ignore_eos: the answer does not end at an end-of-sequence token. logprobs: k returns the k largest
    log-probabilities of each token, -1 all of them.

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
    num_beams: int = 1

    @property
    def num_sequences(self) -> int:
        """Sequences that the engine computes together for one request."""
        return max(self.n, self.num_beams)

    def check_streamed(self) -> None:
        """Raises RequestError for options that need the whole answer before its first piece."""
        if self.num_sequences > 1:
            name = "num_beams" if self.num_beams > 1 else "n"
            raise RequestError(f"{name} is {self.num_sequences}, and a stream has one answer that grows: use generate")

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        for name, (lowest, largest) in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is not None or name not in ("seed", "logprobs"):
                object.__setattr__(self, name, check_whole_number(name, value, lowest, largest, RequestError))
        check_number("temperature", self.temperature, 0.0, 100.0, RequestError)
        check_number("top_p", self.top_p, 0.0, 1.0, RequestError)
        if self.top_p == 0:
            raise RequestError("top_p is 0; it must be above 0 and at most 1")
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0, RequestError)
        if not all(isinstance(s, str) and s for s in self.stop) or len(self.stop) > _MOST_STOP_STRINGS:
            raise RequestError(f"stop must be at most {_MOST_STOP_STRINGS} strings, none of them empty")
