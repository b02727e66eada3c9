"""Videos and prompts seen before: less work, the same answers, and never another video's."""

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from atb_pllava import LLM, BackendError, ConfigError, SamplingParams
from atb_pllava.config import PreprocessorConfig
from atb_pllava.engine.block_manager import BlockManager, full_block_hashes
from atb_pllava.engine.encoder_cache import EncoderCache
from atb_pllava.multimodal.frame_cache import FrameCache
from atb_pllava.multimodal.media_key import media_key
from atb_pllava.multimodal.processor import ProcessedVideo, VideoProcessor
from tests.support import assert_same_output, free_blocks, generate_together, load_llm, random_frames, run_core

FRAMES = random_frames(6, 4, 70, 90, 3, seed=9)
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3)
BLOCK = 4  # a video of the random checkpoint is 8 tokens


def load(checkpoint, **options) -> LLM:
    return load_llm(checkpoint, block_size=BLOCK, **options)


def ask(video: int | tuple[int, ...], text: str = "what is it?") -> dict:
    videos = (video,) if isinstance(video, int) else video
    return {"prompt": f"USER: {'<image>' * len(videos)} {text} ASSISTANT:", "frames": [FRAMES[v] for v in videos]}


def count_work(llm: LLM) -> Counter[str]:
    """Counts frames encoded and tokens put through the model from now on."""
    work: Counter[str] = Counter()
    runner = llm.engine.core.executor.runner
    encode_frames = runner.encode_frames
    forward = runner.forward

    def counted_encode_frames(video, pixels):
        work["frames"] += len(pixels)
        encode_frames(video, pixels)

    def counted_forward(step):
        work["tokens"] += len(step.token_ids)
        return forward(step)

    runner.encode_frames = counted_encode_frames
    runner.forward = counted_forward
    return work


@pytest.fixture(scope="module")
def cold(checkpoint):
    """Answers without any cache."""
    known: dict[str, object] = {}

    def answer(request: dict):
        key = repr((request["prompt"], [frames.tobytes() for frames in request["frames"]]))
        if key not in known:
            llm = load(checkpoint, max_batch_size=1, prefix_cache=False, video_cache_bytes=0)
            known[key] = llm.generate(request, PARAMS)[0]
            assert known[key].num_cached_tokens == 0
        return known[key]

    return answer


def test_the_second_question_computes_its_own_words_only(checkpoint, cold) -> None:
    llm = load(checkpoint)
    work = count_work(llm)
    first = llm.generate(ask(0), PARAMS)[0]
    assert work["frames"] == 4 and first.num_cached_tokens == 0
    work.clear()
    second = llm.generate(ask(0, "why is it so?"), PARAMS)[0]
    begin = len(llm.tokenizer.encode("USER: "))
    assert work["frames"] == 0 and second.metrics.vision_encode == 0
    assert (begin + 8) // BLOCK * BLOCK <= second.num_cached_tokens < second.metrics.prompt_tokens
    assert work["tokens"] == second.metrics.prompt_tokens - second.num_cached_tokens + PARAMS.max_tokens - 1
    assert_same_output(first, cold(ask(0)))
    assert_same_output(second, cold(ask(0, "why is it so?")))


def test_the_same_question_again_is_computed_from_its_last_token(checkpoint, cold) -> None:
    llm = load(checkpoint)
    outs = [llm.generate(ask(0), PARAMS)[0] for _ in range(3)]
    length = outs[0].metrics.prompt_tokens
    assert [out.num_cached_tokens for out in outs] == [0, *[(length - 1) // BLOCK * BLOCK] * 2]
    for out in outs:
        assert_same_output(out, cold(ask(0)))


def test_an_answer_is_part_of_the_next_turns_beginning(checkpoint) -> None:
    llm = load(checkpoint)
    prompt = ask(0)
    first = llm.generate(prompt, PARAMS)[0]
    ids = llm.tokenizer.encode(prompt["prompt"] + first.text)
    again = llm.generate({**prompt, "prompt": prompt["prompt"] + first.text + " USER: and then?"}, PARAMS)[0]
    if ids == first.prompt_token_ids + first.token_ids:  # text and ids need not agree for a random model
        assert again.num_cached_tokens > first.metrics.prompt_tokens
    assert again.num_cached_tokens >= first.metrics.prompt_tokens // BLOCK * BLOCK


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("video_cache_bytes", [0, 2**30])
def test_another_video_under_the_same_words_is_another_prompt(
    checkpoint, cold, prefix_cache, video_cache_bytes
) -> None:
    llm = load(checkpoint, prefix_cache=prefix_cache, video_cache_bytes=video_cache_bytes)
    outs = [llm.generate(ask(video), PARAMS)[0] for video in (0, 1, 2, 1, 0)]
    assert outs[1].num_cached_tokens <= len(llm.tokenizer.encode("USER: "))
    for out, video in zip(outs, (0, 1, 2, 1, 0), strict=True):
        assert_same_output(out, cold(ask(video)))
    assert len({tuple(out.token_ids) for out in outs[:3]}) > 1, "the videos make a difference at all"


def test_the_order_and_place_of_videos_count(checkpoint, cold) -> None:
    llm = load(checkpoint)
    for videos in [(0, 1), (1, 0), (0,), (0, 0), (1, 1), (0, 1)]:
        assert_same_output(llm.generate(ask(videos), PARAMS)[0], cold(ask(videos)))
    assert llm.generate(ask((0, 1)), PARAMS)[0].num_cached_tokens > 16


def test_one_pixel_makes_another_video(checkpoint) -> None:
    llm = load(checkpoint)
    llm.generate(ask(0), PARAMS)
    changed = FRAMES[0].copy()
    changed[2, 35, 45, 1] ^= 128
    work = count_work(llm)
    out = llm.generate({**ask(0), "frames": changed}, PARAMS)[0]
    assert work["frames"] == 4 and out.num_cached_tokens <= len(llm.tokenizer.encode("USER: "))


def test_first_questions_at_the_same_time_encode_and_prefill_once(checkpoint, cold) -> None:
    questions = ["what is it?", "why?", "when is it?", "what is it?"]
    llm = load(checkpoint, max_batch_size=4)
    work = count_work(llm)
    outs = generate_together(llm, [ask(0, question) for question in questions], PARAMS)
    assert work["frames"] == 4
    for out, question in zip(outs, questions, strict=True):
        assert_same_output(out, cold(ask(0, question)))
    assert [out.num_cached_tokens > 8 for out in outs] == [False, True, True, True]
    separate = load(checkpoint, max_batch_size=4, prefix_cache=False)
    more = count_work(separate)
    separate.generate([ask(0, question) for question in questions], PARAMS)
    assert more["frames"] == 4 and work["tokens"] < more["tokens"] - 3 * 8


def test_a_waiting_twin_lets_others_pass(checkpoint, cold) -> None:
    llm = load(checkpoint, max_batch_size=3)
    core = llm.engine.core
    other = {"prompt": "now <image> what is it?", "frames": [FRAMES[1]]}
    requests = [core.add(llm.prepare(r, PARAMS)) for r in (ask(0), ask(0, "why?"), other)]
    core.scheduler.admit()
    assert core.scheduler.running == [requests[0], requests[2]]
    run_core(core)
    for request, expected in zip(requests, (ask(0), ask(0, "why?"), other), strict=True):
        assert request.generated == cold(expected).token_ids


def test_an_aborted_request_leaves_its_video_to_the_others(checkpoint, cold) -> None:
    llm = load(checkpoint, vision_batch=1, prefix_cache=False)
    core = llm.engine.core
    busy = core.add(llm.prepare(ask(1), PARAMS))
    while not busy.num_generated:
        core.step()
    dropped, kept = (core.add(llm.prepare(r, PARAMS)) for r in (ask(0), ask(0, "why?")))
    core.step()
    assert 0 < dropped.encoder_entries[0].num_encoded_frames < 4 and dropped.encoder_entries == kept.encoder_entries
    core.abort(dropped.request_id)
    run_core(core)
    assert kept.generated == cold(ask(0, "why?")).token_ids


def test_a_small_cache_evicts_and_refuses_nobody(checkpoint, cold) -> None:
    per_block = 2 * 2 * 2 * 16 * 4 * BLOCK  # 2 layers, 2 KV heads of 16, float32
    generator = random.Random(3)
    texts = ["what is it?", "why?", "what is it and why is it so?"]
    requests = [ask(generator.randrange(6), generator.choice(texts)) for _ in range(40)]
    llm = load(checkpoint, max_batch_size=4, kv_cache_bytes=48 * per_block, video_cache_bytes=2 * 8 * 64 * 4)
    outs = generate_together(llm, requests, PARAMS)
    for out, request in zip(outs, requests, strict=True):
        assert_same_output(out, cold(request))
    assert sum(out.num_cached_tokens for out in outs) > 0
    assert sum(out.metrics.preemptions for out in outs) > 0
    free, total = free_blocks(llm)
    assert free == total


def test_encoded_videos_stay_within_their_bytes(checkpoint) -> None:
    two_videos = 2 * 8 * 64 * 4  # of 8 rows of embeddings, 64 wide, float32
    llm = load(checkpoint, prefix_cache=False, video_cache_bytes=two_videos)
    runner = llm.engine.core.executor.runner
    work = count_work(llm)
    for video in (0, 1, 0, 2, 0, 1):
        llm.generate(ask(video), SamplingParams(max_tokens=1))
        assert len(runner._video_embeds) <= 2
    assert work["frames"] == 4 * 4  # 0, 1, 2 and 1 again: the least recently used goes
    nothing = load(checkpoint, video_cache_bytes=0)
    nothing.generate([ask(0), ask(0)], SamplingParams(max_tokens=1))
    assert not nothing.engine.core.executor.runner._video_embeds
    first = llm.encode_video(FRAMES[0])
    first.zero_()
    assert llm.encode_video(FRAMES[0]).abs().sum() > 0


def test_a_prompt_behind_its_video_needs_no_tokens_of_it(checkpoint, cold) -> None:
    """The prefix is there, the video's tokens are gone: nothing is encoded as long as no token of it is needed."""
    llm = load(checkpoint, video_cache_bytes=0)
    prompt = ask(0, "and more and more of it")
    llm.generate(prompt, PARAMS)
    work = count_work(llm)
    out = llm.generate(prompt, PARAMS)[0]
    assert work["frames"] == 0
    assert_same_output(out, cold(prompt))


def test_broken_logits_are_not_remembered(checkpoint, cold) -> None:
    llm = load(checkpoint)
    norm = llm.engine.core.executor.runner.model.language.norm.data
    good = norm[5].clone()
    norm[5] = float("nan")
    with pytest.raises(BackendError, match="not finite"):
        llm.generate(ask(0), PARAMS)
    norm[5] = good
    out = llm.generate(ask(0), PARAMS)[0]
    assert out.num_cached_tokens == 0
    assert_same_output(out, cold(ask(0)))


def test_block_hashes_cover_everything_before(checkpoint) -> None:
    llm = load(checkpoint)

    def hashes(request: dict) -> list[bytes]:
        sequence = llm.engine.core.add(llm.prepare(request, PARAMS))
        return full_block_hashes(sequence, len(sequence.token_ids), BLOCK)

    def text(words: str) -> dict:
        return {"prompt": words}

    base = hashes(text("a b c d e f g h i j k l m n"))
    other = hashes(text("x b c d e f g h i j k l m n"))
    assert len(base) == len(other) > 2 and not set(base) & set(other)
    longer = hashes(text("a b c d e f g h i j k l m n o p q r s t"))
    assert longer[: len(base) - 1] == base[:-1]
    videos = [hashes(ask(v)) for v in (0, 1)]
    same = [a == b for a, b in zip(*videos, strict=True)]
    assert same == sorted(same, reverse=True) and not same[-1] and hashes(ask(0)) == videos[0]


def test_block_manager_against_a_model_of_it() -> None:
    """In random use, every block is referenced, cached or empty. A block with references is never allocated again."""
    generator = random.Random(1)
    block_manager = BlockManager(16)
    held: list[list[int]] = []
    content: dict[int, bytes] = {}
    for turn in range(3000):
        if held and (generator.random() < 0.45 or block_manager.num_free_blocks == 0):
            block_manager.free(held.pop(generator.randrange(len(held))))
        else:
            stem = generator.randrange(4)
            wanted = [f"{stem}.{i}".encode() for i in range(generator.randrange(1, 5))]
            cached = block_manager.get_cached_blocks(wanted)
            assert [content[block] for block in cached] == wanted[: len(cached)]
            block_manager.touch(cached)
            if len(wanted) - len(cached) > block_manager.num_free_blocks:
                block_manager.free(cached)
                continue
            fresh = block_manager.allocate(len(wanted) - len(cached))
            assert not {b for blocks in held for b in blocks} & set(fresh) and not set(cached) & set(fresh)
            for block, block_hash in zip(fresh, wanted[len(cached) :], strict=True):
                content[block] = block_hash if turn % 3 else b"never cached"
                if turn % 3:
                    block_manager.cache_block(block, block_hash)
            held.append(cached + fresh)
        assert block_manager.num_free_blocks == 16 - len({b for blocks in held for b in blocks})


def test_encoder_cache_evicts_the_least_recently_released_entry() -> None:
    def video(i: int) -> SimpleNamespace:
        return SimpleNamespace(mm_hash=bytes([i]))

    freed: list[int] = []
    cache = EncoderCache(2, freed.append)
    entries = [cache.acquire(video(i)) for i in range(5)]
    for entry in entries[:4]:
        entry.is_ready = True
    for i in (2, 0, 1, 3):
        cache.release(entries[i])
    assert freed == [entries[2].video_id, entries[0].video_id]
    assert cache.acquire(video(1)) is entries[1] and cache.acquire(video(2)) is not entries[2]
    cache.release(entries[4])
    assert freed[2:] == [entries[4].video_id], "an entry that was never encoded to its end is of no use"


def test_frames_of_a_file_are_read_once_until_it_changes(
    checkpoint, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes((media / "clip2.mp4").read_bytes())
    os.utime(clip, (1e9, 1e9))
    time.sleep(0.15)  # see frame_cache: a file that has only just changed is not trusted
    llm = load(checkpoint, media_workers=0)  # reads are counted in this process
    reads: list[object] = []
    read = VideoProcessor._read

    def counted_read(processor: VideoProcessor, item, *given):
        reads.append(item)
        return read(processor, item, *given)

    monkeypatch.setattr(VideoProcessor, "_read", counted_read)
    first = llm.chat(str(clip), "what is it?", PARAMS)
    assert_same_output(llm.chat(clip, "what is it?", PARAMS), first)
    assert len(reads) == 1
    data = clip.read_bytes()
    for _ in range(2):
        assert_same_output(llm.chat(data, "what is it?", PARAMS), first)
    assert len(reads) == 2
    llm.generate({"prompt": "<image>", "video": clip, "frame_indices": [0, 1, 1, 2]}, PARAMS)
    assert len(reads) == 3
    clip.write_bytes((media / "clip10.mp4").read_bytes())
    llm.chat(clip, "what is it?", PARAMS)
    assert len(reads) == 4


def test_media_without_a_key_are_read_every_time(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that has only just changed has no key. What it held before is never taken for what it holds now."""
    monkeypatch.setattr("atb_pllava.multimodal.media_key._SECONDS_TO_SETTLE", 3600.0)
    cache = FrameCache(2**20)
    processor = VideoProcessor(4, PreprocessorConfig(56, 56), cache=cache)
    clip = tmp_path / "clip.mp4"
    hashes = []
    for name in ("clip2.mp4", "clip10.mp4", "clip2.mp4"):
        clip.write_bytes((media / name).read_bytes())
        hashes.append(processor.prepare([clip])[0].mm_hash)
    assert hashes[0] == hashes[2] != hashes[1] and cache.get(None) is None


def test_frame_cache_keeps_to_its_limit() -> None:
    cache = FrameCache(10)
    cache.put("a", videos_of(4))
    cache.put("b", videos_of(4))
    assert cached_bytes(cache, "a") == 4
    cache.put("c", videos_of(4))
    assert [cached_bytes(cache, key) for key in "abc"] == [4, None, 4]
    cache.put("huge", videos_of(11))
    assert cached_bytes(cache, "huge") is None and cached_bytes(cache, "a") == 4
    cache.put("a", videos_of(2, 4))
    assert cached_bytes(cache, "a") == 6 and cached_bytes(cache, "c") == 4


def videos_of(*sizes: int) -> list[ProcessedVideo]:
    """Videos whose frames have so many bytes."""
    preprocessor = PreprocessorConfig()
    return [ProcessedVideo(np.zeros(size, np.uint8), (0,), (0,), preprocessor) for size in sizes]


def cached_bytes(cache: FrameCache, key: str) -> int | None:
    videos = cache.get(key)
    return None if videos is None else sum(video.frames.nbytes for video in videos)


def test_media_keys(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x")
    assert media_key([str(file)], None) is None, "too fresh"
    time.sleep(0.15)
    assert media_key([str(file)], None) == media_key([file], None) is not None
    assert media_key([file], [[1, 2]]) != media_key([file], [[1, 3]]) != media_key([file], None)
    assert media_key([tmp_path], None) is None and media_key([tmp_path / "none"], None) is None
    assert media_key([b"1"], None) != media_key([b"2"], None) == media_key([b"2"], None)
    one = np.zeros((2, 3, 4, 3), np.uint8)
    assert media_key([one], None) != media_key([one.reshape(2, 4, 3, 3)], None)
    assert media_key([one[::-1]], None) == media_key([one], None)
    assert media_key([3], None) is None
    assert media_key([np.zeros(2, "datetime64[s]")], None) is None, "refused by the reader, with its own words"


def test_media_are_read_beside_the_model(checkpoint, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(checkpoint, max_batch_size=1)
    clip = str(media / "clip2.mp4")
    threads: set[str] = set()
    prepare = VideoProcessor._prepare_all

    def noted(*arguments):
        threads.add(threading.current_thread().name)
        return prepare(*arguments)

    monkeypatch.setattr(VideoProcessor, "_prepare_all", noted)
    requests = [{"question": str(i), "video": clip, "frame_indices": [i % 2, 1, 1, 2]} for i in range(4)]
    answers = dict(llm.generate_iter(requests, PARAMS))
    assert sorted(answers) == [0, 1, 2, 3] and threads and threading.current_thread().name not in threads


def test_serve_reads_no_further_than_needed(checkpoint) -> None:
    llm = load(checkpoint, max_batch_size=1)
    taken: list[int] = []

    def source():
        for i in range(20):
            taken.append(i)
            yield ask(i % 6)

    stream = llm.generate_iter(source(), SamplingParams(max_tokens=2))
    next(stream)
    assert len(taken) <= 4
    stream.close()
    assert not llm.engine.has_work


def test_cache_options_are_checked(checkpoint) -> None:
    with pytest.raises(ConfigError, match="video_cache_bytes is -1"):
        load(checkpoint, video_cache_bytes=-1)
    with pytest.raises(ConfigError, match="prefix_cache is 'yes'"):
        load(checkpoint, prefix_cache="yes")
