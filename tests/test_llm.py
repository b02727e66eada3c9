"""The Python interface: every form of request, and every wrong one."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from atb_pllava import (
    LLM,
    BackendError,
    ConfigError,
    MediaLimits,
    RequestError,
    SamplingParams,
    VideoError,
    WeightError,
)
from atb_pllava.multimodal.frame_sampling import sample_frame_indices
from tests.support import load_llm, random_frames

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)
PROMPT = "USER:<image> what? ASSISTANT:"
FRAMES = random_frames(4, 60, 80, 3, seed=1)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return load_llm(checkpoint)


def test_chat_equals_generate_of_its_prompt(llm: LLM, media: Path) -> None:
    clip = str(media / "clip2.mp4")
    chat = llm.chat(clip, "what?", SHORT)
    generate = llm.generate([{"prompt": PROMPT, "video": clip}], SHORT)[0]
    assert chat.token_ids == generate.token_ids and chat.prompt_token_ids == generate.prompt_token_ids
    assert chat.frame_indices == [1, 4, 7, 9] and chat.finish_reason == "length"
    metrics = chat.metrics
    assert metrics.video_tokens == 8 and metrics.prompt_tokens == len(chat.prompt_token_ids) + 7
    assert 0 < metrics.video_decode <= metrics.ttft <= metrics.latency and metrics.output_tokens == 4


def test_sources_of_a_video_agree(llm: LLM, media: Path) -> None:
    path = media / "clip2.mp4"
    by_path = llm.encode_video(path)
    assert by_path.shape == (8, 64) and torch.isfinite(by_path).all()
    assert torch.equal(llm.encode_video(path.read_bytes()), by_path)
    assert torch.equal(llm.encode_video(str(path), [1, 4, 7, 9]), by_path)
    assert not torch.equal(llm.encode_video(path, frame_indices=[0, 1, 2, 3]), by_path)


def test_batches_mix_videos_images_and_text(llm: LLM, media: Path) -> None:
    clips = [str(media / "clip2.mp4"), media / "clip10.mp4"]
    requests = [
        {"prompt": PROMPT, "video": clips[0]},
        {"prompt": PROMPT, "video": clips[1], "frame_indices": [0, 1, 2, 2]},
        {"prompt": PROMPT, "image": media / "red.png"},
        {"prompt": "USER:<image> or <image>? ASSISTANT:", "video": clips},
        {"prompt": "USER: hello ASSISTANT:"},
        {"question": "what?", "video": clips[0]},
        {"question": "hello", "history": [("a", "b")], "answer_prefix": " c"},
        {"prompt": PROMPT, "frames": np.zeros((4, 70, 60, 3), np.uint8)},
    ]
    together = llm.generate(requests, SHORT)
    for request, out in zip(requests, together, strict=True):
        assert llm.generate(request, SHORT)[0].token_ids == out.token_ids
    assert [out.frame_indices for out in together[:4]] == [
        [1, 4, 7, 9],
        [0, 1, 2, 2],
        [0, 0, 0, 0],
        [[1, 4, 7, 9], [0, 0, 1, 2]],
    ]
    assert together[4].frame_indices == [] and together[4].metrics.video_tokens == 0
    assert together[3].metrics.video_tokens == 16
    assert together[5].token_ids == together[0].token_ids


def test_the_order_of_videos_and_frames_counts(llm: LLM, media: Path) -> None:
    one = media / "clip2.mp4"
    two = media / "clip10.mp4"
    prompt = "USER:<image> or <image>? ASSISTANT:"
    rows = SamplingParams(max_tokens=1, logprobs=-1)
    requests = [{"prompt": prompt, "video": videos} for videos in ([one, two], [two, one])]
    first, second = (out.logprobs[0] for out in llm.generate(requests, rows))
    assert abs(first - second).max() > 1e-3


def test_short_arrays_repeat_frames_and_long_ones_are_refused(llm: LLM) -> None:
    frames = random_frames(2, 60, 60, 3, seed=0)
    assert torch.allclose(llm.encode_video(frames), llm.encode_video(frames[[0, 0, 0, 1]]), atol=1e-5)
    with pytest.raises(VideoError, match="frames holds 5 frames, num_frames is 4"):
        llm.encode_video(np.zeros((5, 60, 60, 3), np.uint8))
    for bad in (np.zeros((4, 3, 60, 60), np.uint8), np.zeros((4, 60, 60, 3)), np.zeros((4, 0, 60, 3), np.uint8)):
        with pytest.raises(VideoError, match="RGB frames are uint8"):
            llm.encode_video(bad)


def test_a_placeholder_in_a_question_is_text(llm: LLM, media: Path) -> None:
    out = llm.chat(media / "clip2.mp4", "is <image> or </s> here?", SHORT)
    assert out.prompt_token_ids.count(300) == 1 and out.metrics.video_tokens == 8
    assert llm.chat(None, "what is <image>?", SHORT).prompt_token_ids.count(300) == 0


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"prompt": "no placeholder", "video": "clip2.mp4"}, RequestError, "0 <image> and the request 1"),
        ({"prompt": PROMPT}, RequestError, "1 <image> and the request 0"),
        ({"prompt": PROMPT, "video": ["clip2.mp4", "clip2.mp4"]}, RequestError, "1 <image> and the request 2"),
        ({"prompt": PROMPT, "video": "clip2.mp4", "frame_indices": [1]}, VideoError, "names 1 frame, "),
        ({"prompt": PROMPT, "video": "clip2.mp4", "frame_indices": [0, 1, 2, 12]}, VideoError, "12"),
        ({"prompt": PROMPT, "video": "nothing.mp4"}, VideoError, "nothing.mp4"),
        ({"prompt": PROMPT, "video": "notes.txt"}, VideoError, "notes.txt"),
        ({"prompt": PROMPT, "video": 7}, VideoError, "given as int"),
        ({"prompt": PROMPT, "video": "clip2.mp4", "image": "red.png"}, RequestError, "video and image"),
        ({"prompt": PROMPT, "vidoe": "clip2.mp4"}, RequestError, "unknown keys .'vidoe'."),
        ({"prompt": 5}, RequestError, "'prompt' is int"),
        ({}, RequestError, "needs a text"),
        ({"prompt": "a", "history": []}, RequestError, "'prompt' takes no 'history'"),
        (None, RequestError, "a request is a NoneType"),
        ({"question": "a", "video": []}, RequestError, "video is an empty list"),
        ({"question": "a", "history": [("b",)]}, RequestError, "history is"),
        ({"question": "a", "history": 5}, RequestError, "history is"),
        ({"question": "a", "answer_prefix": 5}, RequestError, "'answer_prefix' is int"),
        ({"question": "a", "frames": "yoga.mp4"}, RequestError, "frames must be uint8 arrays"),
        ({"question": "half a \ud83d pair"}, RequestError, "not Unicode text at character 1"),
        ({"prompt": "half a \ud83d pair"}, RequestError, "not Unicode text at character 7"),
        ({"question": "a", "frames": FRAMES, "frame_indices": [0, 1, 2, 2.5]}, RequestError, "whole numbers"),
        ({"question": "a", "frames": FRAMES, "frame_indices": [0, 1, 2, True]}, RequestError, "whole numbers"),
        ({"question": "a", "frames": FRAMES, "frame_indices": 5}, RequestError, "whole numbers"),
        ({"question": "a", "frames": FRAMES, "frame_indices": [0, 1, 2, 4]}, VideoError, "from 0 to 3"),
        ({"question": "a", "frames": np.zeros((1, 1, 60000, 3), np.uint8)}, VideoError, "max_side"),
        ({"prompt": PROMPT, "video": "clip2.mp4", "frame_indices": [[0, 1, 2, 3]] * 2}, RequestError, "2 video"),
        ({"prompt": PROMPT, "video": "clip2.mp4", "start_seconds": "1"}, RequestError, "start_seconds is '1'; it must"),
        ({"prompt": PROMPT, "video": "clip2.mp4", "end_seconds": -1}, RequestError, "end_seconds is -1; it must"),
        ({"prompt": PROMPT, "video": "clip2.mp4", "end_seconds": True}, RequestError, "end_seconds is True"),
        ({"prompt": PROMPT, "video": "clip2.mp4", "start_seconds": np.inf}, RequestError, "start_seconds is inf"),
        ({"prompt": PROMPT, "video": "clip2.mp4", "end_seconds": 10**400}, RequestError, "end_seconds is 1000"),
        ({"prompt": PROMPT, "video": "clip2.mp4", "end_seconds": [1, 2]}, RequestError, "given for 2 videos, the req"),
        ({"prompt": PROMPT, "video": "clip2.mp4", "start_seconds": 1, "end_seconds": 0.5}, RequestError, "come first"),
        ({"prompt": PROMPT, "video": "clip2.mp4", "start_seconds": 99}, VideoError, "no frame lies between"),
        ({"prompt": PROMPT, "video": "red.png", "start_seconds": 0}, VideoError, "do not apply to an image"),
        ({"question": "a", "frames": FRAMES, "end_seconds": 1}, RequestError, "has frames and end_seconds"),
        ({"question": "a", "start_seconds": 1}, RequestError, "has start_seconds and no video"),
        (
            {"prompt": PROMPT, "video": "clip2.mp4", "frame_indices": [0, 1, 2, 3], "start_seconds": 1},
            RequestError,
            "has frame_indices and start_seconds",
        ),
    ],
)
def test_bad_requests(llm: LLM, media: Path, request_: dict, error: type, message: str) -> None:
    if request_ is None:
        pass
    elif isinstance(request_.get("video"), str):
        request_ = {**request_, "video": str(media / request_["video"])}
    elif isinstance(request_.get("video"), list):
        request_ = {**request_, "video": [str(media / name) for name in request_["video"]]}
    with pytest.raises(error, match=message):
        llm.generate([request_], SHORT)
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "tpu"}, BackendError, "auto, cpu, cuda, ascend"),
        ({"backend": "ascend"}, BackendError, "ascend"),
        ({"dtype": "int8"}, ConfigError, "auto, float32, bfloat16, float16"),
        ({"frame_sampler": "best"}, ConfigError, "demo, eval, npu"),
        ({"resize": "pad"}, ConfigError, "clip, res672, squash"),
        ({"conversation": "vicuna"}, ConfigError, "plain"),
        ({"num_frames": 0}, ConfigError, "num_frames is 0"),
        ({"num_frames": -3}, ConfigError, "num_frames is -3"),
        ({"num_frames": 65}, VideoError, "num_frames is 65, the limit is 64"),
        ({"pooling_shape": (16, 0, 12)}, ConfigError, "pooling_shape"),
        ({"max_batch_size": 0}, ConfigError, "max_batch_size is 0"),
        ({"weight_dir": "/nowhere"}, ConfigError, "'/nowhere' is not a readable directory"),
        ({"max_sequences": 3}, TypeError, "no option 'max_sequences'.*max_batch_size"),
        ({"load_format": "random"}, ConfigError, "safetensors, dummy, dummy_w8a16"),
        ({"prefix_cache": "off"}, ConfigError, "must be True or False"),
        ({"limits": {}}, ConfigError, "MediaLimits"),
        ({"conversation": "demo", "system": "a", "video_caption": True}, ConfigError, "video_caption has no effect"),
        ({"system": "look at <image>"}, ConfigError, "text without <image>"),
        ({"conversation": "eval_vcg_llavanext"}, ConfigError, "which is no token of"),
        ({"weight_dir": ""}, ConfigError, "not a readable directory"),
    ],
)
def test_bad_options(checkpoint: Path, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LLM(checkpoint, **options)


def test_cuda_is_refused_where_there_is_none(checkpoint: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(BackendError, match="finds no CUDA device"):
        LLM(checkpoint, backend="cuda")


def test_a_model_path_that_is_none(tmp_path: Path) -> None:
    for path, error in [(tmp_path / "nothing", ConfigError), (tmp_path, ConfigError)]:
        with pytest.raises(error, match=str(tmp_path)):
            LLM(path)


def test_config_and_weights_that_disagree(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"intermediate_size": 96', '"intermediate_size": 1048576'))
    with pytest.raises(WeightError, match="mlp"):
        LLM(tmp_path)


def test_chat_returns_all_answers(llm: LLM) -> None:
    out = llm.chat(FRAMES, "what?", n=3, temperature=1.0, seed=4, max_tokens=6, ignore_eos=True)
    assert [answer.index for answer in out.outputs] == [0, 1, 2] and out.metrics.output_tokens == 18
    assert (out.text, out.token_ids) == (out.outputs[0].text, out.outputs[0].token_ids)
    best = llm.chat(FRAMES, "what?", num_beams=3, max_tokens=6, ignore_eos=True)
    assert len(best.outputs) == 1 and len(best.token_ids) == 6


def test_an_iterable_that_raises_ends_the_requests_before(llm: LLM) -> None:
    def requests():
        yield {"question": "a"}
        raise KeyError("broken iterable")

    with pytest.raises(KeyError, match="broken iterable"):
        llm.generate(requests(), SamplingParams(max_tokens=500, ignore_eos=True))
    assert not llm.engine.has_work


def test_a_closed_iterator_ends_its_requests(llm: LLM) -> None:
    long = SamplingParams(max_tokens=500, ignore_eos=True)
    answers = llm.generate_iter([{"question": "a"}, {"prompt": 5}, {"question": "b"}], long)
    number, error = next(answers)
    assert number == 1 and isinstance(error, RequestError)
    answers.close()
    assert not llm.engine.has_work


def test_a_model_lives_as_long_as_its_answers_are_read(checkpoint: Path, llm: LLM) -> None:
    """Nobody holds the LLM itself."""
    expected = llm.chat(None, "why?", SHORT).text
    text = "".join(load_llm(checkpoint).stream(None, "why?", SHORT))  # pytest would keep what is inside an assert
    assert text == expected
    ((_, answer),) = load_llm(checkpoint).generate_iter([{"question": "why?"}], SHORT)
    assert answer.text == expected


def test_a_model_that_nobody_holds_ends_its_engine(checkpoint: Path) -> None:
    model = load_llm(checkpoint)
    engine = model.engine
    stream = engine.submit({"question": "why?"}, SamplingParams(max_tokens=900, ignore_eos=True))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and engine.is_dead
    with pytest.raises(BackendError, match="was closed"):
        stream.result(60)


def test_limits_can_be_changed(checkpoint: Path, media: Path) -> None:
    strict = load_llm(checkpoint, limits=MediaLimits(max_side=90))
    with pytest.raises(VideoError, match="max_side"):
        strict.chat(media / "clip2.mp4", "what?", SHORT)


def test_bfloat16_stays_close_to_float32(llm: LLM, checkpoint: Path, media: Path) -> None:
    half = LLM(checkpoint, dtype="bfloat16", backend="cpu")
    clip = media / "clip2.mp4"
    rows = SamplingParams(max_tokens=1, logprobs=-1)
    tokens = half.encode_video(clip)
    exact = llm.encode_video(clip)
    assert tokens.dtype == torch.bfloat16
    assert (tokens.float() - exact).norm() < 0.05 * exact.norm()
    ours, theirs = (model.chat(clip, "what?", rows).logprobs[0] for model in (half, llm))
    assert np.corrcoef(ours, theirs)[0, 1] > 0.99


def test_video_tokens_stand_in_frame_row_column_order(llm: LLM) -> None:
    """Changing one corner of one frame changes just the token that covers it, up to what attention spreads."""
    frames = np.full((4, 56, 56, 3), 100, np.uint8)
    changed = frames.copy()
    changed[3, 28:, :28] = 250  # last frame, lower left
    difference = (llm.encode_video(changed) - llm.encode_video(frames)).abs().sum(1).reshape(2, 2, 2)
    assert int(difference.argmax()) == 0b110 and float(difference[0].max()) < 1e-4


def test_frame_numbers_of_any_whole_type(llm: LLM) -> None:
    wanted = [0, 2, 2, 3]
    outs = llm.generate(
        [{"question": "a", "frames": FRAMES, "frame_indices": i} for i in (wanted, np.array(wanted), [wanted])], SHORT
    )
    assert [out.frame_indices for out in outs] == [wanted] * 3
    assert outs[0].token_ids == outs[1].token_ids == outs[2].token_ids


def test_defaults_fit_the_limits(checkpoint: Path) -> None:
    small = load_llm(checkpoint, max_output_length=5)
    assert len(small.chat(None, "a").token_ids) <= 5
    with pytest.raises(RequestError, match="params is a dict"):
        small.chat(None, "a", {"max_tokens": 3})  # type: ignore[arg-type]


def test_kv_cache_bytes_is_what_the_cache_takes(checkpoint: Path) -> None:
    per_token = 2 * 2 * 2 * 16 * 4
    llm = load_llm(checkpoint, max_batch_size=1, kv_cache_bytes=5000 * per_token)
    assert len(llm.chat(None, "why " * 800, SHORT).token_ids) == 4


def test_a_prefix_is_plain_text(llm: LLM) -> None:
    assert llm.generate({"question": "a", "answer_prefix": "<image>"}, SHORT)[0].prompt_token_ids.count(300) == 0


def test_a_request_names_the_times_of_its_videos(llm: LLM, media: Path) -> None:
    """clip2.mp4 has 12 frames, 8 a second."""
    clip = str(media / "clip2.mp4")
    requests = [
        {"prompt": PROMPT, "video": clip, "start_seconds": 0.5, "end_seconds": 1},
        {"prompt": PROMPT, "video": clip, "start_seconds": [np.float32(0.5)], "end_seconds": [None]},
        {"prompt": "<image> <image>", "video": [clip, clip], "start_seconds": [None, 1]},
    ]
    asked = [(4, 8), (4, 11), (0, 11), (8, 11)]
    expected = [sample_frame_indices(last - first + 1, 4) for first, last in asked]
    numbers = [[first + k for k in found] for (first, _), found in zip(asked, expected, strict=True)]
    outputs = llm.generate(requests, SHORT)
    assert [output.frame_indices for output in outputs] == [numbers[0], numbers[1], numbers[2:]]
