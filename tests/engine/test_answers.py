"""n answers and beams through the whole engine: the same as alone, whatever they are batched with or cut into."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atb_pllava import LLM, RequestError, RequestOutput, SamplingParams
from atb_pllava.engine.block_manager import full_block_hashes
from atb_pllava.engine.request import Request
from atb_pllava.engine.sampler import SamplingState
from tests.engine.transformers_beams import transformers_hypotheses
from tests.support import (
    EXAMPLES,
    IMAGE_ID,
    TINY,
    assert_same_output,
    free_blocks,
    generate_together,
    load_llm,
    random_frames,
    raw_config,
    run_core,
)

FRAMES = random_frames(3, 4, 70, 90, 3, seed=5)
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # 2 layers, 2 KV heads of 16, float32
THREE = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.95, seed=11, n=3, ignore_eos=True, logprobs=2)
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=2)


def prompts(count: int) -> list[dict[str, Any]]:
    """Requests of different lengths: text only, one video, two videos."""
    requests = []
    for number in range(count):
        videos = number % 3
        text = "USER:" + "<image>" * videos + " what is this" * (1 + 2 * (number % 4)) + f" {number}? ASSISTANT:"
        requests.append({"prompt": text, **({"frames": list(FRAMES[:videos])} if videos else {})})
    return requests


def answers_of(output: RequestOutput) -> list[list[int]]:
    """The tokens of all answers, in their order."""
    assert [answer.index for answer in output.outputs] == list(range(len(output.outputs)))
    assert output.token_ids == output.outputs[0].token_ids and output.text == output.outputs[0].text
    return [answer.token_ids for answer in output.outputs]


def assert_nothing_held(llm: LLM) -> None:
    """No block and no video has a reference, and no sequence is left."""
    core = llm.engine.call(lambda core: core).result()
    free, total = free_blocks(llm)
    assert free == total and set(core.block_manager._ref_count) == {0}
    assert {entry.ref_count for entry in core.encoder_cache._entries.values()} <= {0}
    assert not core.has_work and not core._sequences and not core.scheduler.running


# n answers


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[list[list[int]]]:
    """The three answers to each prompt, one request at a time."""
    llm = load_llm(checkpoint, max_batch_size=3, prefix_cache=False)
    return [answers_of(llm.generate(request, THREE)[0]) for request in prompts(6)]


def test_answers_differ_and_the_first_is_that_of_n_1(checkpoint: Path, alone: list[list[list[int]]]) -> None:
    llm = load_llm(checkpoint)
    for request, answers in zip(prompts(6), alone, strict=True):
        assert len({tuple(answer) for answer in answers}) == 3
        assert llm.generate(request, replace(THREE, n=1))[0].token_ids == answers[0]


def test_answer_i_has_the_random_numbers_of_index_i(checkpoint: Path, alone: list[list[list[int]]]) -> None:
    """Each answer equals that of a single sequence whose sampling state has the index."""
    llm = load_llm(checkpoint)
    core = llm.engine.core
    for request, answers in zip(prompts(3), alone, strict=False):
        for index, answer in enumerate(answers):
            sequence = core.add(llm.prepare(request, replace(THREE, n=1)))
            sequence.sampling = SamplingState(sequence.params, sequence.source.prompt_token_ids, index)
            run_core(core)
            assert sequence.generated == answer


def test_more_answers_begin_with_the_same_ones(checkpoint: Path, alone: list[list[list[int]]]) -> None:
    llm = load_llm(checkpoint, max_batch_size=7)
    assert answers_of(llm.generate(prompts(1), replace(THREE, n=7))[0])[:3] == alone[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_size": 3},
        {"max_batch_size": 5},
        {"max_batch_size": 18},
        {"block_size": 1},
        {"block_size": 16},
        {"block_size": 16, "prefix_cache": False},
        {"prefill_chunk": 7, "block_size": 16, "vision_batch": 1},
        {"prefill_chunk": 1, "block_size": 1, "max_batch_size": 6},
        {"video_cache_bytes": 0},
    ],
    ids=str,
)
def test_batched_answers_equal_those_alone(
    checkpoint: Path, alone: list[list[list[int]]], options: dict[str, Any]
) -> None:
    llm = load_llm(checkpoint, **options)
    outputs = generate_together(llm, prompts(6), THREE)
    assert [answers_of(output) for output in outputs] == alone
    assert all(answer.finish_reason == "length" for output in outputs for answer in output.outputs)
    assert_nothing_held(llm)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_preempted_answers_equal_those_alone(checkpoint: Path, alone: list[list[list[int]]], block_size: int) -> None:
    """The KV cache holds the longest request and a few tokens more."""
    kv_cache_bytes = 208 // block_size * block_size * BYTES_PER_TOKEN
    llm = load_llm(checkpoint, max_batch_size=9, block_size=block_size, kv_cache_bytes=kv_cache_bytes)
    outputs = generate_together(llm, prompts(6), THREE)
    assert llm.engine.stats().core.preemptions > 0
    assert [answers_of(output) for output in outputs] == alone
    assert_nothing_held(llm)


def test_logprobs_of_answers_equal_those_alone(checkpoint: Path) -> None:
    llm = load_llm(checkpoint, block_size=4)
    three = llm.generate(prompts(2)[1], THREE)[0]
    for answer in three.outputs:
        assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)
    one = llm.generate(prompts(2)[1], replace(THREE, n=1))[0]
    for ours, theirs in zip(three.outputs[0].logprobs or [], one.logprobs or [], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=0)


def test_answers_share_the_prompts_work(checkpoint: Path) -> None:
    """One prompt is prefilled and one video encoded, and full blocks of the prompt are shared."""
    llm = load_llm(checkpoint, block_size=4, max_batch_size=8)
    prompt_length = llm.prepare(prompts(2)[1], THREE).prompt_length
    used: list[int] = []
    with llm.engine.recorded_steps() as steps:
        stream = llm.engine.submit(prompts(2)[1], replace(THREE, n=8))
        stream.add_listener(lambda _: used.append(llm.engine.stats().kv_blocks_used))
        output = stream.result()
    assert sum(step.prefilled for step in steps) == prompt_length
    assert sum(step.encoded for step in steps) == 4 and sum(step.sampled for step in steps) == 8 * 20
    assert output.metrics.output_tokens == 8 * 20
    shared = prompt_length // 4
    own = -(-(prompt_length + 19) // 4) - shared
    assert max(used) <= shared + 8 * own


def test_times_of_answers_include_the_prompt(checkpoint: Path) -> None:
    """The answers are forked in the very step that encodes the video and computes the prompt."""
    metrics = load_llm(checkpoint).generate(prompts(2)[1], THREE)[0].metrics
    assert metrics.vision_encode > 0 and metrics.prefill > 0


def test_unseeded_answers_differ(checkpoint: Path) -> None:
    llm = load_llm(checkpoint)
    output = llm.generate(prompts(1), replace(THREE, seed=None, n=4))[0]
    assert len({tuple(answer) for answer in answers_of(output)}) == 4


def test_a_stop_string_ends_one_answer_alone() -> None:
    llm = load_llm(TINY, max_batch_size=4)
    request = {"question": "Describe the video.", "frames": np.zeros((16, 112, 112, 3), np.uint8)}
    params = SamplingParams(max_tokens=16, temperature=1.5, seed=2, n=4)
    whole = llm.generate(request, params)[0].outputs
    words = [word for answer in whole for word in answer.text.split()[1:]]
    stop = next(word for word in words if sum(word in answer.text for answer in whole) == 1)
    stopped = llm.generate(request, replace(params, stop=(stop,)))[0].outputs
    for before, after in zip(whole, stopped, strict=True):
        if stop in before.text:
            assert after.text == before.text[: before.text.index(stop)].strip() and after.finish_reason == "stop"
            assert len(after.token_ids) < len(before.token_ids)
        else:
            assert after == before
    assert_nothing_held(llm)


def test_an_end_of_sequence_token_ends_one_answer_alone(checkpoint: Path, alone: list[list[list[int]]]) -> None:
    llm = load_llm(checkpoint)
    first, second, third = alone[1]
    token = next(token for token in second[3:] if token not in first + third)
    request = replace(llm.prepare(prompts(2)[1], THREE), stop_token_ids=frozenset([token]))
    output = llm.engine.add(request).result()
    assert answers_of(output) == [first, second[: second.index(token) + 1], third]
    assert [answer.finish_reason for answer in output.outputs] == ["length", "stop", "length"]
    assert_nothing_held(llm)


def test_abort_ends_all_answers(checkpoint: Path, alone: list[list[list[int]]]) -> None:
    llm = load_llm(checkpoint, max_batch_size=6)
    core = llm.engine.core
    first = core.add(llm.prepare(prompts(2)[1], THREE))
    other = core.add(llm.prepare(prompts(1)[0], THREE))
    while not other.generated or not first.generated:
        core.step()
    assert len(core.scheduler.running) == 6
    core.abort(first.request_id, 1)
    assert len(core.scheduler.running) == 5
    core.abort(first.request_id)
    core.abort(first.request_id)
    assert len(core.scheduler.running) == 3
    run_core(core)
    assert other.generated == alone[0][0]
    assert_nothing_held(llm)


# Beams


def transformers_llama(checkpoint: Path) -> Any:
    """transformers' LLaMA with the weights of the random checkpoint."""
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw_config()["text_config"])).eval()
    prefix = "language_model."
    weights = load_file(checkpoint / "model.safetensors")
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    llama.load_state_dict(own)
    return llama


def input_embeds(llm: LLM, llama: Any, request: dict[str, Any]) -> Tensor:
    """The prompt's embeddings [1, length, hidden]: rows of the embedding table, and of `encode_video` for images."""
    videos = iter([llm.encode_video(frames) for frames in request.get("frames", ())])
    table = llama.get_input_embeddings()
    rows = [
        next(videos) if token == IMAGE_ID else table(torch.tensor([token]))
        for token in llm.tokenizer.encode(request["prompt"])
    ]
    return torch.cat(rows)[None]


def transformers_beams(llama: Any, embeds: Tensor, num_beams: int, max_tokens: int, eos: Sequence[int]) -> list[int]:
    """The best hypothesis of transformers' beam search, including its end-of-sequence token."""
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    best = transformers_hypotheses(llama, num_beams, max_tokens, eos, inputs_embeds=embeds, attention_mask=mask)[0]
    return best.token_ids


@pytest.fixture(scope="module")
def llama(checkpoint: Path) -> Any:
    return transformers_llama(checkpoint)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return load_llm(checkpoint, max_batch_size=8, block_size=16)


def beams(num_beams: int, max_tokens: int = 20) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, num_beams=num_beams, ignore_eos=True)


def search(llm: LLM, request: dict[str, Any], params: SamplingParams, eos: Sequence[int]) -> RequestOutput:
    """The answer of beam search in the engine, with these end-of-sequence tokens."""
    prepared = replace(llm.prepare(request, params), stop_token_ids=frozenset(eos))
    return llm.engine.add(prepared).result()


@pytest.mark.parametrize("max_tokens", [1, 2, 20])
@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_beams_equal_transformers(llm: LLM, llama: Any, num_beams: int, max_tokens: int) -> None:
    """Over the same input embeddings: text only, one video, two videos."""
    for request in prompts(3):
        embeds = input_embeds(llm, llama, request)
        expected = transformers_beams(llama, embeds, num_beams, max_tokens, ())
        output = llm.generate(request, beams(num_beams, max_tokens))[0]
        assert output.token_ids == expected and len(expected) == max_tokens
        assert output.finish_reason == "length" and len(output.outputs) == 1
    assert_nothing_held(llm)


@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_beams_that_end_equal_transformers(llm: LLM, llama: Any, num_beams: int) -> None:
    """The end-of-sequence tokens are tokens of the answers without one, so that hypotheses end early and late."""
    reasons = set()
    for request in prompts(3):
        embeds = input_embeds(llm, llama, request)
        free = transformers_beams(llama, embeds, num_beams, 20, ())
        greedy = llm.generate(request, GREEDY)[0].token_ids
        for eos in ({free[1]}, {free[4], greedy[9]}, {free[-1]}, {greedy[2], free[12], free[6]}):
            expected = transformers_beams(llama, embeds, num_beams, 20, sorted(eos))
            output = search(llm, request, beams(num_beams), sorted(eos))
            assert output.token_ids == expected
            assert output.finish_reason == ("stop" if expected[-1] in eos else "length")
            reasons.add(output.finish_reason)
    assert "stop" in reasons
    assert_nothing_held(llm)


@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_beams_about_a_video_equal_transformers(monkeypatch: pytest.MonkeyPatch, num_beams: int) -> None:
    """The trained model of this repository, whose answers end by themselves."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tiny_reference import Reference

    reference = Reference(TINY)
    llm = load_llm(TINY, max_batch_size=5)
    clip = EXAMPLES / "videos" / "green_circle_moves_down_then_yellow_square_appears.mp4"
    for question in ("Describe the video.", "What moves?"):
        request = {"prompt": f"USER: <image> {question} ASSISTANT:", "video": clip}
        embeds = reference.embed(request["prompt"], llm.encode_video(clip))
        output = llm.generate(request, SamplingParams(max_tokens=24, num_beams=num_beams))[0]
        assert output.token_ids == transformers_beams(reference.llama, embeds, num_beams, 24, (2,))
        assert output.finish_reason == "stop" and output.text
    assert_nothing_held(llm)


@pytest.fixture(scope="module")
def mixed_alone(checkpoint: Path) -> list[list[list[int]]]:
    """Beams, a greedy answer and n answers in turns, one request at a time."""
    llm = load_llm(checkpoint, max_batch_size=5, prefix_cache=False)
    return [answers_of(llm.generate(request, params)[0]) for request, params in mixed()]


def mixed() -> list[tuple[dict[str, Any], SamplingParams]]:
    kinds = [beams(3), GREEDY, THREE, beams(5, 12), beams(2), replace(GREEDY, max_tokens=9)]
    return list(zip(prompts(6), kinds, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": 5},
        {"max_batch_size": 6},
        {"max_batch_size": 16},
        {"max_batch_size": 16, "block_size": 1},
        {"max_batch_size": 16, "block_size": 4},
        {"max_batch_size": 16, "block_size": 16, "prefix_cache": False},
        {"max_batch_size": 16, "block_size": 16, "prefill_chunk": 7, "vision_batch": 1},
        {"max_batch_size": 16, "block_size": 4, "kv_cache_bytes": 240 * BYTES_PER_TOKEN},
        {"max_batch_size": 16, "block_size": 1, "kv_cache_bytes": 240 * BYTES_PER_TOKEN},
    ],
    ids=str,
)
def test_beams_with_other_requests_equal_those_alone(
    checkpoint: Path, mixed_alone: list[list[list[int]]], options: dict[str, Any]
) -> None:
    llm = load_llm(checkpoint, **options)
    streams = llm.engine.add_all([llm.prepare(request, params) for request, params in mixed()])
    outputs = [stream.result() for stream in streams]
    assert [answers_of(output) for output in outputs] == mixed_alone
    assert ("kv_cache_bytes" in options) == (llm.engine.stats().core.preemptions > 0)
    assert_nothing_held(llm)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_preempted_beams_equal_those_alone(checkpoint: Path, block_size: int) -> None:
    """Two searches whose beams do not fit together. The younger one begins anew."""
    request = prompts(1)[0]
    params = beams(3, 24)
    large = load_llm(checkpoint, block_size=block_size)
    length = large.prepare(request, params).prompt_length
    blocks = -(-(length + 23) // block_size)
    blocks += 2 * (blocks - length // block_size)  # as many as one search needs
    kv_cache_bytes = (blocks + 2) * block_size * BYTES_PER_TOKEN
    small = load_llm(checkpoint, block_size=block_size, kv_cache_bytes=kv_cache_bytes, max_batch_size=6)
    other = {"prompt": request["prompt"].replace("what", "when")}
    first, second = generate_together(small, [request, other], params)
    assert first.metrics.preemptions == 0 < second.metrics.preemptions
    for output, asked in ((first, request), (second, other)):
        assert output.token_ids == large.generate(asked, params)[0].token_ids
    assert_nothing_held(small)


@pytest.mark.parametrize("params", [beams(5), replace(THREE, n=5), GREEDY], ids=["beams", "answers", "greedy"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_cached_blocks_hold_what_their_hashes_say(checkpoint: Path, params: SamplingParams, block_size: int) -> None:
    """A later prompt that continues an earlier answer takes the blocks of that answer from the prefix cache."""
    llm = load_llm(checkpoint, block_size=block_size)
    cold = load_llm(checkpoint, block_size=block_size, prefix_cache=False)
    first = llm.prepare(prompts(2)[1], params)
    for answer in answers_of(llm.engine.add(first).result()):
        whole = [*first.token_ids, *answer, 5]
        follow_up = replace(llm.prepare(prompts(2)[1], GREEDY), token_ids=whole)
        output = llm.engine.add(follow_up).result()
        assert output.num_cached_tokens == (len(whole) - 2) // block_size * block_size  # the last token was not fed
        follow_up = replace(cold.prepare(prompts(2)[1], GREEDY), token_ids=whole)
        assert_same_output(output, cold.engine.add(follow_up).result())
    assert_nothing_held(llm)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_blocks_and_hashes_fit_the_tokens_at_every_step(checkpoint: Path, block_size: int) -> None:
    """With beams, n answers and greedy ones that are preempted: every hash is that of the sequence's own tokens.

    Every reference to a block belongs to a running sequence. A preempted search begins anew with other first beams.
    """
    kv_cache_bytes = 240 // block_size * block_size * BYTES_PER_TOKEN
    core = load_llm(checkpoint, block_size=block_size, max_batch_size=16, kv_cache_bytes=kv_cache_bytes).engine.core
    llm = load_llm(checkpoint)
    for request, params in mixed():
        core.add(llm.prepare(request, params))
    while core.has_work:
        core.step()
        running = core.scheduler.running
        for sequence in (*running, *core.scheduler.waiting):
            fresh = Request(sequence.source, list(sequence.token_ids), sequence.sampling, [])
            expected = full_block_hashes(fresh, len(sequence.token_ids), block_size)
            assert sequence.block_hashes == expected[: len(sequence.block_hashes)]
        held = Counter(block for sequence in running for block in sequence.blocks)
        assert core.block_manager._ref_count == [held[block] for block in range(core.block_manager.total)]
    assert core.counters.preemptions > 0


def test_abort_ends_all_beams(checkpoint: Path) -> None:
    llm = load_llm(checkpoint, max_batch_size=8, block_size=4)
    core = llm.engine.core
    search, greedy = (core.add(llm.prepare(prompts(2)[1], params)) for params in (beams(5), GREEDY))
    for _ in range(6):
        core.step()
    assert len(core.scheduler.running) == 6
    core.abort(search.request_id)
    assert core.scheduler.running == [greedy]
    run_core(core)
    assert len(greedy.generated) == 20
    assert_nothing_held(llm)


def test_beams_have_one_delta(llm: LLM) -> None:
    stream = llm.engine.submit(prompts(1)[0], beams(3))
    (delta,) = list(stream)
    output = stream.result()
    assert (delta.index, delta.text, delta.token_ids, delta.finish_reason) == (
        0,
        output.text,
        output.token_ids,
        "length",
    )


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3, "temperature": 0.5}, "num_beams is 3 and temperature is 0.5"),
        ({"num_beams": 3, "n": 2, "temperature": 1.0}, "num_beams is 3 and temperature is 1.0"),
        ({"num_beams": 3, "stop": "a"}, "num_beams is 3 and stop is ..a.,."),
        ({"num_beams": 3, "logprobs": 1}, "num_beams is 3 and logprobs is 1"),
        ({"n": 2}, "n is 2 with temperature 0"),
        ({"n": 17, "temperature": 1.0}, "n is 17; it must be a whole number from 1 to 16"),
        ({"num_beams": 17}, "num_beams is 17; it must be a whole number from 1 to 16"),
        ({"n": 0}, "n is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"n": 9, "temperature": 1.0}, "n is 9, and the engine runs 8 sequences at a time.*--max_batch_size 9"),
        ({"num_beams": 9}, "num_beams is 9, and the engine runs 8 sequences at a time.*--max_batch_size 9"),
    ],
)
def test_combinations_that_cannot_work(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate({"question": "why?"}, **options)
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_beams": 3}, "num_beams is 3, and a stream"), ({"n": 2, "temperature": 1.0}, "n is 2, and a stream")],
)
def test_streams_have_one_answer(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.stream(None, "why?", **options)


def test_beams_that_exceed_the_kv_cache(checkpoint: Path) -> None:
    """One beam fits, and three do not. The largest number of tokens that fits is served."""
    llm = load_llm(checkpoint, block_size=4, kv_cache_bytes=100 * BYTES_PER_TOKEN)
    request = {"prompt": "why"}
    length = llm.prepare(request, GREEDY).prompt_length
    full = length // 4

    def fits(max_tokens: int) -> bool:
        blocks = -(-(length + max_tokens - 1) // 4)
        return blocks + 2 * (blocks - full) <= 25

    most = max(filter(fits, range(1, 100)))
    assert len(llm.generate(request, beams(3, most))[0].token_ids) == most
    with pytest.raises(RequestError, match="more are wanted in 3 beams, but the KV cache holds 100 tokens"):
        llm.generate(request, beams(3, most + 1))
    assert len(llm.generate(request, replace(GREEDY, max_tokens=most + 1))[0].token_ids) == most + 1
    assert_nothing_held(llm)
