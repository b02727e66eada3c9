"""Properties of the scheduler, in any order of events that hypothesis can think of.

The engine core runs over an executor without a model, see history_executor.py. checked_engine.py has the properties
that hold in every step.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from atb_pllava.config import EngineConfig
from atb_pllava.engine.engine_request import EngineRequest
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.prompt.placeholders import VideoSpan
from tests.engine.checked_engine import Answer, CheckedEngine
from tests.engine.history_executor import BROKEN, VOCABULARY

pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

IMAGE = 1
ROWS = 3  # placeholders of a video
STEMS = [[3 + (7 * stem + i * i) % 11 for i in range(12)] for stem in range(2)]


@dataclass(frozen=True)
class Video:
    """Takes the place of ProcessedVideo. A frame is a number."""

    frames: tuple[int, ...]
    inverse_indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def mm_hash(self) -> bytes:
        return repr(self).encode()


VIDEOS = [Video((10, 11), (0, 1, 0)), Video((20, 21, 22, 23), (3, 2, 1, 0))]


def random_prompt(generator: random.Random) -> tuple[list[int], list[VideoSpan], list[Video]]:
    """Token ids with placeholders, where the placeholders are, and the videos. Many prompts begin alike."""
    token_ids: list[int] = []
    spans: list[VideoSpan] = []
    videos = generator.choices(VIDEOS, k=generator.randrange(3))
    for _ in videos:
        token_ids += generator.choice(STEMS)[: generator.randrange(4)]
        spans.append(VideoSpan(len(token_ids), ROWS))
        token_ids += [IMAGE] * ROWS
    token_ids += generator.choice(STEMS)[: generator.randrange(1, 12)]
    token_ids += generator.choices(range(3, VOCABULARY), k=generator.randrange(3))
    return token_ids, spans, videos


PROMPTS = [random_prompt(random.Random(seed)) for seed in range(40)]
BROKEN_PROMPTS = [([*token_ids, BROKEN], spans, videos) for token_ids, spans, videos in PROMPTS[:4]]
OPTIONS = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 2, "n": 2},
    {"temperature": 1.0, "seed": 3, "n": 3},
    {"num_beams": 2},
    {"num_beams": 3},
]
PARAMS = [SamplingParams(max_tokens, **options) for max_tokens in (9, 5, 7, 2, 1) for options in OPTIONS]


def new_request(
    prompt: tuple[list[int], list[VideoSpan], list[Video]], params: SamplingParams, has_stop: bool
) -> EngineRequest:
    return EngineRequest(prompt[0], *prompt, params, frozenset([2] if has_stop else []))


REQUESTS = st.builds(
    new_request,
    st.sampled_from(PROMPTS + BROKEN_PROMPTS),
    st.sampled_from(PARAMS),
    st.sampled_from([False, False, True]),
)


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    return EngineConfig(
        block_size=draw(st.integers(1, 4)),
        max_batch_size=draw(st.sampled_from([4, 6, 2, 3, 1])),
        prefill_chunk=draw(st.sampled_from([1, 3, 8, 100])),
        vision_batch=draw(st.sampled_from([5, 3, 1])),
        video_cache_bytes=draw(st.integers(0, 2)),  # a video takes one byte
        prefix_cache=draw(st.booleans()),
    )


def answers_alone(request: EngineRequest) -> list[Answer]:
    """The answers of a request without others, with enough blocks and no prefix cache."""
    engine = CheckedEngine(EngineConfig(block_size=8, prefix_cache=False), blocks=32)
    engine.add(request)
    engine.run()
    answers = [engine.answers[request.request_id, index] for index in range(request.params.n)]
    is_broken = request.token_ids[-1] == BROKEN
    assert all((answer.end == "error") == is_broken and answer.end is not None for answer in answers)
    return answers


EVENTS = st.one_of(
    st.tuples(st.just(CheckedEngine.add), REQUESTS),
    st.tuples(st.just(CheckedEngine.step_often), st.integers(1, 4)),
    st.tuples(st.just(CheckedEngine.add), REQUESTS),
    st.tuples(st.just(CheckedEngine.stop), st.integers(0, 9)),
    st.tuples(st.just(CheckedEngine.abort), st.integers(0, 9)),
)


# Every run tries the same examples. A time limit for an example would fail on a busy machine.
@settings(derandomize=True, database=None, deadline=None, max_examples=250)
@given(configs(), st.sampled_from([16, 12, 20, 10, 24, 32, 8]), st.lists(EVENTS, min_size=12, max_size=50))
def test_requests_come_and_go_in_any_order(
    config: EngineConfig, blocks: int, events: list[tuple[Callable[[CheckedEngine, object], None], object]]
) -> None:
    """Every request that is not aborted gets the answers that it gets alone. No block is lost or written by two."""
    engine = CheckedEngine(config, blocks)
    for happen, argument in events:
        happen(engine, argument)
        engine.check()
    engine.run()
    for request in engine.requests.values():
        alone = answers_alone(request)
        for index in range(request.params.n):
            answer = engine.answers[request.request_id, index]
            if answer.end == "stopped":
                assert answer.token_ids == alone[index].token_ids[: len(answer.token_ids)]
            else:
                assert answer == alone[index]


def test_a_video_of_two_requests_is_encoded_once_in_a_step() -> None:
    """HistoryExecutor notices a frame that is encoded again."""
    engine = CheckedEngine(EngineConfig(block_size=4, prefix_cache=False, vision_batch=5), blocks=32)
    engine.add(EngineRequest([3], [3], [], [], SamplingParams(9), frozenset()))
    engine.step_often(2)
    for last in (4, 5):
        token_ids = [IMAGE] * ROWS + [last]
        engine.add(
            EngineRequest(token_ids, token_ids, [VideoSpan(0, ROWS)], VIDEOS[:1], SamplingParams(2), frozenset())
        )
    engine.run()
    assert len(engine.answers) == 3
