"""Tokens from logits: transformers' and torch's results, one copy from the device, and no dependence on the batch."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atb_pllava import RequestError, SamplingParams
from atb_pllava.engine.logits_processors import keep_top_k, keep_top_p, penalise, weights_of
from atb_pllava.engine.sampler import SampledToken, SamplingState, draw, sample

VOCAB = 1000  # four blocks of `draw`, the last one not full
PROMPT = [5, 7, 7, 900]


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return 4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def states_of(*options: dict[str, Any], prompt: list[int] = PROMPT) -> list[SamplingState]:
    return [SamplingState(SamplingParams(**some), prompt) for some in options]


def tokens_of(logits: Tensor, states: list[SamplingState]) -> list[int]:
    return [sampled.token for sampled in sample(logits, states)]


def assert_equal(left: SampledToken | None, right: SampledToken | None) -> None:
    assert (left is None) == (right is None)
    if left is not None and right is not None:
        assert left.token == right.token
        np.testing.assert_equal(left.logprobs, right.logprobs)  # bitwise, for an array, a dict and None


def warped(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """transformers' probabilities [L, V] in float64."""
    process = pytest.importorskip("transformers.generation.logits_process")
    scores = process.TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k:
        scores = process.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = process.TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(1)


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Our probabilities [L, V]."""
    weights = weights_of(logits, torch.full((len(logits), 1), temperature))
    if top_k:
        weights = keep_top_k(weights, logits, torch.full((len(logits), 1), float(top_k)), top_k)
    if top_p < 1:
        weights = keep_top_p(weights, torch.full((len(logits), 1), top_p))
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-3])
@pytest.mark.parametrize("top_k", [0, 1, 20, VOCAB - 1])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 30.0])
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits(6)
    expected = warped(logits, temperature, top_k, top_p)
    ours = probabilities(logits, temperature, top_k, top_p)
    assert torch.equal(ours > 1e-13, expected > 1e-13), "the same tokens are kept"
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=1e-13)


def test_a_nucleus_of_most_of_a_large_vocabulary() -> None:
    logits = random_logits(3, 32064) / 10
    expected = warped(logits, 1.0, 0, 0.9)
    assert int((expected > 0).sum(1).min()) > 10_000
    assert torch.equal(probabilities(logits, 1.0, 0, 0.9) > 0, expected > 0)


def test_ties_stay_or_go_together() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 2.0, 1.0, 0.0]])
    assert (probabilities(logits, 1.0, 2, 1.0) > 0).tolist() == [[False, True, True, True, True, False]]
    first = float(logits.softmax(1)[0, 3])
    for top_p, kept in [(first - 0.01, 1), (first + 0.01, 4), (0.85, 4), (0.9, 6)]:
        assert int((probabilities(logits, 1.0, 0, top_p) > 0).sum()) == kept


@pytest.mark.parametrize("penalty", [0.5, 1.7])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process").RepetitionPenaltyLogitsProcessor(penalty)
    logits = random_logits(3)
    prompts = [[1, 2, 2, 3], [], [999, 0, 500]]
    seen = [np.unique(np.array(prompt, np.int64)) for prompt in prompts]
    before = logits.clone()
    ours = penalise(logits, seen, [penalty, 3.0, penalty])
    for row, prompt in enumerate(prompts):
        expected = process(torch.tensor([prompt], dtype=torch.long), before[row : row + 1].clone())
        assert torch.equal(ours[row], expected[0])
    assert torch.equal(logits, before), "the model's logits stay for the log-probabilities"


def test_the_prompt_and_the_answer_are_penalised() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 33, 44]] = torch.tensor([3.0, 2.5, 2.0])
    (state,) = states_of({"repetition_penalty": 2.0})
    answer = []
    for _ in range(3):
        (token,) = tokens_of(logits, [state])
        state.append(token)
        answer.append(token)
    assert answer == [33, 44, 7], "7 is in the prompt and counts 1.5, then 33 counts 1.25 and 44 counts 1"


def test_greedy_is_argmax() -> None:
    logits = random_logits(9)
    assert tokens_of(logits, states_of(*[{}] * 9)) == logits.argmax(1).tolist()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}, {"temperature": 1e-300}])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e30])
def test_narrow_sampling_is_greedy(options: dict[str, Any], scale: float) -> None:
    logits = random_logits(20) * scale
    states = states_of(*({"temperature": 1.0, "seed": seed, **options} for seed in range(20)))
    assert tokens_of(logits, states) == logits.argmax(1).tolist()


MIXED = [
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.2, "top_k": 7, "seed": 2, "logprobs": 4},
    {"temperature": 1.0, "top_p": 0.7, "seed": 3},
    {"repetition_penalty": 1.3, "logprobs": -1},
    {"temperature": 2.0, "top_k": 300, "top_p": 0.9, "repetition_penalty": 0.8, "seed": 4, "logprobs": 0},
    {"temperature": 1.0, "top_k": 40, "seed": 2, "logprobs": 2},
    {"top_k": 3, "top_p": 0.5, "logprobs": 4},
    {"temperature": 1.0, "top_p": 0.2, "top_k": 2**31, "seed": 5, "logprobs": 2**31},
]


@pytest.mark.parametrize("vocab", [64, VOCAB, 32064])
def test_a_row_does_not_depend_on_the_others(vocab: int) -> None:
    prompt = [token % vocab for token in PROMPT]
    alone = states_of(*MIXED, prompt=prompt)
    batched = states_of(*MIXED, prompt=prompt)
    order = np.random.default_rng(0)
    for step in range(5):
        logits = random_logits(len(MIXED), vocab, seed=step)
        logits[step % 2, 3] = float("nan")
        rows = order.permutation(len(MIXED)).tolist()
        outcome = dict(zip(rows, sample(logits[rows], [batched[row] for row in rows]), strict=True))
        for row, state in enumerate(alone):
            (expected,) = sample(logits[row : row + 1], [state])
            assert_equal(outcome[row], expected)
            assert (expected is None) == (row == step % 2)
            for one in (state, batched[row]):
                one.append(step if expected is None else expected.token)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", MIXED)
def test_a_row_that_is_not_finite_is_none(bad: float, options: dict[str, Any]) -> None:
    logits = random_logits(3)
    logits[1, 17] = bad
    logits[2] = 1e30
    first, second, third = sample(logits, states_of(options, options, options))
    assert first is not None and second is None and third is not None


def test_log_probabilities_are_the_models() -> None:
    logits = random_logits(len(MIXED))
    expected = logits.log_softmax(1)
    for options, row, sampled in zip(MIXED, expected, sample(logits, states_of(*MIXED)), strict=True):
        count = options.get("logprobs")
        if count is None:
            assert sampled.logprobs is None
        elif count < 0:
            assert sampled.logprobs.dtype == np.float32 and sampled.logprobs.base is None
            np.testing.assert_array_equal(sampled.logprobs, row.numpy())
        else:
            best = row.topk(min(count, VOCAB))
            largest = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            assert list(sampled.logprobs.items()) == list({**largest, sampled.token: float(row[sampled.token])}.items())


@pytest.mark.parametrize("vocab", [64, VOCAB, 32064])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_chosen_token_has_its_log_probability(vocab: int, count: int) -> None:
    """Temperature 100 chooses nearly evenly, so that most chosen tokens are not among the largest."""
    many = [{"temperature": 100.0, "seed": seed, "logprobs": count} for seed in range(20)]
    states = states_of(*many, {"logprobs": count}, {"repetition_penalty": 5.0, "logprobs": count}, prompt=[3])
    logits = random_logits(len(states), vocab)
    logits[-1, 3] = 50.0  # the likeliest token, until the penalty
    expected = logits.log_softmax(1)
    outside = 0
    for row, sampled in zip(expected, sample(logits, states), strict=True):
        largest = row.topk(count).indices.tolist()
        others = [] if sampled.token in largest else [sampled.token]
        assert list(sampled.logprobs) == largest + others
        assert list(sampled.logprobs.values()) == row[largest + others].tolist()
        outside += len(others)
    assert outside > 10


def test_random_numbers_depend_on_seed_index_and_position_only() -> None:
    def numbers(seed: int | None, index: int, count: int = 5) -> list[tuple[float, float]]:
        state = SamplingState(SamplingParams(temperature=1.0, seed=seed), PROMPT, index)
        seen = []
        for token in range(count):
            seen.append(state.uniforms)
            state.append(token)
        return seen

    assert numbers(3, 0) == numbers(3, 0) == numbers(3, 0, count=9)[:5]
    kinds = [numbers(3, 0), numbers(3, 1), numbers(4, 0), numbers(None, 0), numbers(None, 0), numbers(2**63 - 1, 0)]
    assert len({number for kind in kinds for pair in kind for number in pair}) == 6 * 5 * 2
    # numpy's own stream: four words a token, the first two of which count.
    words = np.random.Philox(key=np.array([3, 1], np.uint64)).random_raw(4 * 5).reshape(5, 4)
    np.testing.assert_array_equal(numbers(3, 1), words[:, :2] / 2**64)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_fork_has_its_own_numbers_and_tokens(steps: int) -> None:
    params = SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.1)
    first = SamplingState(params, PROMPT)
    second = SamplingState(params, PROMPT, index=2)
    for token in range(steps):
        first.append(token)
        second.append(token)
    forked = first.fork(2)
    for token in range(20, 24):
        assert forked.uniforms == second.uniforms != first.uniforms
        assert forked.seen.tolist() == second.seen.tolist()
        forked.append(token)
        second.append(token)
    assert first.seen.tolist() == [5, 7, 900, *range(steps)]
    unseeded = SamplingState(SamplingParams(temperature=1.0), PROMPT)
    assert unseeded.fork(0).uniforms == unseeded.uniforms != unseeded.fork(1).uniforms


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.8}, {"repetition_penalty": 1.5}])
def test_frequencies(options: dict[str, Any]) -> None:
    """Chi-square against float64 probabilities, with fixed seeds."""
    draws = 6_000
    logits = random_logits(1, 300, seed=4) / 2
    states = states_of(*({"temperature": 1.3, "seed": seed, **options} for seed in range(draws)), prompt=[3, 4])
    counts = Counter(tokens_of(logits.expand(draws, -1), states))
    penalised = penalise(logits, [np.array([3, 4])], [options.get("repetition_penalty", 1.0)])
    expected = draws * warped(penalised, 1.3, options.get("top_k", 0), options.get("top_p", 1.0))[0]
    assert all(expected[token] > 0 for token in counts)
    common = [token for token in range(300) if expected[token] >= 5]
    observed = [counts[token] for token in common]
    wanted = expected[common].tolist()
    observed.append(draws - sum(observed))
    wanted.append(draws - sum(wanted))
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True) if w > 1e-6)
    freedom = len(common)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("light", [0, 255, 256, 999])
def test_a_probability_of_1e_9_is_neither_impossible_nor_certain(light: int) -> None:
    """The token of weight 1 is in the block of the light one, or in another block."""
    weights = torch.zeros(1, VOCAB)
    weights[0, 100] = 1.0
    weights[0, light] = 1e-9

    def at(block: float, token: float) -> int:
        return int(draw(weights, torch.tensor([[block, token]], dtype=torch.float32)))

    same_block = light < 256
    for number, token in [(0.0, light), (0.999e-9, light), (1.001e-9, 100), (0.5, 100), (1.0, 100)]:
        assert (at(0.5, number) if same_block else at(number, 0.5)) == token


def test_draw_has_the_probabilities_of_float64() -> None:
    """The interval of the numbers that give a token, found by bisection, is as long as the token is probable."""
    weights = torch.rand(1, 256, generator=torch.Generator().manual_seed(2)) ** 12
    expected = (weights.double() / weights.double().sum())[0]
    low = torch.zeros(255, dtype=torch.float64)
    high = torch.ones(255, dtype=torch.float64)
    order = weights[0].argsort(stable=True)
    rank = torch.empty(256, dtype=torch.long)
    rank[order] = torch.arange(256)
    for _ in range(60):  # the number from which on the k-th smallest weight is passed
        middle = (low + high) / 2
        uniforms = torch.stack([torch.full_like(middle, 0.5), middle], dim=1).float()
        passed = rank[draw(weights.expand(255, -1), uniforms)] > torch.arange(255)
        low, high = torch.where(passed, low, middle), torch.where(passed, middle, high)
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), high, torch.ones(1, dtype=torch.float64)])
    torch.testing.assert_close(ends.diff(), expected[order], rtol=1e-4, atol=1e-12)


class CopyCounter(TorchDispatchMode):
    """Counts the copies from the meta device to the host and back. A copy to the host gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.to_host = 0
        self.to_device = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            source = args[0].device.type
            target = torch.device(kwargs["device"]).type
            if (source, target) == ("meta", "cpu"):
                self.to_host += 1
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
            self.to_device += (source, target) == ("cpu", "meta")
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("options", "to_device"),
    [([{}], 0), ([{}] * 8, 0), ([{"temperature": 1.0}] * 8, 1), ([{"logprobs": 5}, {"logprobs": -1}], 0), (MIXED, 2)],
)
def test_one_copy_from_the_device(options: list[dict[str, Any]], to_device: int) -> None:
    """A meta tensor has no data: anything that needs a value of it on the host raises, except the counted copy."""
    logits = torch.empty(len(options), VOCAB, device="meta")
    with CopyCounter() as counter:
        sample(logits, states_of(*options))
    assert (counter.to_host, counter.to_device) == (1, to_device)
    with pytest.raises((RuntimeError, NotImplementedError)), CopyCounter():
        int(logits[0, 0])


def test_no_rows() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


BAD = {
    "max_tokens": [0, -1, 1.5, True],
    "temperature": [-1, float("nan"), float("inf"), "hot"],
    "top_p": [0, 1.1],
    "top_k": [-1],
    "repetition_penalty": [0],
    "seed": [-1, 2**64],
    "stop": [("",), (3,), ("a",) * 65],
    "logprobs": [-2],
    "n": [0, 17, 1.5, None],
    "num_beams": [0, 17, True, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_sampling_parameters(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_several_answers_need_a_temperature() -> None:
    with pytest.raises(RequestError, match="n is 2 with temperature 0; greedy answers are equal"):
        SamplingParams(n=2)
    assert SamplingParams(n=16, temperature=0.5).n == 16


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": 0.5}, "temperature is 0.5; with beam search, leave temperature at 0"),
        ({"temperature": 0.5, "n": 2}, "temperature is 0.5"),
        ({"stop": "a"}, r"stop is \('a',\)"),
        ({"logprobs": 0}, "logprobs is 0; with beam search, leave logprobs at None"),
    ],
)
def test_what_beam_search_excludes(option: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"num_beams is 4 and {message}"):
        SamplingParams(num_beams=4, **option)
    assert SamplingParams(num_beams=16, repetition_penalty=1.2, ignore_eos=True).num_beams == 16
