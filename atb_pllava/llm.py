"""The offline Python interface: load a checkpoint once, then ask about videos."""

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.engine.arguments import EngineArgs
from atb_pllava.engine.core import Engine
from atb_pllava.engine.kv_cache_plan import kv_cache_blocks
from atb_pllava.engine.outputs import RequestOutput
from atb_pllava.engine.request import Request
from atb_pllava.engine.request_parser import RequestParser, request_name
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import PllavaError
from atb_pllava.executor.launcher import Launcher
from atb_pllava.loader.checkpoint_config import read_preprocessor_config
from atb_pllava.model.pllava import Pllava
from atb_pllava.multimodal.frame_cache import FrameCache
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media_pool import MediaPool
from atb_pllava.multimodal.processor import Media, VideoProcessor
from atb_pllava.ops.interface import Feature
from atb_pllava.prompt.tokenizer import Tokenizer

_READ_AHEAD = 2  # requests whose media are read while the engine works on others


class LLM:
    """PLLaVA on one device or split over several. Not thread-safe: the thread that loads it also asks.

    `chat` asks one question. `stream` asks one and yields the answer piece by piece. `generate` answers a batch.
    `generate_iter` answers a batch and yields each answer when it ends. A SamplingParams, or its fields as keywords,
    say how tokens are chosen: `llm.chat(video, question, max_tokens=64, temperature=0.2)`.

    `options` are fields of ModelOptions, MultimodalOptions, PromptOptions, EngineConfig and ParallelOptions.
    An unknown option raises TypeError. `LLM(args)` takes an EngineArgs in place of all options. `rendezvous` is the
    link to ranks that torchrun started.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str] | EngineArgs,
        weight_dir: str | os.PathLike[str] | None = None,
        *,
        rendezvous: Rendezvous | None = None,
        **options: Any,
    ) -> None:
        args = _engine_args(model_path, weight_dir, options)
        self.args = args
        self.options = args.model
        self.config = args.model.config()
        self.tokenizer = Tokenizer.from_dir(args.model.model_path, self.config.image_token_index)
        self.conversation = args.prompt.choose(self.tokenizer.is_chatml)
        self.media_pool = None if args.multimodal.media_workers == 0 else MediaPool(args.multimodal.media_workers)
        self.processor = self._make_processor()
        self.request_parser = RequestParser(
            self.config, self.tokenizer, self.conversation, self.processor, args.engine.max_output_length
        )
        self._launcher = Launcher(args.model, args.parallel, rendezvous)
        self.weights = self._launcher.plan
        if args.engine.kv_cache_dtype == "int8":
            self._launcher.model.ops.require(Feature.INT8_KV_CACHE)
        executor = self._launcher.launch(args.engine, lambda model: kv_cache_blocks(model, args.engine))
        self._engine = Engine(executor, args.engine)
        self._finalizer = weakref.finalize(self, _close, self._launcher, self.media_pool)

    def _make_processor(self) -> VideoProcessor:
        """The processor of media for this checkpoint, with a frame cache of as many bytes as the encoder cache."""
        choices = self.args.multimodal
        cache_bytes = self.args.engine.video_cache_bytes
        return VideoProcessor(
            self.config.num_frames,
            read_preprocessor_config(self.options.model_path, self.config.vision.image_size),
            choices.frame_sampler,
            choices.resize,
            choices.limits or MediaLimits(),
            FrameCache(cache_bytes) if cache_bytes else None,
            self.media_pool,
        )

    @property
    def engine(self) -> Engine:
        """The step loop, for callers that drive it themselves."""
        return self._engine

    @property
    def model(self) -> Pllava:
        """The model in this process: all of it, or rank 0's part."""
        return self._launcher.model

    def close(self) -> None:
        """Stop the media workers and the other ranks, and free their memory. The model cannot be used afterwards."""
        self._finalizer()

    def __repr__(self) -> str:
        """Which checkpoint, in what dtype, on which device."""
        model = self.model
        on_top = "" if self.options.weight_dir is None else f", weight_dir={self.options.weight_dir!r}"
        ranks = "" if model.parallel.size == 1 else f", world_size={model.parallel.size}"
        return (
            f"LLM({self.options.model_path!r}{on_top}, dtype={str(model.dtype).removeprefix('torch.')}, "
            f"backend={model.ops}, device={model.ops.device}{ranks}, num_frames={self.config.num_frames})"
        )

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def chat(
        self,
        media: Media | Sequence[Media] | None,
        question: str,
        params: SamplingParams | None = None,
        *,
        history: Sequence[tuple[str, str]] = (),
        answer_prefix: str | None = None,
        **sampling: Any,
    ) -> RequestOutput:
        """Ask one question in the model's conversation format. `media` None asks without a video.

        `history` is earlier (question, answer) turns about the same media. The answer starts with `answer_prefix`.
        An `<image>` in the question is plain text. `sampling` are fields of SamplingParams, in place of `params`.
        """
        params = self.request_parser.sampling_params(params, sampling)
        return self.generate([_chat_request(media, question, history, answer_prefix)], params)[0]

    def stream(
        self,
        media: Media | Sequence[Media] | None,
        question: str,
        params: SamplingParams | None = None,
        *,
        history: Sequence[tuple[str, str]] = (),
        answer_prefix: str | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Like `chat`, but yields the answer piece by piece while it is generated.

        Joined, the pieces are the text that `chat` returns. A bad request raises here, before the first piece is asked
        for. Closing the iterator ends the request.
        """
        request = self.prepare(_chat_request(media, question, history, answer_prefix), params, **sampling)
        self._engine.check(request)
        return self._stream(request)

    def generate(
        self,
        requests: Iterable[Mapping[str, Any]] | Mapping[str, Any],
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> list[RequestOutput]:
        """Answer a batch of requests. The answers are in the order of the requests.

        A request has a "prompt" or a "question". A prompt is taken literally, and `<image>` in it stands once for each
        of the request's media. A question is put into the conversation format as `chat` does, with "history" and
        "answer_prefix" if they are given. Media are "video" or "image" (a path, a file's bytes, or a list of them) or
        "frames" (uint8 [frames, height, width, 3], or a list). "frame_indices" (a list, or one for each video) names
        the frames. "start_seconds" and "end_seconds" (a number, or a list with one for each video) bound the part of a
        video that frames are sampled from. An "id" (text or a whole number) names the request in progress lines and is
        the answer's request_id.
        `sampling` are fields of SamplingParams, in place of `params`.

        Raises the error of the first bad request, and then returns no answer. `generate_iter` goes on instead.
        """
        params = self.request_parser.sampling_params(params, sampling)
        answers: dict[int, RequestOutput] = {}
        for number, answer in self.generate_iter([requests] if isinstance(requests, Mapping) else requests, params):
            if isinstance(answer, PllavaError):
                raise answer
            answers[number] = answer
        return [answers[number] for number in sorted(answers)]

    def generate_iter(
        self,
        requests: Iterable[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        on_text: Callable[[int, str], None] | None = None,
        **sampling: Any,
    ) -> Iterator[tuple[int, RequestOutput | PllavaError]]:
        """Like `generate`, but yields (number of the request, answer or error) when each request ends.

        A request is taken from the iterable only when the engine has room for it soon. A reader thread decodes the
        media while the model works. A bad request is yielded as its error, and the others go on. Closing the iterator
        drops unfinished requests. `on_text` is called with (number, text so far) after every step, for each request
        that is being answered.
        """
        return self._generate_iter(requests, self.request_parser.sampling_params(params, sampling), on_text)

    def _generate_iter(
        self,
        requests: Iterable[Mapping[str, Any]],
        params: SamplingParams,
        on_text: Callable[[int, str], None] | None,
    ) -> Iterator[tuple[int, RequestOutput | PllavaError]]:
        source = enumerate(requests)
        ahead: deque[tuple[int, str, Future[Request]]] = deque()
        numbers: dict[Request, int] = {}
        more = True
        reader = ThreadPoolExecutor(1, "read media")
        parse = self.request_parser.parse
        progress = self._engine.progress
        try:
            with progress.logged():
                while more or ahead or numbers:
                    while more and len(ahead) < _READ_AHEAD and self._has_room(len(ahead) + len(numbers)):
                        number, request = next(source, (-1, None))
                        more = number >= 0
                        if more:
                            name = request_name(request, number)
                            ahead.append((number, name, reader.submit(parse, request, params, name)))
                    while ahead and (ahead[0][2].done() or not numbers):
                        number, name, reading = ahead.popleft()
                        if not reading.done():
                            progress.start(name, "reading the media")
                        try:
                            ready = reading.result()
                            self._engine.add(ready)
                            numbers[ready] = number
                        except PllavaError as error:
                            progress.stop()
                            yield number, error
                    self._engine.step()
                    if on_text is not None:
                        for running, number in numbers.items():
                            on_text(number, running.detokenizer.text)
                    for done in [request for request in numbers if request.is_finished]:
                        progress.stop()  # the caller may take any time before it asks for the next answer
                        yield numbers.pop(done), done.error or done.output()
        finally:
            progress.stop()
            reader.shutdown(wait=False, cancel_futures=True)
            for unfinished in numbers:
                self._engine.abort(unfinished)

    def _has_room(self, requests: int) -> bool:
        """Whether to read the media of one more request beside `requests` others: one batch runs, one waits."""
        return requests < 2 * self._engine.config.max_batch_size

    def encode_video(self, media: Media, frame_indices: Sequence[int] | None = None) -> Tensor:
        """Embeddings [t * h * w, hidden] of one video in the model's dtype."""
        return self._engine.encode_video(self.processor.prepare([media], [frame_indices])[0])

    def prepare(self, request: Mapping[str, Any], params: SamplingParams | None = None, **sampling: Any) -> Request:
        """Check a request of `generate`, decode its media and tokenize its prompt. `engine.add` takes the result."""
        return self.request_parser.parse(request, self.request_parser.sampling_params(params, sampling))

    def _stream(self, request: Request) -> Iterator[str]:
        self._engine.add(request)  # not in `stream`: an iterator that nobody starts must not hold blocks
        sent = 0
        try:
            with self._engine.progress.logged():
                while True:
                    finished = request.is_finished
                    text = request.detokenizer.text
                    if len(text) > sent:
                        self._engine.progress.stop()
                        yield text[sent:]
                        sent = len(text)
                    elif not finished:
                        self._engine.step()
                    if finished:
                        request.output()  # raises the error of a failed request
                        return
        finally:
            self._engine.progress.stop()
            self._engine.abort(request)


def _close(launcher: Launcher, media_pool: MediaPool | None) -> None:
    if media_pool is not None:
        media_pool.close()
    launcher.close()


def _engine_args(
    model_path: str | os.PathLike[str] | EngineArgs,
    weight_dir: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> EngineArgs:
    """The given EngineArgs, or an EngineArgs made of keywords. Raises TypeError for both together."""
    if not isinstance(model_path, EngineArgs):
        return EngineArgs.from_keywords(model_path, weight_dir=weight_dir, **options)
    given = [*([] if weight_dir is None else ["weight_dir"]), *options]
    if given:
        raise TypeError(f"LLM() got an EngineArgs and {', '.join(given)} too; put all into one of them")
    return model_path


def _chat_request(
    media: Media | Sequence[Media] | None, question: str, history: Sequence[tuple[str, str]], answer_prefix: str | None
) -> dict[str, Any]:
    request: dict[str, Any] = {"question": question, "history": history, "answer_prefix": answer_prefix}
    return request if media is None else {**request, "video": media}
