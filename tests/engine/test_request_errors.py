"""What a server needs of the engine beside answers: room for an answer, the wrong field, corrupted requests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atb_pllava import LLM, BackendError, RequestError, SamplingParams
from atb_pllava.config import EngineConfig
from atb_pllava.engine.core import EngineCore
from atb_pllava.engine.engine_request import EngineRequest
from atb_pllava.engine.sampler import NOT_FINITE
from atb_pllava.prompt.placeholders import VideoSpan
from tests.engine.history_executor import HistoryExecutor
from tests.support import assert_same_outputs, load_llm, random_frames

FRAMES = random_frames(4, 70, 90, 3, seed=5)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with load_llm(checkpoint, max_batch_size=4, block_size=16, media_workers=0) as llm:
        yield llm


def request_of(length: int, **params: Any) -> EngineRequest:
    return EngineRequest([3] * length, [3] * length, [VideoSpan(0, 2)], [], SamplingParams(**params), frozenset())


@pytest.mark.parametrize("longest", [None, 5, 100])
@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_room_is_the_largest_max_tokens_that_the_check_accepts(longest: int | None, num_beams: int) -> None:
    config = EngineConfig(block_size=4, max_output_length=longest)
    core = EngineCore(HistoryExecutor(10, 4), config)
    for length in range(1, 50):
        request = request_of(length, num_beams=num_beams)
        room = core.room_for(request)
        if room >= 1:
            core.check(request_of(length, num_beams=num_beams, max_tokens=room))
        with pytest.raises(RequestError):
            core.check(request_of(length, num_beams=num_beams, max_tokens=max(room, 0) + 1))


def test_max_tokens_that_fit(checkpoint: Path, llm: LLM) -> None:
    per_block = 2 * 2 * 2 * 16 * 4 * 16  # 2 layers, 2 KV heads of 16, float32, 16 tokens
    params = SamplingParams(ignore_eos=True, max_tokens=3)
    question = {"question": "why", "frames": FRAMES}
    with load_llm(checkpoint, block_size=16, kv_cache_bytes=4 * per_block, media_workers=0) as small:
        output = small.engine.submit(question, params, fit_max_tokens=True).result()
        assert output.metrics.prompt_tokens + output.metrics.output_tokens == 4 * 16 + 1
        assert small.engine.submit(question, params).result().metrics.output_tokens == 3
        with pytest.raises(RequestError, match=r"\(8 of them from video\) and up to 1 more") as error:
            small.engine.submit({**question, "question": "why" * 30}, params, fit_max_tokens=True).result()
        assert error.value.code == "context_length_exceeded"
    with load_llm(checkpoint, max_output_length=7, media_workers=0) as short:
        output = short.engine.submit(question, params, fit_max_tokens=True).result()
        assert output.metrics.output_tokens == 7
    with pytest.raises(RequestError, match=r"\(8 of them from video\), and the model has 1024 positions") as error:
        llm.engine.submit({**question, "question": "why" * 1024}, params, fit_max_tokens=True).result()
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("request_", "params", "param", "code"),
    [
        ({"messages": []}, {}, "messages", None),
        ({"question": "a", "vidoe": "b"}, {}, "vidoe", None),
        ({"question": " "}, {}, "question", None),
        ({"prompt": 5}, {}, "prompt", None),
        ({"prompt": "a", "history": []}, {}, "history", None),
        ({"question": "a", "frames": FRAMES, "num_frames": 0}, {}, "num_frames", None),
        ({"question": "a", "frames": FRAMES, "end_seconds": 1}, {}, "end_seconds", None),
        ({"question": "a", "frames": FRAMES, "frame_indices": 1}, {}, "frame_indices", None),
        ({"question": "a"}, {"temperature": 1.0, "n": 5}, "n", None),
        ({"question": "a"}, {"num_beams": 5}, "num_beams", None),
        ({"question": "a"}, {"max_tokens": 10**6}, None, "context_length_exceeded"),
    ],
)
def test_errors_name_the_wrong_field(
    llm: LLM, request_: dict[str, Any], params: dict[str, Any], param: str | None, code: str | None
) -> None:
    with pytest.raises(RequestError) as error:
        llm.engine.submit(request_, SamplingParams(**params)).result()
    assert (error.value.param, error.value.code) == (param, code)


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "top_p", "top_k", "seed", "n", "logprobs"])
@pytest.mark.parametrize("value", [-5, "x", 10**400, float("nan")])
def test_errors_name_the_wrong_sampling_parameter(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name) as error:
        SamplingParams(**{name: value})
    assert error.value.param == name


def test_a_request_with_logits_that_are_not_finite_fails_alone(checkpoint: Path) -> None:
    """The embedding of "Z" is NaN. The keys and values of the other requests are not."""
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2)
    good = [{"question": "a", "frames": FRAMES}, {"question": "what is this"}, {"question": "b"}]
    with load_llm(checkpoint, max_batch_size=6, media_workers=0) as llm:
        expected = llm.generate(good, params)
        llm.model.language.embedding.data[llm.tokenizer.encode("Z")[-1]] = float("nan")
        streams = [llm.engine.submit(request, params) for request in good]
        sampled = SamplingParams(max_tokens=6, temperature=1.0, n=3)
        bad = [llm.engine.submit({"question": "Z", "frames": FRAMES}, one) for one in (params, sampled)]
        assert_same_outputs([stream.result() for stream in streams], expected)
        for stream in bad:
            with pytest.raises(BackendError, match=NOT_FINITE):
                stream.result()
        assert llm.engine.stats().core.corrupted_requests == 2
        assert_same_outputs(llm.generate(good, params), expected)
