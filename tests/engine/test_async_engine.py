"""AsyncEngine: any thread and any task may ask, abort and read, and no request is ever left without an end."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from atb_pllava import LLM, BackendError, PllavaError, RequestError, RequestOutput, SamplingParams
from atb_pllava.engine.outputs import CompletionDelta
from atb_pllava.engine.request_stream import RequestStream
from atb_pllava.errors import EngineDeadError
from atb_pllava.multimodal.processor import VideoProcessor
from tests.support import ROOT, assert_same_output, free_blocks, load_llm, random_frames

FRAMES = random_frames(3, 4, 70, 90, 3, seed=5)
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=3)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
QUESTIONS = ["what is it?", "why?", "when is it?", "who is there?", "where?", "how is it done?", "is it a cat?", "so?"]
PATIENCE = 60.0  # seconds after which a test fails that would wait for ever


def request_of(number: int) -> dict[str, Any]:
    """Requests with and without a video, some about the same video."""
    question = QUESTIONS[number % len(QUESTIONS)]
    return {"question": question} if number % 4 == 3 else {"question": question, "frames": FRAMES[number % 3]}


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[RequestOutput]:
    llm = load_llm(checkpoint, max_batch_size=1)
    return [llm.generate(request_of(number), PARAMS)[0] for number in range(8)]


@pytest.fixture
def llm(checkpoint: Path) -> Iterator[LLM]:
    with load_llm(checkpoint, max_batch_size=4) as llm:
        yield llm


class Gate:
    """Holds the engine's thread before every forward pass, until `let` or `open`."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = llm.engine
        self._runner = llm.engine.core.executor.runner
        self._forward = self._runner.forward
        self._arrived = threading.Semaphore(0)
        self._passes = threading.Semaphore(0)
        self._is_open = False
        self.error: BaseException | None = None
        monkeypatch.setattr(self._runner, "forward", self._wait)

    def wait_for_step(self) -> None:
        """Wait until the engine's thread stands before a forward pass."""
        assert self._arrived.acquire(timeout=PATIENCE)

    def let(self, steps: int = 1) -> None:
        """Let the thread through, and wait until the thread stands before the forward pass `steps` later."""
        for _ in range(steps):
            self._passes.release()
            self.wait_for_step()

    def open(self, error: BaseException | None = None) -> None:
        """Let the thread through from now on. The forward pass raises `error`, if there is one."""
        self.error = error
        self._is_open = True
        self._passes.release()

    def _wait(self, *arguments: Any) -> Any:
        if not self._is_open:
            self._arrived.release()
            while not self._passes.acquire(timeout=0.02):
                pass
        if self.error is not None:
            raise self.error
        return self._forward(*arguments)


@pytest.fixture
def gate(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(llm, monkeypatch)
    yield gate
    gate.open()


class Reading:
    """Holds the readers of media before they parse, until `open`."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self._parse = llm.request_parser.parse
        self._opened = threading.Event()
        self._begun = threading.Semaphore(0)
        monkeypatch.setattr(llm.request_parser, "parse", self._wait)

    def wait_for_one(self) -> None:
        assert self._begun.acquire(timeout=PATIENCE)

    def open(self) -> None:
        self._opened.set()

    def _wait(self, *arguments: Any) -> Any:
        self._begun.release()
        assert self._opened.wait(PATIENCE)
        return self._parse(*arguments)


@pytest.fixture
def reading(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reading]:
    reading = Reading(llm, monkeypatch)
    yield reading
    reading.open()


def run_together(functions: list[Callable[[], Any]]) -> list[Any]:
    """Call all functions, each on a thread of its own. All start at the same moment."""
    barrier = threading.Barrier(len(functions))

    def start(function: Callable[[], Any]) -> Any:
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as threads:
        return [future.result(PATIENCE) for future in [threads.submit(start, function) for function in functions]]


def joined(deltas: list[CompletionDelta], index: int) -> tuple[str, list[int], list[Any], list[str]]:
    """The text, tokens, log-probabilities and finish reasons of all deltas of one answer."""
    own = [delta for delta in deltas if delta.index == index]
    return (
        "".join(delta.text for delta in own),
        [token for delta in own for token in delta.token_ids],
        [entry for delta in own for entry in delta.logprobs],
        [delta.finish_reason for delta in own if delta.finish_reason is not None],
    )


def assert_deltas_make(deltas: list[CompletionDelta], output: RequestOutput) -> None:
    """The deltas of every answer join to it, and its last delta alone has the finish reason."""
    for answer in output.outputs:
        expected = (answer.text, answer.token_ids, answer.logprobs or [], [answer.finish_reason])
        assert joined(deltas, answer.index) == expected
        assert [delta for delta in deltas if delta.index == answer.index][-1].finish_reason == answer.finish_reason


def assert_idle(llm: LLM) -> None:
    """Nothing is under way, and no block is held."""
    free, total = free_blocks(llm)
    stats = llm.engine.stats()
    assert free == total and not llm.engine.has_work
    assert (stats.reading, stats.waiting, stats.running, stats.kv_blocks_used) == (0, 0, 0, 0)


def assert_still_answers(llm: LLM, alone: list[RequestOutput]) -> None:
    assert_same_output(llm.generate(request_of(0), PARAMS)[0], alone[0])
    assert_idle(llm)


# Threads


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_that_stream_get_what_one_alone_gets(llm: LLM, alone: list[RequestOutput], threads: int) -> None:
    def ask(number: int) -> str:
        request = request_of(number)
        return "".join(llm.stream(request.get("frames"), request["question"], PARAMS))

    texts = run_together([lambda number=number: ask(number) for number in range(threads)])
    assert texts == [output.text for output in alone[:threads]]
    assert_idle(llm)


def test_threads_may_mix_chat_stream_and_batches(llm: LLM, alone: list[RequestOutput]) -> None:
    def chat(number: int) -> list[str]:
        request = request_of(number)
        return [llm.chat(request.get("frames"), request["question"], PARAMS).text for _ in range(2)]

    def stream(number: int) -> list[str]:
        request = request_of(number)
        return ["".join(llm.stream(request.get("frames"), request["question"], PARAMS)) for _ in range(2)]

    def batch(first: int) -> list[str]:
        answers = dict(llm.generate_iter([request_of(first + i) for i in range(4)], PARAMS))
        return [answers[i].text for i in range(4)]

    def encode(_: int) -> list[str]:
        return [str(llm.encode_video(FRAMES[0]).shape)]

    kinds = [(chat, 0), (stream, 1), (batch, 0), (batch, 4), (encode, 0), (chat, 5), (stream, 3)]
    results = run_together([lambda kind=kind, number=number: kind(number) for kind, number in kinds])
    texts = [output.text for output in alone]
    expected = [[texts[0]] * 2, [texts[1]] * 2, texts[:4], texts[4:], ["torch.Size([8, 64])"], [texts[5]] * 2]
    assert results == [*expected, [texts[3]] * 2]
    assert_idle(llm)


# Deltas


@pytest.mark.parametrize("stop", [(), ("e",), ("▁never", "a")])
def test_deltas_join_to_the_answer(llm: LLM, alone: list[RequestOutput], stop: tuple[str, ...]) -> None:
    text = alone[0].text
    stop = tuple(text[4:6] if s == "e" else s for s in stop)
    params = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=3, stop=stop)
    stream = llm.engine.submit(request_of(0), params)
    deltas = list(stream)
    assert_deltas_make(deltas, stream.result())
    assert list(stream) == [], "all is read"
    assert_same_output(llm.generate(request_of(0), params)[0], stream.result())


def test_deltas_of_three_answers_join_by_index(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, n=3, ignore_eos=True, logprobs=2)
    stream = llm.engine.submit(request_of(0), params)
    deltas = list(stream)
    output = stream.result()
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
    assert_deltas_make(deltas, output)


def test_a_slow_reader_loses_nothing_and_holds_up_nobody(llm: LLM, gate: Gate, alone: list[RequestOutput]) -> None:
    slow = llm.engine.submit(request_of(0), PARAMS)
    deltas = iter(slow)
    gate.wait_for_step()
    gate.let(3)  # the first pass has sampled, and so have two more at least
    first = next(deltas)
    assert 1 <= len(first.token_ids) <= 3
    gate.open()
    assert_same_output(llm.generate(request_of(1), PARAMS)[0], alone[1])
    assert slow.result(PATIENCE).token_ids == alone[0].token_ids
    rest = list(deltas)
    assert len(rest) == 1, "one long delta for all that the reader has missed"
    assert_deltas_make([first, *rest], slow.result())


def test_listeners_hear_of_what_was_before(llm: LLM) -> None:
    stream = llm.engine.submit(request_of(3), PARAMS)
    stream.result(PATIENCE)
    heard: list[RequestStream] = []
    stream.add_listener(heard.append)
    assert heard == [stream]
    stream.remove_listener(heard.append)


# asyncio


def test_async_deltas_join_to_the_answer(llm: LLM, alone: list[RequestOutput]) -> None:
    async def ask() -> None:
        stream = llm.engine.submit(request_of(0), PARAMS)
        deltas = [delta async for delta in stream]
        output = await stream.wait()
        assert_deltas_make(deltas, output)
        assert_same_output(output, alone[0])

    asyncio.run(ask())


def test_wait_leaves_the_deltas_to_the_reader(llm: LLM, gate: Gate, alone: list[RequestOutput]) -> None:
    async def ask() -> None:
        stream = llm.engine.submit(request_of(0), PARAMS)
        wait = asyncio.create_task(stream.wait())
        await asyncio.to_thread(gate.wait_for_step)
        await asyncio.to_thread(gate.let)
        gate.open()
        output = await wait
        assert_deltas_make([delta async for delta in stream], output)
        assert_same_output(output, alone[0])

    asyncio.run(ask())


def test_many_streams_in_one_loop_beside_threads(llm: LLM, alone: list[RequestOutput]) -> None:
    async def read(number: int) -> str:
        text = ""
        async for delta in llm.engine.submit(request_of(number), PARAMS):
            text += delta.text
        return text

    async def ask() -> list[str]:
        waits = [llm.engine.submit(request_of(number), PARAMS).wait() for number in range(8)]
        read_texts = await asyncio.gather(*(read(number) for number in range(8)))
        return [*read_texts, *(output.text for output in await asyncio.gather(*waits))]

    in_loop, in_thread = run_together(
        [lambda: asyncio.run(ask()), lambda: [out.text for out in llm.generate([request_of(0), request_of(1)], PARAMS)]]
    )
    texts = [output.text for output in alone]
    assert in_loop == [*texts, *texts] and in_thread == texts[:2]
    assert_idle(llm)


def test_a_cancelled_task_leaves_its_request_alone(llm: LLM, gate: Gate, alone: list[RequestOutput]) -> None:
    async def ask() -> RequestStream:
        stream = llm.engine.submit(request_of(0), PARAMS)
        task = asyncio.create_task(stream.wait())
        await asyncio.to_thread(gate.wait_for_step)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not stream.is_finished and not stream._listeners
        return stream

    stream = asyncio.run(ask())
    gate.open()
    assert_same_output(stream.result(PATIENCE), alone[0])


def test_a_closed_loop_does_not_disturb_the_engine(llm: LLM, gate: Gate, alone: list[RequestOutput]) -> None:
    loop = asyncio.new_event_loop()
    stream = llm.engine.submit(request_of(0), PARAMS)
    deltas = stream.__aiter__()
    gate.wait_for_step()
    waiting = loop.create_task(deltas.__anext__())
    loop.run_until_complete(asyncio.sleep(0))
    loop.stop()
    loop.run_forever()
    loop.close()
    gate.open()
    assert_same_output(stream.result(PATIENCE), alone[0])
    assert_still_answers(llm, alone)
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]  # the test itself has left the task pending
    del waiting


def test_an_error_reaches_async_readers(llm: LLM, tmp_path: Path) -> None:
    async def ask() -> None:
        stream = llm.engine.submit({"question": "a", "video": tmp_path / "missing.mp4"}, PARAMS)
        with pytest.raises(PllavaError, match="missing.mp4"):
            _ = [delta async for delta in stream]
        with pytest.raises(PllavaError, match="missing.mp4"):
            await stream.wait()

    asyncio.run(ask())


# Abort


def test_abort_while_media_are_read(llm: LLM, reading: Reading, alone: list[RequestOutput]) -> None:
    stream = llm.engine.submit(request_of(0), PARAMS)
    reading.wait_for_one()
    assert llm.engine.stats().reading == 1
    llm.engine.abort(stream.request_id)
    with pytest.raises(RequestError, match="aborted"):
        stream.result(PATIENCE)
    assert not llm.engine.has_work
    reading.open()
    assert_still_answers(llm, alone)
    assert llm.engine.stats().failed == 1


def test_abort_while_waiting_for_a_reader(llm: LLM, reading: Reading, alone: list[RequestOutput]) -> None:
    """There are fewer readers than requests."""
    streams = [llm.engine.submit(request_of(number), PARAMS) for number in range(8)]
    reading.wait_for_one()
    for stream in streams[:-1]:
        llm.engine.abort(stream.request_id)
    reading.open()
    assert_same_output(streams[-1].result(PATIENCE), alone[7])
    assert_idle(llm)


def test_abort_in_the_queue_and_while_decoding(llm: LLM, gate: Gate, alone: list[RequestOutput]) -> None:
    streams = llm.engine.add_all([llm.prepare(request_of(number), PARAMS) for number in range(6)])
    gate.wait_for_step()
    gate.let(2)
    stats = llm.engine.stats()
    assert (stats.running, stats.waiting) == (4, 2) and stats.kv_blocks_used > 0
    for stream in (streams[0], streams[5]):
        llm.engine.abort(stream.request_id)
        llm.engine.abort(stream.request_id)
        with pytest.raises(RequestError, match="aborted"):
            stream.result(0)
    gate.let()
    stats = llm.engine.stats()
    assert (stats.running, stats.waiting, stats.failed) == (4, 0, 2)
    gate.open()
    for number in range(1, 5):
        assert_same_output(streams[number].result(PATIENCE), alone[number])
    assert_idle(llm)


def test_abort_of_a_finished_or_unknown_request_does_nothing(llm: LLM) -> None:
    stream = llm.engine.submit(request_of(3), PARAMS)
    output = stream.result(PATIENCE)
    llm.engine.abort(stream.request_id)
    stream.abort()
    llm.engine.abort("request-0")
    assert stream.result() is output
    stats = llm.engine.stats()
    assert (stats.finished, stats.failed) == (1, 0)


def test_abort_ends_a_reader_in_another_thread(llm: LLM, gate: Gate) -> None:
    stream = llm.engine.submit(request_of(0), LONG)
    with ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(list, stream), threads.submit(stream.result)]
        gate.wait_for_step()
        stream.abort()
        for reader in readers:
            with pytest.raises(RequestError, match="aborted"):
                reader.result(PATIENCE)
    gate.open()
    assert_idle(llm)


def test_a_prepared_request_cannot_run_twice_at_once(llm: LLM, gate: Gate, alone: list[RequestOutput]) -> None:
    request = llm.prepare(request_of(0), PARAMS)
    with pytest.raises(RequestError, match="under way already"):
        llm.engine.add_all([request, request])
    stream = llm.engine.add(request)
    gate.wait_for_step()
    with pytest.raises(RequestError, match="under way already"):
        llm.engine.add(request)
    stream.abort()
    again = llm.engine.add(request)  # the engine's thread takes the abort first
    gate.open()
    assert_same_output(again.result(PATIENCE), alone[0])
    assert_same_output(llm.engine.add(request).result(PATIENCE), alone[0])
    assert_idle(llm)


def test_a_listener_may_ask_an_aborted_request_again(llm: LLM, gate: Gate, alone: list[RequestOutput]) -> None:
    request = llm.prepare(request_of(0), PARAMS)
    stream = llm.engine.add(request)
    gate.wait_for_step()
    again: list[RequestStream] = []
    stream.add_listener(lambda _: again.append(llm.engine.add(request)))
    stream.abort()
    gate.open()
    assert_same_output(again[0].result(PATIENCE), alone[0])
    assert_idle(llm)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("interrupted", ["_start_thread", "_reader.submit", "_post"])
def test_ctrl_c_while_a_request_is_added_leaves_nothing(
    llm: LLM, alone: list[RequestOutput], monkeypatch: pytest.MonkeyPatch, interrupted: str, before: bool
) -> None:
    """Ctrl-C comes before or after a part of `submit` or `add`. The caller has no stream to abort then."""
    owner, _, name = interrupted.rpartition(".")
    part = getattr(llm.engine, owner) if owner else llm.engine
    work = getattr(part, name)
    prepared = llm.prepare(request_of(0), LONG)

    def interrupt(*arguments: Any) -> None:
        monkeypatch.setattr(part, name, work)
        if not before:
            work(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(part, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        if name == "_post":
            llm.engine.add(prepared)
        else:
            llm.engine.submit(request_of(0), LONG)
    assert not llm.engine.has_work
    assert_still_answers(llm, alone)


# Time limits and shutting down


def test_result_waits_no_longer_than_its_limit(llm: LLM, gate: Gate, alone: list[RequestOutput]) -> None:
    stream = llm.engine.submit(request_of(0), PARAMS)
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError, match="the request was not answered within"):
            stream.result(timeout)
    gate.open()
    assert_same_output(stream.result(PATIENCE), alone[0])


def test_drain_answers_what_runs_and_refuses_what_comes(llm: LLM, gate: Gate, alone: list[RequestOutput]) -> None:
    streams = [llm.engine.submit(request_of(number), PARAMS) for number in range(6)]
    gate.wait_for_step()
    assert not llm.engine.drain(0.01)
    for ask in (lambda: llm.engine.submit(request_of(0)), lambda: llm.engine.add(llm.prepare(request_of(0)))):
        with pytest.raises(BackendError, match="no more requests"):
            ask()
    gate.open()
    assert llm.engine.drain(PATIENCE)
    for number, stream in enumerate(streams):
        assert_same_output(stream.result(0), alone[number])
    assert_idle(llm)


def test_close_in_a_step_ends_every_request(llm: LLM, gate: Gate) -> None:
    """The step does not end by itself: `close` interrupts it."""
    streams = [llm.engine.submit(request_of(number), LONG) for number in range(6)]
    gate.wait_for_step()
    pending = llm.engine.call(lambda core: core)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(llm.close).result(PATIENCE)
    for stream in streams:
        with pytest.raises(BackendError, match="was closed"):
            stream.result(PATIENCE)
    with pytest.raises(BackendError, match="was closed"):
        pending.result(PATIENCE)
    assert llm.engine.is_dead and not llm.engine.has_work
    assert not llm.engine._thread.is_alive()


def test_close_interrupts_a_call(llm: LLM) -> None:
    entered = threading.Event()

    def never_ends(_: object) -> None:
        entered.set()
        while True:
            time.sleep(0.01)

    future = llm.engine.call(never_ends)
    assert entered.wait(PATIENCE)
    llm.close()
    with pytest.raises(BackendError, match="was closed"):
        future.result(PATIENCE)


def test_close_while_media_are_read(llm: LLM, reading: Reading) -> None:
    streams = [llm.engine.submit(request_of(number), PARAMS) for number in range(4)]
    reading.wait_for_one()
    llm.close()
    for stream in streams:
        with pytest.raises(BackendError, match="was closed"):
            stream.result(PATIENCE)
    reading.open()


def test_a_closed_engine_refuses_by_name(llm: LLM) -> None:
    request = llm.prepare(request_of(3), PARAMS)
    llm.close()
    llm.close()
    for ask in (
        lambda: llm.engine.add(request),
        lambda: llm.engine.submit(request_of(3)),
        lambda: llm.generate(request_of(3)),
        lambda: llm.chat(None, "why?"),
        lambda: next(llm.stream(None, "why?")),
        lambda: llm.encode_video(FRAMES[0]),
        lambda: llm.prepare(request_of(0)),
        lambda: llm.engine.call(lambda core: core),
    ):
        with pytest.raises(BackendError, match="was closed; load it anew"):
            ask()
    assert llm.engine.drain(PATIENCE) and not llm.engine.has_work


def test_threads_may_close_at_once(llm: LLM) -> None:
    streams = [llm.engine.submit(request_of(number), LONG) for number in range(4)]
    run_together([llm.close] * 4)
    for stream in streams:
        with pytest.raises(BackendError, match="was closed"):
            stream.result(PATIENCE)


def test_the_engine_may_close_itself(llm: LLM) -> None:
    llm.engine.call(lambda _: llm.close()).result(PATIENCE)
    with pytest.raises(BackendError, match="was closed"):
        llm.chat(None, "why?")


def test_close_that_is_interrupted_still_frees_all(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a second Ctrl-C while `close` waits for the engine's thread."""
    freed: list[bool] = []
    stream = llm.engine.submit(request_of(0), LONG)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine, "_stop_thread", interrupted)
    monkeypatch.setattr(llm.engine, "_on_close", [*llm.engine._on_close, lambda: freed.append(True)])
    with pytest.raises(KeyboardInterrupt):
        llm.close()
    assert freed == [True]
    with pytest.raises(BackendError, match="was closed"):
        stream.result(PATIENCE)


def test_refusals_keep_nothing_alive(llm: LLM) -> None:
    """Their common exception does not collect the frames of all callers."""
    llm.close()
    lengths = []
    for _ in range(5):
        with pytest.raises(BackendError, match="was closed") as caught:
            llm.engine.submit(request_of(3))
        lengths.append(len(list(caught.traceback)))
    assert len(set(lengths)) == 1


# Failures


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("boom"), EngineDeadError, "a step failed with RuntimeError: boom; load the model anew"),
        (MemoryError("no room"), EngineDeadError, "a step failed with MemoryError: no room"),
        (BackendError("rank 1 is gone"), BackendError, "^rank 1 is gone$"),
    ],
)
def test_an_exception_in_a_step_fails_every_request(
    llm: LLM, gate: Gate, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type, message: str
) -> None:
    streams = [llm.engine.submit(request_of(number), PARAMS) for number in range(6)]
    gate.wait_for_step()
    reading = Reading(llm, monkeypatch)
    being_read = llm.engine.submit(request_of(0), PARAMS)
    reading.wait_for_one()
    pending = llm.engine.call(lambda core: core)
    cancelled: Future[Any] = llm.engine.call(lambda core: core)
    assert cancelled.cancel() and not llm.engine.is_dead
    gate.open(error)
    for wait in [stream.result for stream in (*streams, being_read)] + [pending.result]:
        with pytest.raises(kind, match=message) as caught:
            wait(PATIENCE)
        assert error in (caught.value, caught.value.__cause__)
    with pytest.raises(CancelledError):
        cancelled.result(PATIENCE)
    reading.open()
    for ask in (lambda: llm.chat(None, "why?"), lambda: llm.engine.submit(request_of(3)), lambda: llm.prepare({})):
        with pytest.raises(kind, match=message):
            ask()
    assert llm.engine.is_dead and not llm.engine.has_work and llm.engine.stats().failed == 7
    llm.close()


def test_a_request_that_comes_while_the_engine_dies_does_not_revive_it(
    llm: LLM, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llm.engine
    llm.engine.submit(request_of(3), PARAMS)
    gate.wait_for_step()
    thread = engine._thread
    start_thread = engine._start_thread
    steps: list[Any] = []

    def start_after_death() -> None:
        gate.open(RuntimeError("boom"))
        assert engine._changed.wait_for(lambda: engine.is_dead and not engine.has_work, PATIENCE)
        assert thread is not None
        thread.join(PATIENCE)
        monkeypatch.setattr(engine.core, "step", steps.append)
        start_thread()

    monkeypatch.setattr(engine, "_start_thread", start_after_death)
    with pytest.raises(EngineDeadError, match="boom"):
        engine.submit(request_of(7), PARAMS).result(PATIENCE)
    assert engine._thread is thread and not steps


def test_an_exception_in_a_batch_is_its_own(llm: LLM, gate: Gate) -> None:
    gate.open(RuntimeError("boom"))
    with pytest.raises(EngineDeadError, match="boom"):
        llm.generate([request_of(number) for number in range(6)], PARAMS)


def test_a_failed_encoding_leaves_its_video_to_others(
    llm: LLM, gate: Gate, alone: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = llm.engine.core.executor.runner
    pool_frames = runner.pool_frames

    def fail(video: int, inverse_indices: Any) -> None:
        pool_frames(video, inverse_indices)
        monkeypatch.setattr(runner, "pool_frames", pool_frames)
        raise MemoryError("no room")

    other = llm.engine.submit(request_of(3), PARAMS)
    gate.wait_for_step()
    stream = llm.engine.add(llm.prepare(request_of(0), PARAMS))
    monkeypatch.setattr(runner, "pool_frames", fail)
    with ThreadPoolExecutor(1) as thread:
        encoding = thread.submit(llm.encode_video, FRAMES[0])
        gate.open()
        with pytest.raises(MemoryError, match="no room"):
            encoding.result(PATIENCE)
    assert_same_output(stream.result(PATIENCE), alone[0])
    assert_same_output(other.result(PATIENCE), alone[3])
    assert_idle(llm)


def test_an_exception_in_a_call_is_its_own(llm: LLM, alone: list[RequestOutput]) -> None:
    with pytest.raises(ZeroDivisionError):
        llm.engine.call(lambda _: 1 // 0).result(PATIENCE)
    assert_still_answers(llm, alone)


@pytest.mark.parametrize("error", [RuntimeError("the codec is broken"), MemoryError("no room")])
def test_an_exception_in_reading_fails_one_request(
    llm: LLM, alone: list[RequestOutput], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    prepare = VideoProcessor.prepare

    def broken(processor: VideoProcessor, media: list[Any], *arguments: Any) -> Any:
        if isinstance(media[0], str):
            raise error
        return prepare(processor, media, *arguments)

    monkeypatch.setattr(VideoProcessor, "prepare", broken)
    requests = [request_of(0), {"question": "a", "video": "broken.mp4"}, request_of(1)]
    answers = dict(llm.generate_iter(requests, PARAMS))
    assert_same_output(answers[0], alone[0])
    assert_same_output(answers[2], alone[1])
    assert isinstance(answers[1], RequestError) and answers[1].__cause__ is error
    assert f"could not be read: {type(error).__name__}: {error}" in str(answers[1])
    assert not isinstance(answers[1], EngineDeadError)
    assert not llm.engine.is_dead
    assert_still_answers(llm, alone)


# Statistics


def test_stats_count_what_happens(llm: LLM, gate: Gate, reading: Reading, media: Path) -> None:
    engine = llm.engine
    first = engine.stats()
    assert (first.reading, first.waiting, first.running, first.kv_blocks_used) == (0, 0, 0, 0)
    assert first.kv_blocks_total > 0 and first.core.steps == 0
    clip = {"question": "what?", "video": media / "clip2.mp4"}
    requests = [clip, clip, *(request_of(3) for _ in range(4)), {"question": "a", "video": media / "notes.txt"}]
    streams = [engine.submit(request, PARAMS) for request in requests]
    reading.wait_for_one()
    assert engine.stats().reading == 7 and engine.has_work
    reading.open()
    with pytest.raises(PllavaError):
        streams[-1].result(PATIENCE)
    gate.open()
    outputs = [stream.result(PATIENCE) for stream in streams[:-1]]
    assert_idle(llm)
    last = engine.stats()
    assert (last.finished, last.failed) == (6, 1)
    assert last.core.generated_tokens == 6 * 24
    assert last.core.prompt_tokens == sum(output.metrics.prompt_tokens for output in outputs)
    assert last.core.cached_tokens == sum(output.num_cached_tokens for output in outputs)
    assert last.core.prefilled_tokens == last.core.prompt_tokens - last.core.cached_tokens
    assert (last.core.encoder_queries, last.core.encoded_frames) == (2, 4)
    assert last.core.preemptions == sum(output.metrics.preemptions for output in outputs) == 0
    assert first.core.steps == 0, "a snapshot stays as it is"
    llm.generate([clip], PARAMS)
    again = engine.stats()
    assert (again.core.encoder_queries, again.core.encoder_hits) == (3, last.core.encoder_hits + 1)
    assert (again.core.encoded_frames, again.finished) == (4, 7)


def test_stats_count_preemptions(checkpoint: Path) -> None:
    per_block = 2 * 2 * 2 * 16 * 4 * 16  # 2 layers, 2 KV heads of 16, float32, 16 tokens
    llm = load_llm(checkpoint, block_size=16, kv_cache_bytes=4 * per_block, max_batch_size=2)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    streams = llm.engine.add_all([llm.prepare({"prompt": prompt}, params) for prompt in ("why", "who")])
    preemptions = sum(stream.result(PATIENCE).metrics.preemptions for stream in streams)
    assert llm.engine.stats().core.preemptions == preemptions > 0


def test_recorded_steps_are_those_of_the_body(llm: LLM) -> None:
    llm.generate(request_of(0), PARAMS)
    with llm.engine.recorded_steps() as steps:
        output = llm.generate(request_of(3), PARAMS)[0]
    llm.generate(request_of(1), PARAMS)
    assert sum(step.sampled for step in steps) == 24 and sum(step.decoding for step in steps) == 23
    assert sum(step.prefilled for step in steps) == output.metrics.prompt_tokens - output.num_cached_tokens
    assert [step.encoded for step in steps] == [0] * len(steps)
    assert all(0 <= step.forward <= step.total for step in steps)


# Processes


def in_forked_child(body: Callable[[], None]) -> None:
    """Run `body` in a forked child. Fails if the child hangs or does not end with status 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # of Python 3.12
@pytest.mark.parametrize("lock", ["engine", "stream", "none"])
def test_a_forked_child_is_refused_by_name(llm: LLM, gate: Gate, alone: list[RequestOutput], lock: str) -> None:
    """Whatever another thread does at that moment. A lock that it holds is held for ever in the child."""
    stream = llm.engine.submit(request_of(0), PARAMS)
    gate.wait_for_step()
    held = {"engine": llm.engine._changed, "stream": stream._changed, "none": threading.Condition()}[lock]
    has_lock = threading.Event()
    forked = threading.Event()

    def hold() -> None:
        with held:
            has_lock.set()
            forked.wait(PATIENCE)

    def child() -> None:
        for ask in (
            stream.result,
            lambda: list(stream),
            lambda: llm.engine.submit(request_of(0)),
            lambda: llm.generate(request_of(0)),
            lambda: next(llm.stream(FRAMES[0], "why?")),
            lambda: llm.encode_video(FRAMES[0]),
        ):
            with pytest.raises(BackendError, match="a forked child cannot use it: load it anew"):
                ask()
        assert not llm.engine.has_work
        llm.close()

    holder = threading.Thread(target=hold)
    holder.start()
    assert has_lock.wait(PATIENCE)
    try:
        in_forked_child(child)
    finally:
        forked.set()
        holder.join()
    gate.open()
    assert_same_output(stream.result(PATIENCE), alone[0])
    assert_still_answers(llm, alone)


def run_python(program: str, checkpoint: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program that begins with `llm`, an engine of `checkpoint`. Fails if the program hangs."""
    begin = (
        "import os, signal, sys, threading, time\n"
        "from atb_pllava import LLM, BackendError, SamplingParams\n"
        "llm = LLM(sys.argv[1], dtype='float32', backend='cpu')\n"
        "params = SamplingParams(max_tokens=900, ignore_eos=True)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", begin + program, str(checkpoint), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )


INTERRUPTED = """
llm.chat(None, "warm up", max_tokens=1)
def interrupt():
    while not llm.engine.stats().running:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
for ask in (lambda: llm.generate([{"question": "why?"}] * 20, params), lambda: "".join(llm.stream(None, "a", params))):
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        ask()
    except KeyboardInterrupt:
        print("interrupted")
    thread.join()
    assert llm.chat(None, "why?", max_tokens=5).token_ids
    assert not llm.engine.has_work
print("answered")
"""


def test_ctrl_c_ends_a_batch_and_the_engine_goes_on(checkpoint: Path) -> None:
    ended = run_python(INTERRUPTED, checkpoint)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "interrupted\ninterrupted\nanswered\n", "")


LEFT_RUNNING = """
def ask():
    try:
        llm.generate([{"question": "why?"}] * 50, SamplingParams(max_tokens=150, ignore_eos=True))
    except BackendError as error:
        print(error, file=sys.stderr)
thread = threading.Thread(target=ask, daemon=sys.argv[2] == "daemon")
if sys.argv[2] == "submit":
    streams = [llm.engine.submit({"question": "why?"}, params) for _ in range(20)]
else:
    thread.start()
while not llm.engine.stats().running:
    time.sleep(0.001)
print("leaving", flush=True)
"""


@pytest.mark.parametrize("kind", ["daemon", "submit", "thread"])
def test_a_program_may_end_without_close(checkpoint: Path, kind: str) -> None:
    """With requests under way. Python waits for a thread that is no daemon, and its later requests are refused."""
    for _ in range(2):
        ended = run_python(LEFT_RUNNING, checkpoint, kind)
        assert (ended.returncode, ended.stdout) == (0, "leaving\n")
        assert "Traceback" not in ended.stderr and "Fatal" not in ended.stderr
