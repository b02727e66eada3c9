"""Many mixed requests through one engine: every request ends, no answer changes, and nothing grows.

    python tests/soak.py --requests 10000

Several threads and one asyncio loop ask about videos, images, broken files and text, with stop strings, n answers and
beams. Some abort their requests. The KV cache is so small that requests are preempted. Processes that read media are
killed now and then. Every answer is compared with the answer to the same request alone. The exit status is 1 if an
answer differs, a request has no end, or memory, file descriptors, threads or shared memory grow.
"""

import asyncio
import contextlib
import ctypes
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from atb_pllava import LLM, PllavaError, RequestError, RequestOutput, SamplingParams, VideoError
from atb_pllava.engine.request_stream import RequestStream
from tests.process_usage import Usage, growth, usage_of, worker_processes
from tests.soak_report import Report, run_soak

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODEL = {"dtype": "float32", "backend": "cpu", "num_frames": 4, "pooling_shape": (4, 2, 2)}  # 16 tokens a video
BYTES_PER_TOKEN = 4 * 2 * 8 * 32 * 4  # of the KV cache: 4 layers, 8 KV heads of 32, float32
SMALL = {
    "max_batch_size": 8,
    "block_size": 8,
    "kv_cache_bytes": 200 * BYTES_PER_TOKEN,  # two or three requests
    "video_cache_bytes": 1 << 20,  # one video's frames
}
PATIENCE = 300.0  # seconds after which a request counts as lost
THREADS = 4
TASKS = 6  # of the asyncio loop
ENDS = ("answered", "failed by name", "aborted", "lost with a killed process")

Answer = list[tuple[list[int], str, str]]


@dataclass(frozen=True)
class Case:
    """A request, and how it must end: with an answer, with an error, or with an answer that is not known yet."""

    request: Mapping[str, Any]
    params: SamplingParams
    answer: Answer | None = None
    error: type[PllavaError] | None = None

    @property
    def has_media(self) -> bool:
        return not {"video", "image", "frames"}.isdisjoint(self.request)

    @property
    def can_stream(self) -> bool:
        """Whether `LLM.stream` takes such a request."""
        return self.params.num_sequences == 1 and set(self.request) <= {"question", "video", "image", "history"}


def answer_of(output: RequestOutput) -> Answer:
    """The tokens, the text and the finish reason of all answers."""
    return [(answer.token_ids, answer.text, answer.finish_reason) for answer in output.outputs]


def unique_case(number: int) -> Case:
    """A request that no other number has."""
    rng = random.Random(number)
    request: dict[str, Any] = {"question": f"What is in picture {number}?"}
    if number % 2:
        request["frames"] = np.random.default_rng(number).integers(0, 255, (4, 40, 60, 3), dtype=np.uint8)
    return Case(request, SamplingParams(max_tokens=rng.randint(1, 16), ignore_eos=True))


def known_cases(folder: Path) -> list[Case]:
    """The requests that are asked again and again. Their answers are computed by an engine that has nothing else to do.

    folder: for files that cannot be read.
    """
    clips = sorted((EXAMPLES / "videos").glob("*.mp4"))
    broken = _broken_files(folder, clips[0])
    Image.new("RGB", (80, 60), (200, 30, 30)).save(folder / "red.png")
    requests: list[dict[str, Any]] = [
        {"question": "What is this?"},
        {"question": "Why?", "history": [("What moves?", "A circle.")]},
        *({"question": "Describe the video.", "video": clip} for clip in clips),
        {"question": "What moves?", "video": clips[0].read_bytes()},
        {"prompt": "USER: <image> or <image>? ASSISTANT:", "video": clips[:2]},
        {"question": "Which colour?", "image": folder / "red.png"},
    ]
    usual = SamplingParams(max_tokens=40, ignore_eos=True)
    kinds = [
        usual,
        SamplingParams(max_tokens=24),
        SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, seed=5),
        SamplingParams(max_tokens=24, temperature=1.0, seed=6, n=3),
        SamplingParams(max_tokens=12, num_beams=2),
        SamplingParams(max_tokens=12, num_beams=3, ignore_eos=True),
        SamplingParams(max_tokens=24, stop=("e", "moves"), ignore_eos=True, repetition_penalty=1.1),
    ]
    cases = [Case(request, params) for request in requests for params in kinds]
    with LLM(EXAMPLES / "tiny_pllava", **MODEL, max_batch_size=3) as llm:
        answered = [Case(c.request, c.params, answer_of(llm.generate(c.request, c.params)[0])) for c in cases]
    failing = [
        *(Case({"question": "a", "video": path}, usual, error=VideoError) for path in broken),
        Case({"question": "a", "video": folder / "missing.mp4"}, usual, error=VideoError),
        Case({"prompt": "USER: <image> ASSISTANT:"}, usual, error=RequestError),
        Case({"prompt": "why " * 400}, usual, error=RequestError),
        Case({"question": "a", "vidoe": clips[0]}, usual, error=RequestError),
    ]
    return answered + failing


def _broken_files(folder: Path, clip: Path) -> list[Path]:
    """Write files that are no videos, or only the beginning of one."""
    whole = clip.read_bytes()
    contents = {"empty": b"", "text": b"not a video", "head": whole[:200], "noise": random.Random(0).randbytes(5000)}
    for name, content in contents.items():
        (folder / f"{name}.mp4").write_bytes(content)
    return [folder / f"{name}.mp4" for name in contents]


# Asking


@dataclass
class Soak:
    """The callers of one engine. `counts` says how requests ended, and `problems` what must not happen.

    ended, aborted: the numbers of requests that have ended, and of those that their callers have aborted.
    """

    llm: LLM
    cases: list[Case]
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    aborted: set[int] = field(default_factory=set)
    unique_answers: dict[int, Answer] = field(default_factory=dict)
    num_killed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run_round(self, numbers: Iterator[int], kill_seconds: float) -> None:
        """Ask the requests of all `numbers`, and return when all have ended and no caller is left."""
        ended = threading.Event()

        def take() -> int | None:
            with self.lock:
                return next(numbers, None)

        def in_loop() -> None:
            async def ask_all() -> None:
                await asyncio.gather(*(self._ask_in_task(iter(take, None)) for _ in range(TASKS)))

            asyncio.run(ask_all())

        def in_thread() -> None:
            for number in iter(take, None):
                self._ask(number, random.Random(f"{self.seed} {number}"))

        killer = threading.Thread(target=self._kill_workers_until, args=(ended, kill_seconds))
        killer.start()
        with ThreadPoolExecutor(THREADS + 1) as threads:
            futures = [threads.submit(in_loop), *(threads.submit(in_thread) for _ in range(THREADS))]
        ended.set()
        killer.join()
        for future in futures:
            future.result()
        self._check_idle()

    def _kill_workers_until(self, ended: threading.Event, seconds: float) -> None:
        rng = random.Random(self.seed)
        while not ended.wait(rng.uniform(0, 2 * seconds)):
            workers = worker_processes(os.getpid())
            if workers:
                self.num_killed += 1
                os.kill(rng.choice(workers), signal.SIGKILL)

    def _case(self, number: int, rng: random.Random) -> Case:
        return unique_case(number) if rng.random() < 0.15 else rng.choice(self.cases)

    def _ask(self, number: int, rng: random.Random) -> None:
        """Ask one request, or a batch of three more, in one of the ways that threads have."""
        case = self._case(number, rng)
        way = rng.choice(["result", "deltas", "stream", "batch", "abort"])
        try:
            if way == "batch":
                others = [other for other in self.cases if other.params == case.params]
                batch = [case, *rng.sample(others, min(3, len(others)))]
                for index, outcome in self.llm.generate_iter([other.request for other in batch], case.params):
                    self._check(number if index == 0 else None, batch[index], outcome)
            elif way == "stream" and case.can_stream:
                self._check(number, case, self._stream_text(case))
            else:
                stream = self.llm.engine.submit(case.request, case.params)
                if way == "abort":
                    self.aborted.add(number)
                    self._abort(stream, rng)
                elif way == "deltas":
                    self._read_deltas(stream)
                self._check(number, case, _outcome(stream))
        except Exception as error:
            self.problems.append(f"request {number} ({way}, {case.params}): {error!r}")

    def _stream_text(self, case: Case) -> str | PllavaError:
        request = case.request
        media = request.get("video", request.get("image"))
        try:
            pieces = self.llm.stream(media, request["question"], case.params, history=request.get("history", ()))
            return "".join(pieces)
        except PllavaError as error:
            return error

    def _read_deltas(self, stream: RequestStream) -> None:
        """Read all deltas, which must join to the answers. The last one of each answer has the finish reason."""
        joined: dict[int, tuple[list[int], str, str]] = {}
        try:
            for delta in stream:
                tokens, text, reasons = joined.get(delta.index, ([], "", ""))
                joined[delta.index] = (
                    tokens + delta.token_ids,
                    text + delta.text,
                    reasons + (delta.finish_reason or ""),
                )
        except PllavaError:
            return
        if [joined[index] for index in sorted(joined)] != answer_of(stream.result()):
            self.problems.append(f"the deltas of {stream.request_id} do not join to its answer")

    def _abort(self, stream: RequestStream, rng: random.Random) -> None:
        """Abort at a random moment: at once, some time later, or after the first tokens."""
        moment = rng.choice(["at once", "later", "after the first tokens"])
        if moment == "later":
            time.sleep(rng.uniform(0, 0.1))
        elif moment == "after the first tokens":
            with contextlib.suppress(PllavaError):
                next(iter(stream), None)
        for _ in range(rng.randint(1, 2)):
            self.llm.engine.abort(stream.request_id)

    async def _ask_in_task(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            rng = random.Random(f"{self.seed} {number}")
            case = self._case(number, rng)
            try:
                stream = self.llm.engine.submit(case.request, case.params)
                await self._read_in_task(number, stream, rng)
                self._check(number, case, _outcome(stream))
            except Exception as error:
                self.problems.append(f"request {number} (task, {case.params}): {error!r}")

    async def _read_in_task(self, number: int, stream: RequestStream, rng: random.Random) -> None:
        """Iterate, wait, or give up after a short time and abort."""
        way = rng.choice(["deltas", "wait", "give up"])
        try:
            if way == "deltas":
                async for _ in stream:
                    pass
            elif way == "wait":
                await stream.wait()
            else:
                await asyncio.wait_for(stream.wait(), rng.random() * 0.2)
        except asyncio.TimeoutError:
            self.aborted.add(number)
            stream.abort()
        except PllavaError:
            pass

    # Checking

    def _check(self, number: int | None, case: Case, outcome: RequestOutput | str | PllavaError) -> None:
        """Compare an outcome (a text from a stream) with what the case expects, and count it.

        number: None for a request that belongs to the batch of another number.
        """
        if isinstance(outcome, PllavaError):
            end = self._end_of(number, case, outcome)
        elif case.error is not None:
            end = "answered in place of an error"
        elif case.answer is not None:
            expected = case.answer[0][1] if isinstance(outcome, str) else case.answer
            answer = outcome if isinstance(outcome, str) else answer_of(outcome)
            end = "answered" if answer == expected else f"answered with {answer} in place of {expected}"
        else:
            end = "answered"
            if number is not None and isinstance(outcome, RequestOutput):
                self.unique_answers[number] = answer_of(outcome)
        with self.lock:
            self.counts[end if end in ENDS else "wrong"] += 1
            if number is not None:
                self.ended.add(number)
            if end not in ENDS:
                self.problems.append(f"request {number} {case.request} {case.params}: {end}")

    def _end_of(self, number: int | None, case: Case, error: PllavaError) -> str:
        if number in self.aborted and "was aborted" in str(error):
            return "aborted"
        if case.error is not None and isinstance(error, case.error):
            return "failed by name"
        if self.num_killed and case.has_media and "killed (SIGKILL)" in str(error):
            return "lost with a killed process"
        return f"failed with {error!r}"

    def check_unique_answers(self) -> None:
        """Ask some requests of `unique_case` again, alone."""
        chosen = random.Random(self.seed).sample(sorted(self.unique_answers), min(40, len(self.unique_answers)))
        with LLM(EXAMPLES / "tiny_pllava", **MODEL, max_batch_size=1) as alone:
            for number in chosen:
                case = unique_case(number)
                answer = answer_of(alone.generate(case.request, case.params)[0])
                if answer != self.unique_answers[number]:
                    self.problems.append(f"request {number}: {self.unique_answers[number]} is not {answer}")

    def _check_idle(self) -> None:
        """No request, block or video may be held after a round. An aborted request may still be read for a moment."""
        deadline = time.monotonic() + PATIENCE
        while self.llm.engine.stats().reading and time.monotonic() < deadline:
            time.sleep(0.01)
        core = self.llm.engine.call(lambda core: core).result(PATIENCE)
        stats = self.llm.engine.stats()
        held = [entry for entry in core.encoder_cache._entries.values() if entry.ref_count]
        if self.llm.engine.has_work or core.has_work or stats.kv_blocks_used or stats.reading or held:
            self.problems.append(f"after a round: {stats}, {len(held)} videos held")


def _outcome(stream: RequestStream) -> RequestOutput | PllavaError:
    try:
        return stream.result(PATIENCE)
    except PllavaError as error:
        return error


# Measuring


def usage(requests: int) -> Usage:
    """The present usage, after memory that nobody uses was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return usage_of(os.getpid(), requests)


def soak(requests: int, rounds: int, seed: int = 0, kill_seconds: float = 2.0) -> Report:
    """Ask `requests` requests in `rounds` rounds. A process that reads media is killed about every `kill_seconds`."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        cases = known_cases(Path(folder))
        with LLM(EXAMPLES / "tiny_pllava", **MODEL, **SMALL) as llm:
            run = Soak(llm, cases, seed)
            for number in range(rounds):
                first = requests * number // rounds
                last = requests * (number + 1) // rounds
                run.run_round(iter(range(first, last)), kill_seconds)
                measured.append(usage(last))
                print(measured[-1], dict(run.counts), f"{len(run.problems)} problems", file=sys.stderr)
            run.counts["preemptions"] = llm.engine.stats().core.preemptions
            run.counts["killed processes"] = run.num_killed
        run.check_unique_answers()
        if len(run.ended) != requests:
            run.problems.append(f"{requests - len(run.ended)} requests have no end")
    return Report(measured, run.counts, run.problems + growth(measured))


if __name__ == "__main__":
    sys.exit(run_soak(soak, __doc__ or ""))
