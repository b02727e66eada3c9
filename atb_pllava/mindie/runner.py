"""MindIE's PA runner with PLLaVA: answers about videos, a table of speeds, or the answers of an accuracy run.

`python -m atb_pllava mindie run|performance|precision` (and `run_pa.sh --engine mindie`) check the options, set
MindIE's environment variables and start this file as a script, once for each device. The script needs MindIE and an
NPU. Rank 0 prints.

Differences from MindIE's `multimodal_runner.py`, `llava.py` and `run_pa.sh` (Ascend/MindIE-LLM 8b4871a):
 1. MindIE decides images or videos by the ending of the first file. This file takes mixed folders (`list_media`).
 2. MindIE warms up with requests that lack a model's own fields (frames). This file makes all requests the same way.
 3. MindIE fills the last batch with repeats of the last file. Here the last batch is shorter.
 4. In MindIE a prompt longer than --max_input_length overfills the cache. Here it is refused and the others go on.
 5. MindIE reads an earlier run's benchmark.csv as this run's. Here the file is removed before each batch.
 6. MindIE's times leave out media and vision tower, and its throughput divides one batch by the time of all batches.
    Here first_token_time includes both, and a column of its own has them.
 7. MindIE adds up token counts over a batch, keeps special tokens in answers, and loads a processor that may run a
    checkpoint's code. Here each answer is counted and decoded alone, and no code of a checkpoint runs.
 8. MindIE merges an old predict_result.json into the new one. Here the file has this run's answers only.
 9. MindIE fixes MASTER_PORT and overwrites the visible devices. `mindie/launch.py` takes a free port and overwrites
    nothing.
"""
# ruff: noqa: E402

import os
import sys

if __name__ == "__main__":
    # Python puts a script's folder first on sys.path. The modules beside this file (doctor, install, locate, ...) would
    # then hide top-level modules of MindIE that have the same names.
    _folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != _folder]

import argparse
import csv
import io
import itertools
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the import of torch would print a page of traceback


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Started by `python -m atb_pllava mindie`; see its --help.")
    parser.add_argument("--options", required=True, help="all options as a JSON object")
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):  # works without MindIE
    _parser().parse_args()

import torch

try:
    from atb_llm.utils.cpu_binding import NpuHbmInfo
    from atb_llm.utils.env import ENV
    from examples.multimodal_runner import MultimodalPARunner
    from examples.server.cache import CacheConfig, CacheManager
    from examples.server.generate import generate_req
    from examples.server.request import MultiModalReqParams, request_from_multimodalinputs
except ImportError as missing:
    print(f"error: MindIE's modules cannot be imported ({missing}); source its set_env.sh, see doctor", file=sys.stderr)
    sys.exit(2)

from atb_pllava.errors import ConfigError, PllavaError, RequestError, counted
from atb_pllava.files import write_json, write_text
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.multimodal.media import list_media
from atb_pllava.prompt.chat_template import choose_conversation, render
from atb_pllava.prompt.tokenizer import IMAGE_TOKEN, Tokenizer

BLOCK_SIZE = 128
# The columns of `bench.host_csv.LLAVA_COLUMNS` and one more. That module is not imported: it imports the native engine,
# whose packages MindIE's image may lack.
PERFORMANCE_COLUMNS = (
    "batch",
    "input_len",
    "output_len",
    "embedding_len",
    "first_token_time(ms)",
    "non_first_token_time(ms)",
    "ResponseTime(ms)",
    "E2E Throughput Average(Tokens/s)",
    "media_and_vision_time(ms)",
)


@dataclass
class PllavaReqParams(MultiModalReqParams):  # type: ignore[misc]
    """MindIE's request with the number of frames of each video. None is the checkpoint's number."""

    frames: int | None = None


@dataclass(frozen=True)
class Job:
    """One question about one file."""

    media: str
    question: str
    prompt: str


@dataclass(frozen=True)
class Answer:
    """The answer of a job and its token ids, or the error that ended the job."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    error: str | None = None


class PllavaRunner(MultimodalPARunner):  # type: ignore[misc]
    """MindIE's runner with PLLaVA's requests. Model, KV cache and generation loop are MindIE's."""

    def __init__(self, frames: int | None, **options: Any) -> None:
        self.frames = frames
        super().__init__(**options)
        config = read_config(self.model_path)
        self.text = Tokenizer.from_dir(self.model_path, config.image_token_index)

    def init_processor(self) -> None:
        """Overridden because MindIE would load a processor. The plugin makes pixels itself and needs none."""
        self.processor = self.tokenizer

    def request(self, job: Job, number: int, batch_size: int) -> Any:
        """MindIE's request, with media read, encoded and merged into the prompt's embeddings.

        Raises RequestError when the prompt is longer than max_input_length.
        """
        params = PllavaReqParams(
            text=job.prompt,
            image=None,
            video=job.media,
            audio=None,
            max_out_length=self.max_output_length,
            block_size=self.block_size,
            req_idx=number,
            batch_size=batch_size,
            frames=self.frames,
        )
        request = request_from_multimodalinputs(self.processor, self.model, params)
        if request.input_length > self.max_input_length:
            raise RequestError(
                f"{job.media}: the prompt is {counted(request.input_length, 'token')}, the limit is "
                f"{self.max_input_length}: raise MAX_INPUT_LENGTH or take fewer frames"
            )
        return request

    def make_cache(self) -> None:
        """Make one KV cache for the largest batch of longest requests. A second cache would not free the first."""
        longest = self.max_input_length + self.max_output_length
        blocks = math.ceil(longest / self.block_size) * self.max_batch_size
        self.max_prefill_tokens = self.max_batch_size * longest
        self.cache_manager = CacheManager(CacheConfig(blocks, self.block_size), self.model_config)

    def warm_up(self, jobs: Sequence[Job]) -> None:
        """Generate two tokens for each job, so that graphs are built and memory reaches its peak before measuring."""
        self.model.postprocessor.max_new_tokens = 2
        requests = [request for request, _ in self._requests(jobs) if request is not None]
        if requests:
            generate_req(requests, self.model, len(requests), self.max_prefill_tokens, self.cache_manager)
        used = NpuHbmInfo.get_hbm_usage(self.local_rank, self.world_size, self.model.soc_info.need_nz)
        tell(f"warmed up with {counted(len(requests), 'request')}, {used:.0%} of the card's memory in use")

    def answer(self, jobs: Sequence[Job]) -> tuple[list[Answer], float]:
        """The answers in the order of the jobs, and the seconds that reading media and the vision tower took."""
        began = time.perf_counter()
        prepared = list(self._requests(jobs))
        requests = [request for request, _ in prepared if request is not None]
        torch.npu.synchronize()  # type: ignore[attr-defined]  # torch_npu adds it
        prepare_seconds = time.perf_counter() - began
        self.model.postprocessor.max_new_tokens = self.max_output_length
        if requests:
            generate_req(requests, self.model, len(requests), self.max_prefill_tokens, self.cache_manager)
        torch.npu.synchronize()  # type: ignore[attr-defined]  # torch_npu adds it
        return [self._answer(request, error) for request, error in prepared], prepare_seconds

    def _requests(self, jobs: Sequence[Job]) -> Iterator[tuple[Any, str | None]]:
        for number, job in enumerate(jobs):
            try:
                yield self.request(job, number, len(jobs)), None
            except PllavaError as error:
                yield None, str(error)

    def _answer(self, request: Any, error: str | None) -> Answer:
        if request is None:
            return Answer(error=error)
        ids = tuple(int(token) for token in request.out_token_list)
        return Answer(self.text.decode(ids).strip(), ids)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the mode that the options name. The exit status: 0, or 2 when a job failed."""
    arguments = _parse(argv)
    media = list_media(*arguments.media)
    runner = PllavaRunner(
        arguments.num_frames,
        rank=ENV.rank,
        local_rank=ENV.local_rank,
        world_size=ENV.world_size,
        model_path=arguments.model_path,
        max_batch_size=max(arguments.batch_sizes),
        max_input_length=arguments.max_input_length,
        max_output_length=arguments.max_output_length,
        max_prefill_tokens=-1,
        block_size=BLOCK_SIZE,
    )
    runner.make_cache()
    jobs = [_job(runner, item, question, arguments) for item in media for question in arguments.prompt]
    if arguments.mode == "performance":
        return measure(runner, jobs, arguments.batch_sizes, Path(arguments.csv))
    return ask(runner, jobs, arguments.batch_sizes[0], arguments.output_json if arguments.mode == "precision" else None)


def ask(runner: PllavaRunner, jobs: Sequence[Job], batch_size: int, output_json: str | None) -> int:
    """Print every answer, and write `output_json` in MindIE's form: media path to text, sorted by path.

    The exit status: 0, or 2 when a job failed. A failed job has no entry in `output_json`.
    """
    runner.warm_up([jobs[0]] * min(batch_size, len(jobs)))
    done: list[Answer] = []
    began = time.perf_counter()
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        answers, _ = runner.answer(batch)
        done += answers
        for number, (job, answer) in enumerate(zip(batch, answers, strict=True), first + 1):
            say(f"[{number}/{len(jobs)}] {job.media}\n  question: {job.question}")
            tokens = f"\n  {counted(len(answer.token_ids), 'token')}"
            say(f"  error: {answer.error}" if answer.error else f"  answer:   {answer.text}{tokens}")
    seconds = time.perf_counter() - began
    total = sum(len(answer.token_ids) for answer in done)
    failed = sum(answer.error is not None for answer in done)
    missing = f", {failed} failed" if failed else ""
    say(
        f"{counted(len(done) - failed, 'answer')}{missing}, {counted(total, 'token')} in {seconds:.1f} s: "
        f"{total / seconds:.1f} tokens/s"
    )
    if output_json is not None and ENV.rank == 0:
        pairs = zip(jobs, done, strict=True)
        write_json(output_json, dict(sorted((job.media, answer.text) for job, answer in pairs if not answer.error)))
        say(f"wrote {output_json}")
    return 2 if failed else 0


def measure(runner: PllavaRunner, jobs: Sequence[Job], batch_sizes: Sequence[int], file: Path) -> int:
    """Write one row for each batch size. Every request of a batch has exactly max_output_length tokens of output.

    The jobs are repeated in turn until the batch is full. Raises RequestError when a job fails.
    """
    runner.model.postprocessor.eos_token_id = []
    rows: list[dict[str, Any]] = []
    for number, batch_size in enumerate(batch_sizes, 1):
        tell(f"batch size {batch_size}, {number} of {len(batch_sizes)}")
        batch = list(itertools.islice(itertools.cycle(jobs), batch_size))
        runner.warm_up(batch)
        if ENV.rank == 0:
            Path(ENV.benchmark_filepath).unlink(missing_ok=True)
        began = time.perf_counter()
        answers, prepare_seconds = runner.answer(batch)
        seconds = time.perf_counter() - began
        broken = next((answer.error for answer in answers if answer.error), None)
        if broken is not None:
            raise RequestError(broken)
        if ENV.rank == 0:
            rows.append(_row(runner, batch, answers, seconds, prepare_seconds))
            _write_rows(file, rows)
            say(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
    say(f"wrote {file}; the last batch's details are in {ENV.benchmark_filepath}")
    return 0


def _row(
    runner: PllavaRunner, batch: Sequence[Job], answers: Sequence[Answer], seconds: float, prepare_seconds: float
) -> dict[str, Any]:
    """A row of PERFORMANCE_COLUMNS. Prefill and decode times are from the benchmark.csv that MindIE wrote.

    first_token_time is the time to read and encode all media of the batch, plus MindIE's prefill time.
    """
    with open(ENV.benchmark_filepath, newline="", encoding="utf-8") as stream:
        (host,) = csv.DictReader(stream)
    tokens = sum(len(answer.token_ids) for answer in answers)
    prepare_ms = prepare_seconds * 1000
    values = (
        len(batch),
        len(runner.text.encode(batch[0].prompt)),
        len(answers[0].token_ids),
        int(host["input_seq_len"]),
        round(prepare_ms + float(host["prefill_time(ms)"]), 2),
        float(host["decoder_token_time(ms)"]),
        round(seconds * 1000, 2),
        round(tokens / seconds, 2),
        round(prepare_ms, 2),
    )
    return dict(zip(PERFORMANCE_COLUMNS, values, strict=True))


def _write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, PERFORMANCE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, table.getvalue())


def _job(runner: PllavaRunner, media: str, question: str, arguments: argparse.Namespace) -> Job:
    if IMAGE_TOKEN in question:
        raise ConfigError(f"--prompt {question!r} has {IMAGE_TOKEN}, which stands for the video in MindIE's prompts")
    conversation = choose_conversation(arguments.conversation, chatml=runner.text.is_chatml)
    return Job(media, question, "".join(piece.text for piece in render(conversation, question)))


def say(text: str) -> None:
    """Print a result, on rank 0 only."""
    if ENV.rank == 0:
        print(text, flush=True)


def tell(text: str) -> None:
    """Print progress to stderr, on rank 0 only."""
    if ENV.rank == 0:
        print(text, file=sys.stderr, flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    return argparse.Namespace(**json.loads(_parser().parse_args(argv).options))


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # answers and file names may not fit the terminal's encoding
    try:
        status = main()
    except PllavaError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
