"""Beam search against transformers' own `generate`, over the same logits."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from atb_pllava.engine.beam_search import BeamSearch, Hypothesis
from atb_pllava.errors import BackendError
from tests.engine.transformers_beams import transformers_hypotheses
from tests.support import EXAMPLES, TINY, random_frames

transformers = pytest.importorskip("transformers")

VOCABULARY = 48
PROMPT = [1, 7, 9, 9, 30]


def random_llama(seed: int, eos: Sequence[int] = (), likelier: float = 0.0):
    """A small LLaMA with peaked logits. `likelier` is added to the logits of the end-of-sequence tokens.

    The weights are float64, so that the float32 logits do not depend on the number of rows in a batch.
    """
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).double().eval()
    head = torch.nn.Linear(32, VOCABULARY, dtype=torch.float64)
    head.weight.data.normal_(0, 0.4)
    head.bias.data.zero_()
    head.bias.data[list(eos)] = likelier
    model.lm_head = head
    return model


@torch.no_grad()
def run(search: BeamSearch, logits_of: Callable[[list[list[int]]], Tensor]) -> list[Hypothesis]:
    """All hypotheses of a search. `logits_of` maps the tokens of the running beams to their next logits."""
    tokens = search.tokens
    while not search.is_finished:
        parents = search.step(logits_of(tokens).float())
        assert [beam[:-1] for beam in search.tokens] == [tokens[parent] for parent in parents]
        tokens = search.tokens
    return search.finished


def assert_same_hypotheses(ours: list[Hypothesis], theirs: list[Hypothesis]) -> None:
    assert [(h.token_ids, h.is_stopped) for h in ours] == [(h.token_ids, h.is_stopped) for h in theirs]
    assert [h.score for h in ours] == pytest.approx([h.score for h in theirs], rel=1e-5)


def assert_equals_transformers(model, num_beams: int, max_tokens: int, eos: Sequence[int], penalty: float) -> None:
    search = BeamSearch(num_beams, max_tokens, frozenset(eos), penalty, PROMPT)
    ours = run(search, lambda tokens: model(torch.tensor([PROMPT + beam for beam in tokens])).logits[:, -1])
    options = {"input_ids": torch.tensor([PROMPT]), "repetition_penalty": penalty}
    assert_same_hypotheses(ours, transformers_hypotheses(model, num_beams, max_tokens, eos, **options))
    assert search.best() == ours[0]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("eos", [(), (2,), (2, 11, 40)], ids=["no_eos", "one_eos", "three_eos"])
@pytest.mark.parametrize("num_beams", [2, 3, 4, 5, 8])
def test_hypotheses_equal_transformers(num_beams: int, eos: tuple[int, ...], penalty: float) -> None:
    generator = random.Random(f"{num_beams} {eos} {penalty}")
    for likelier in (1.0, 3.0):
        model = random_llama(generator.randrange(2**32), eos, likelier)
        assert_equals_transformers(model, num_beams, generator.randint(1, 20), eos, penalty)


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_short_answers_equal_transformers(max_tokens: int) -> None:
    """The first and the last step are special: one beam starts, and every beam ends."""
    for seed in range(5):
        assert_equals_transformers(random_llama(seed, (2,), 3.0), 4, max_tokens, (2,), 1.0)


@pytest.mark.parametrize("seed", [84, 133, 172])
def test_more_candidates_than_two_a_beam(seed: int) -> None:
    """With these weights, ending tokens take more than four of the best eight candidates of four beams."""
    eos = (2, 5, 11, 20, 33, 40)
    assert_equals_transformers(random_llama(seed, eos, 4.0), 4, 12, eos, 1.0)


def test_one_beam_is_greedy() -> None:
    for seed in range(5):
        assert_equals_greedy(random_llama(seed, (2,), 2.0), max_tokens=20, eos=2)


@torch.no_grad()
def assert_equals_greedy(model, max_tokens: int, eos: int) -> None:
    search = BeamSearch(1, max_tokens, frozenset([eos]), prompt_token_ids=PROMPT)
    ours = run(search, lambda tokens: model(torch.tensor([PROMPT + beam for beam in tokens])).logits[:, -1])
    prompt = torch.tensor([PROMPT])
    greedy = model.generate(prompt, max_new_tokens=max_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0)
    assert [h.token_ids for h in ours] == [greedy[0, len(PROMPT) :].tolist()]


def test_answers_about_a_video_equal_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained model of this repository, over the same embeddings of the prompt and the video."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tiny_reference import Reference

    reference = Reference(TINY)
    video = reference.video_embeds(random_frames(16, 112, 112, 3, seed=0))
    prompt = reference.embed("USER: <image> Describe the video. ASSISTANT:", video)
    theirs = transformers_hypotheses(reference.llama, 3, 12, (2,), inputs_embeds=prompt)
    ours = run(BeamSearch(3, 12, frozenset([2])), logits_after(reference.llama, prompt))
    assert theirs[0].is_stopped
    assert_same_hypotheses(ours, theirs)


def logits_after(llama, prompt: Tensor) -> Callable[[list[list[int]]], Tensor]:
    """The next logits of beams, by LLaMA and the embeddings [1, length, hidden] of the prompt."""

    def logits_of(tokens: list[list[int]]) -> Tensor:
        generated = llama.get_input_embeddings()(torch.tensor(tokens, dtype=torch.int64))
        return llama(inputs_embeds=torch.cat([prompt.expand(len(tokens), -1, -1), generated], 1)).logits[:, -1]

    return logits_of


def test_fewer_tokens_than_beams_start_fewer_beams() -> None:
    """Two tokens give 2 and then 4 running beams. The third step ranks all 8 hypotheses and keeps the best 5."""
    search = BeamSearch(5, 3, frozenset())
    table = torch.tensor([[0.0, 0.7], [1.0, -0.4]]).double().log_softmax(-1)
    hypotheses = run(search, lambda tokens: table[[beam[-1] if beam else 0 for beam in tokens]])
    every = [[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    scores = {tuple(x): float(table[0, x[0]] + table[x[0], x[1]] + table[x[1], x[2]]) / 3 for x in every}
    expected = sorted(every, key=lambda x: -scores[tuple(x)])[:5]
    assert_same_hypotheses(hypotheses, [Hypothesis(x, scores[tuple(x)], False) for x in expected])


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_broken_logits_are_refused(broken: float) -> None:
    search = BeamSearch(2, 8, frozenset([2]))
    search.step(torch.arange(8.0)[None])
    logits = torch.zeros(2, 8)
    logits[1, 3] = broken
    with pytest.raises(BackendError, match="not finite"):
        search.step(logits)
