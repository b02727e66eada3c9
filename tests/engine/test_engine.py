"""The engine: whatever a request is batched with, cut into or interrupted by, its answer stays the same."""

from dataclasses import replace

import pytest
import torch

from atb_pllava import BackendError, RequestError, SamplingParams
from atb_pllava.engine.block_manager import BlockManager, plan_blocks
from atb_pllava.engine.request import Request, RequestStatus
from atb_pllava.errors import ConfigError
from tests.support import assert_same_outputs, free_blocks, generate_together, load_llm, random_frames

FRAMES = random_frames(3, 4, 70, 90, 3, seed=5)
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=3)


def prompts(count: int) -> list[dict]:
    """Requests of different lengths: text only, one video, two videos."""
    requests = []
    for i in range(count):
        videos = i % 3
        text = "USER:" + "<image>" * videos + " what is this" * (1 + 5 * (i % 4)) + f" {i}? ASSISTANT:"
        requests.append({"prompt": text, **({"frames": list(FRAMES[:videos])} if videos else {})})
    return requests


@pytest.fixture(scope="module")
def alone(checkpoint) -> list:
    llm = load_llm(checkpoint, max_batch_size=1)
    return [llm.generate(request, PARAMS)[0] for request in prompts(9)]


def test_batched_equals_alone(checkpoint, alone) -> None:
    assert_same_outputs(load_llm(checkpoint, max_batch_size=9).generate(prompts(9), PARAMS), alone)


@pytest.mark.parametrize("block_size", [1, 16, 100])
def test_block_size_does_not_matter(checkpoint, alone, block_size: int) -> None:
    assert_same_outputs(
        load_llm(checkpoint, max_batch_size=3, block_size=block_size).generate(prompts(9), PARAMS), alone
    )


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunked_prefill_equals_whole(checkpoint, alone, chunk: int) -> None:
    llm = load_llm(checkpoint, max_batch_size=4, prefill_chunk=chunk, block_size=16, vision_batch=1)
    assert_same_outputs(llm.generate(prompts(9), PARAMS), alone)


def test_preemption_changes_nothing(checkpoint, alone) -> None:
    per_block = 2 * 2 * 2 * 16 * 4 * 16  # 2 layers, 2 KV heads of 16, float32, 16 tokens
    llm = load_llm(checkpoint, max_batch_size=9, block_size=16, kv_cache_bytes=24 * per_block)
    outputs = generate_together(llm, prompts(9), PARAMS)
    assert sum(out.metrics.preemptions for out in outputs) > 0
    assert_same_outputs(outputs, alone)
    free, total = free_blocks(llm)
    assert free == total


def test_decoding_requests_are_served_in_every_step_of_a_long_prefill(checkpoint) -> None:
    llm = load_llm(checkpoint, prefill_chunk=8)
    core = llm.engine.core
    first = core.add(llm.prepare(prompts(1)[0], PARAMS))
    while not first.generated:
        core.step()
    long = core.add(llm.prepare({"prompt": "USER:<image>" + " why" * 25, "frames": FRAMES[0]}, PARAMS))
    steps = 0
    while not long.generated and not first.is_finished:
        before = len(first.generated)
        core.step()
        steps += 1
        assert len(first.generated) == before + 1
    assert steps >= 15 and long.generated, "about 120 tokens in chunks of 8, while the first request decodes 24"


def test_frames_of_several_videos_share_the_encoder_budget(checkpoint) -> None:
    llm = load_llm(checkpoint, vision_batch=3)
    core = llm.engine.core
    decoding = core.add(llm.prepare({"prompt": "why"}, PARAMS))
    while not decoding.generated:
        core.step()
    for frames in FRAMES[:2]:
        core.add(llm.prepare({"prompt": "<image> why", "frames": frames}, PARAMS))
    encoded = []
    while core.scheduler.num_decoding < 3:
        encoded.append(core.step()[1].encoded)
    assert encoded[:3] == [3, 3, 2], "4 frames of each of two videos, 3 in a step beside a decoding request"


def test_abort_gives_everything_back(checkpoint, alone) -> None:
    llm = load_llm(checkpoint)
    streams = llm.engine.add_all([llm.prepare(request, PARAMS) for request in prompts(4)])
    for stream in streams[:3]:
        stream.abort()
    assert streams[3].result().token_ids == alone[3].token_ids
    with pytest.raises(RequestError, match="aborted"):
        streams[0].result()
    free, total = free_blocks(llm)
    assert free == total and not llm.engine.call(lambda core: core.has_work).result()


def test_stream_joins_to_the_answer_and_can_be_closed(checkpoint) -> None:
    llm = load_llm(checkpoint)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    pieces = list(llm.stream(FRAMES[0], "what is it?", params))
    assert "".join(pieces) == llm.chat(FRAMES[0], "what is it?", params).text
    assert len(pieces) > 1
    stream = llm.stream(FRAMES[0], "what is it?", params)
    next(stream)
    stream.close()
    assert not llm.engine.has_work
    llm.stream(FRAMES[0], "never read", params)
    assert not llm.engine.has_work


def test_interleaved_streams_do_not_mix(checkpoint) -> None:
    llm = load_llm(checkpoint)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    questions = ["what is it?", "why?", "when is it?"]
    streams = [llm.stream(FRAMES[i], q, params) for i, q in enumerate(questions)]
    texts = ["", "", ""]
    for _ in range(60):
        for i, stream in enumerate(streams):
            texts[i] += next(stream, "")
    assert texts == [load_llm(checkpoint).chat(FRAMES[i], q, params).text for i, q in enumerate(questions)]


def test_seeded_sampling_does_not_depend_on_the_batch(checkpoint) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.5, top_p=0.9, top_k=50, seed=7, ignore_eos=True)
    batched = load_llm(checkpoint).generate(prompts(4), params)
    single = load_llm(checkpoint, max_batch_size=1)
    assert [out.token_ids for out in batched] == [single.generate(r, params)[0].token_ids for r in prompts(4)]
    other = SamplingParams(max_tokens=16, temperature=1.5, seed=8, ignore_eos=True)
    assert single.generate(prompts(1), other)[0].token_ids != batched[0].token_ids


def test_top_k_1_and_tiny_top_p_are_greedy(checkpoint, alone) -> None:
    llm = load_llm(checkpoint)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}):
        params = SamplingParams(max_tokens=24, temperature=1.0, ignore_eos=True, **narrow)
        assert [out.token_ids for out in llm.generate(prompts(3), params)] == [out.token_ids for out in alone[:3]]


def test_any_temperature_above_zero_works(checkpoint, alone) -> None:
    llm = load_llm(checkpoint)
    cold = SamplingParams(max_tokens=24, temperature=1e-40, ignore_eos=True)
    assert llm.generate(prompts(1), cold)[0].token_ids == alone[0].token_ids
    assert llm.generate(prompts(1), SamplingParams(max_tokens=3, temperature=100.0, top_k=5, stop=None))[0].token_ids


def test_a_stop_string_in_the_last_token_counts(checkpoint, alone) -> None:
    llm = load_llm(checkpoint)
    whole = SamplingParams(max_tokens=9, ignore_eos=True)
    text = llm.generate(prompts(1), whole)[0].text
    out = llm.generate(prompts(1), SamplingParams(max_tokens=9, ignore_eos=True, stop=(text[-1:],)))[0]
    assert out.finish_reason == "stop" and text[-1:] not in out.text


def test_waiting_time_is_never_negative(checkpoint) -> None:
    llm = load_llm(checkpoint, vision_batch=1, max_batch_size=4)
    assert all(out.metrics.queue >= -1e-3 for out in llm.generate(prompts(8), SamplingParams(max_tokens=2)))


def test_logprobs_rows(checkpoint) -> None:
    llm = load_llm(checkpoint)
    rows = llm.generate(prompts(2), SamplingParams(max_tokens=3, ignore_eos=True, logprobs=-1))
    best = llm.generate(prompts(2), SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2))
    for full, top in zip(rows, best, strict=True):
        for token, row, entry in zip(full.token_ids, full.logprobs, top.logprobs, strict=True):
            assert row.dtype == "float32" and row.shape == (304,)
            assert float(torch.from_numpy(row).exp().sum()) == pytest.approx(1.0, abs=1e-4)
            assert list(entry)[0] == token == row.argmax() and len(entry) == 2
            assert entry[token] == pytest.approx(float(row[token]), abs=1e-4)
    assert llm.generate(prompts(1), SamplingParams(max_tokens=1))[0].logprobs is None


def test_end_of_sequence_and_length(checkpoint, alone) -> None:
    llm = load_llm(checkpoint)
    ids = alone[0].token_ids
    llm.request_parser.config = type(llm.config)(**{**vars(llm.config), "eos_token_ids": (ids[5],)})
    out = llm.generate(prompts(1), SamplingParams(max_tokens=24))[0]
    assert out.finish_reason == "stop" and out.token_ids == ids[: ids.index(ids[5]) + 1]
    out = llm.generate(prompts(1), SamplingParams(max_tokens=3, ignore_eos=True))[0]
    assert out.finish_reason == "length" and out.token_ids == ids[:3]


def test_stop_strings_end_the_answer_and_never_leak(checkpoint, alone) -> None:
    llm = load_llm(checkpoint)
    text = alone[0].text
    stop = text[3:6]
    params = SamplingParams(max_tokens=24, ignore_eos=True, stop=(stop, "never there"))
    out = llm.generate(prompts(1), params)[0]
    assert out.finish_reason == "stop" and out.text == text[: text.index(stop)].strip()
    assert len(out.token_ids) < 24


def test_limits_name_the_numbers(checkpoint) -> None:
    llm = load_llm(checkpoint, max_input_length=20, max_output_length=10)
    with pytest.raises(RequestError, match=r"prompt is 3\d tokens \(8 of them from video\), the limit is 20"):
        llm.generate({"prompt": "USER:<image> what is going on here?", "frames": FRAMES[0]}, PARAMS)
    with pytest.raises(RequestError, match="max_tokens is 11, the limit is 10"):
        llm.generate({"prompt": "why"}, SamplingParams(max_tokens=11))
    small = load_llm(checkpoint, block_size=16, kv_cache_bytes=2 * 2 * 2 * 16 * 4 * 16 * 4)
    with pytest.raises(RequestError, match="KV cache holds 64 tokens"):
        small.generate(prompts(1), SamplingParams(max_tokens=100))
    assert not small.engine.has_work
    with pytest.raises(ConfigError, match="one block of 128 tokens takes"):
        load_llm(checkpoint, kv_cache_bytes=1000)


def test_a_request_that_just_fits_is_served(checkpoint) -> None:
    small = load_llm(checkpoint, block_size=16, kv_cache_bytes=2 * 2 * 2 * 16 * 4 * 16 * 4)
    length = len(small.tokenizer.encode("why"))
    out = small.generate({"prompt": "why"}, SamplingParams(max_tokens=64 - length + 1, ignore_eos=True))[0]
    assert len(out.token_ids) == 64 - length + 1


def test_a_bad_request_does_not_end_the_others(checkpoint, alone) -> None:
    llm = load_llm(checkpoint, max_batch_size=2)
    requests = [prompts(1)[0], {"prompt": "two <image><image>", "frames": FRAMES[0]}, {"prompt": ""}, prompts(4)[3]]
    answers = dict(llm.generate_iter(requests, PARAMS))
    assert answers[0].token_ids == alone[0].token_ids and answers[3].token_ids == alone[3].token_ids
    assert isinstance(answers[1], RequestError) and "2 <image> and the request 1" in str(answers[1])
    with pytest.raises(RequestError):
        llm.generate(requests, PARAMS)
    free, total = free_blocks(llm)
    assert not llm.engine.has_work and free == total


def test_logits_that_are_not_finite_are_an_error(checkpoint) -> None:
    llm = load_llm(checkpoint)
    llm.engine.core.executor.runner.model.language.norm.data[5] = float("nan")
    with pytest.raises(BackendError, match="not finite"):
        llm.generate(prompts(1), PARAMS)
    assert not llm.engine.has_work


def test_status_follows_a_request(checkpoint) -> None:
    """Two requests whose answers do not fit into the KV cache together: the younger one is preempted."""
    per_block = 2 * 2 * 2 * 16 * 4 * 16  # 2 layers, 2 KV heads of 16, float32, 16 tokens
    llm = load_llm(checkpoint, block_size=16, kv_cache_bytes=4 * per_block, max_batch_size=2)
    core = llm.engine.core
    old, young, dropped = (
        core.add(llm.prepare({"prompt": text}, SamplingParams(max_tokens=tokens, ignore_eos=True)))
        for text, tokens in [("why", 30), ("who", 30), ("he", 9)]
    )
    any_token = replace(llm.prepare({"prompt": "she"}, PARAMS), stop_token_ids=frozenset(range(304)))
    stopped = core.add(any_token)
    requests = [old, young, dropped, stopped]
    assert {request.status for request in requests} == {RequestStatus.WAITING}
    seen: dict[Request, list[RequestStatus]] = {request: [] for request in requests}
    core.step()
    core.abort(dropped.request_id)
    while core.has_work:
        for request in requests:
            if seen[request][-1:] != [request.status]:
                seen[request].append(request.status)
        core.step()
    running = RequestStatus.RUNNING
    assert seen[old][:1] == [running] and old.status is RequestStatus.FINISHED_LENGTH
    assert seen[young] == [running, RequestStatus.PREEMPTED, running] and young.preemptions == 1
    assert dropped.status is RequestStatus.FINISHED_ABORTED and dropped.status.finish_reason is None
    assert stopped.status is RequestStatus.FINISHED_STOPPED and stopped.status.finish_reason == "stop"
    assert all(request.is_finished for request in requests) and not RequestStatus.PREEMPTED.is_finished


def test_block_allocator_and_budget() -> None:
    block_manager = BlockManager(4)
    allocated = block_manager.allocate(3)
    assert sorted(allocated) == [0, 1, 2] and block_manager.num_free_blocks == 1
    block_manager.free(allocated)
    assert block_manager.num_free_blocks == 4 and sorted(block_manager.allocate(4)) == [0, 1, 2, 3]
    assert plan_blocks(1000, 128, 10, None, 10**9) == 8
    assert plan_blocks(10**9, 128, 10, 12800, 10**9) == 10
    assert plan_blocks(10**9, 128, 10, None, 25600) == 10


def test_the_core_is_idle_without_work(checkpoint) -> None:
    core = load_llm(checkpoint).engine.core
    outputs, stats = core.step()
    assert not outputs and stats.decoding == stats.prefilled == 0 and not core.has_work
    assert Request.__eq__ is object.__eq__  # requests are kept in sets and dictionaries by identity
