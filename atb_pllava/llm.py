"""The Python interface: load a checkpoint once, then ask about videos."""

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atb_pllava.config import DTYPES, EngineConfig, PreprocessorConfig, check_choice
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.engine.block_manager import plan_blocks
from atb_pllava.engine.core import Engine
from atb_pllava.engine.memory_estimate import kv_cache_tokens
from atb_pllava.engine.request import Request, RequestOutput, SamplingParams
from atb_pllava.errors import BackendError, ConfigError, PllavaError, RequestError, counted
from atb_pllava.executor.executor import Executor
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.executor.worker import Rendezvous, send_worker_options, share_threads
from atb_pllava.loader.model_loader import ModelOptions, fill_model, plan_model
from atb_pllava.model.costs import Costs
from atb_pllava.model.pllava import Pllava
from atb_pllava.multimodal.frame_cache import FrameCache
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.processor import Media, VideoProcessor
from atb_pllava.ops import free_memory
from atb_pllava.prompt.chat_template import choose_conversation, render
from atb_pllava.prompt.placeholders import expand_placeholders
from atb_pllava.prompt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_READ_AHEAD = 2  # requests whose media are read while others are in work
_MEDIA_KEYS = ("video", "image", "frames")
_REQUEST_KEYS = ("prompt", "question", *_MEDIA_KEYS, "frame_indices", "history", "answer_prefix", "id")
_SAMPLING = tuple(field.name for field in fields(SamplingParams))


class LLM:
    """PLLaVA on one device or split over several. Not thread-safe: one thread loads and asks.

    `chat` asks one question, `stream` does too and yields the answer while it is written, `generate` answers a batch,
    `generate_iter` does too and yields each answer when it is finished. How tokens are chosen is a SamplingParams, or
    its fields as keywords: `llm.chat(video, question, max_tokens=64, temperature=0.2)`.

    model_path is a checkpoint directory in any of the published layouts; weight_dir one with LoRA tensors (and
    possibly more) on top of it. lora_alpha scales them by lora_alpha / rank; None takes what PEFT's
    adapter_config.json beside them says, else 4. A value that contradicts that file is an error unless
    ignore_adapter_config. num_frames and pooling_shape default to the checkpoint's. frame_sampler, resize and
    conversation choose among the published pipelines; system replaces the conversation's system text.
    load_format "random" or "random_w8a16" makes up the weights, and reads none: for benchmarks. world_size splits the
    model over that many processes, which meet at master_port (None: a free one) or were started by torchrun (workers).
    All other options are fields of EngineConfig.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        weight_dir: str | os.PathLike[str] | None = None,
        lora_alpha: float | None = None,
        num_frames: int | None = None,
        pooling_shape: Sequence[int] | str | None = None,
        dtype: str = "auto",
        backend: str = "auto",
        *,
        frame_sampler: str = "demo",
        resize: str = "clip",
        conversation: str | None = None,
        system: str | None = None,
        video_caption: bool = False,
        limits: MediaLimits | None = None,
        load_format: str = "safetensors",
        kernels: str = "auto",
        compiler: str | None = None,
        kernel_dir: str | None = None,
        ignore_adapter_config: bool = False,
        world_size: int = 1,
        master_port: int | None = None,
        workers: Rendezvous | None = None,
        **engine: Any,
    ) -> None:
        unknown = sorted(set(engine) - set(EngineConfig.__dataclass_fields__))
        if limits is not None and not isinstance(limits, MediaLimits):
            raise ConfigError(f"limits is a {type(limits).__name__}; it must be a MediaLimits")
        if unknown:
            raise TypeError(f"LLM() got unexpected arguments {unknown}; {', '.join(EngineConfig.__dataclass_fields__)}")
        engine_config = EngineConfig(**engine)
        check_choice("dtype", dtype, DTYPES)
        options = ModelOptions(
            model_path, weight_dir, lora_alpha, num_frames, pooling_shape, dtype, backend, load_format,
            kernels, compiler, kernel_dir, ignore_adapter_config)  # fmt: skip
        self.options, self.config = options, options.config()
        self.tokenizer = Tokenizer.from_dir(model_path, self.config.image_token_index)
        self.conversation = choose_conversation(
            conversation, chatml=self.tokenizer.is_chatml, system=system, video_caption=video_caption
        )
        self._turn_end = self.tokenizer.token_id(self.conversation.assistant_end.strip())
        if self._turn_end is None:
            raise ConfigError(
                f"conversation {conversation!r} ends turns with {self.conversation.assistant_end.strip()}, which is no "
                f"token of {model_path}: the _llavanext conversations are for 34B"
            )
        preprocessor = PreprocessorConfig.from_dir(model_path, self.config.vision.image_size)
        frames = FrameCache(engine_config.video_cache_bytes) if engine_config.video_cache_bytes else None
        self.processor = VideoProcessor(
            self.config.num_frames, preprocessor, frame_sampler, resize, limits or MediaLimits(), frames
        )
        self._load(options, engine_config, world_size, master_port, workers)

    def _load(
        self, options: ModelOptions, config: EngineConfig, size: int, port: int | None, workers: Rendezvous | None
    ) -> None:
        """Load the model on this rank and, with a size above 1, on all others, started here unless they are there."""
        parallel = workers.parallel if workers else TensorParallel(0, size)
        model, plan = plan_model(options, parallel)
        if config.kv_cache_dtype == "int8" and model.ops.name != "cpu":
            raise BackendError(f"kv_cache_dtype 'int8' works on the cpu backend only, not on {model.ops.name}")
        self.weights = plan
        self._finalizer: weakref.finalize[..., LLM] | None = None
        if parallel.size == 1:
            fill_model(model, plan, pack=True)
            blocks = self._plan_blocks(model, config)
            runner = ModelRunner(model, blocks, config.block_size, config.kv_cache_dtype, config.decode_graphs)
            self._engine = Engine(Executor(runner, parallel), config)
            return
        self._workers = workers = workers or Rendezvous.start(size, options, port)
        restore_threads = share_threads(parallel.size)
        try:
            fill_model(model, plan, workers.heartbeat, pack=True)
            workers.barrier(model, f"{plan.fingerprint()} {plan.lora_scale} {options.described()}")
            blocks = self._plan_blocks(model, config)
            choices = blocks, config.block_size, config.kv_cache_dtype, config.decode_graphs
            send_worker_options(parallel, *choices)
            runner = ModelRunner(model, *choices)
        except BaseException:
            workers.kill()
            restore_threads()
            raise
        text = self.config.text
        logger.debug(
            "%d ranks: a token costs each of them %d all-reduces of %d values, and a gather of %d logits",
            parallel.size, 2 * text.num_hidden_layers + 1, text.hidden_size, text.vocab_size)  # fmt: skip
        executor = Executor(runner, parallel, lambda: _stop_all(workers))
        self._engine = Engine(executor, config)
        self._finalizer = weakref.finalize(self, _close, os.getpid(), executor, workers, restore_threads)

    @property
    def engine(self) -> Engine:
        """The step loop, for those who drive it themselves."""
        return self._engine

    @property
    def model(self) -> Pllava:
        """The model in this process: all of it, or rank 0's part."""
        return self._engine.executor.runner.model

    def close(self) -> None:
        """Stop the other ranks, if there are any, and free their memory; the model is of no use afterwards."""
        if self._finalizer is not None:
            self._finalizer()

    def __repr__(self) -> str:
        """Which checkpoint, in what dtype, on which device."""
        model = self.model
        on_top = "" if self.options.weight_dir is None else f", weight_dir={self.options.weight_dir!r}"
        ranks = "" if model.parallel.size == 1 else f", world_size={model.parallel.size}"
        return (
            f"LLM({self.options.model_path!r}{on_top}, dtype={str(model.dtype).removeprefix('torch.')}, "
            f"backend={model.ops.name}, device={model.ops.device}{ranks}, num_frames={self.config.num_frames})"
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
        """Ask one question in the model's conversation format. media None asks without a video.

        history is earlier (question, answer) turns about the same media; answer_prefix is text the answer starts with.
        An `<image>` in the question is plain text. sampling are fields of SamplingParams, in place of params.
        """
        params = self._params(params, sampling)
        return self.generate([_chat(media, question, history, answer_prefix)], params)[0]

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
        """Like `chat`, but yields the answer piece by piece as it is generated; closing the iterator ends the request.

        Joined, the pieces are the text `chat` returns. A bad request raises here, before the first piece is asked for.
        """
        request = self._request(_chat(media, question, history, answer_prefix), self._params(params, sampling))
        self._engine.check(request)
        return self._stream(request)

    def generate(
        self,
        requests: Iterable[Mapping[str, Any]] | Mapping[str, Any],
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> list[RequestOutput]:
        """Continue prompts, batched; the answers come in the order of the requests.

        A request has "prompt", taken literally, in which `<image>` stands once for each of its media; or "question",
        which is put into the conversation format as `chat` does, with "history" and "answer_prefix" if wanted. Its
        media are "video" or "image" (a path, a file's bytes, or a list of them) or "frames" (uint8
        [frames, height, width, 3] or a list); "frame_indices" (a list, or one for each video) fixes the frames. An
        "id" (text or a whole number) comes back as the answer's request_id, and names the request in progress lines.
        sampling are fields of SamplingParams, in place of params.
        Raises what the first bad request raises, and then returns none of the others; `generate_iter` goes on instead.
        """
        params = self._params(params, sampling)
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
        """Like `generate`, but yields (number of the request, answer or error) as each one ends.

        Requests are taken from the iterable, and their videos decoded, only when there is room for them soon; that
        happens in a thread of its own, while the model works. A bad request is yielded as its error and does not end
        the others. Closing the iterator drops what is under way. on_text is called with (number, text so far) after
        every step, for each request that is being answered.
        """
        return self._generate_iter(requests, self._params(params, sampling), on_text)

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
        reader, progress = ThreadPoolExecutor(1, "read media"), self._engine.progress
        try:
            with progress.logged():
                while more or ahead or numbers:
                    while more and len(ahead) < _READ_AHEAD and self._has_room(len(ahead) + len(numbers)):
                        number, request = next(source, (-1, None))
                        more = number >= 0
                        if more:
                            name = _name_of(request, number)
                            ahead.append((number, name, reader.submit(self._request, request, params, name)))
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
                        progress.stop()  # whoever asks may take their time
                        yield numbers.pop(done), done.error or done.output()
        finally:
            progress.stop()
            reader.shutdown(wait=False, cancel_futures=True)
            for unfinished in numbers:
                self._engine.abort(unfinished)

    def _has_room(self, requests: int) -> bool:
        """Whether one more than so many requests is wanted soon: a batch in work and one that waits."""
        return requests < 2 * self._engine.config.max_batch_size

    def encode_video(self, media: Media, frame_indices: Sequence[int] | None = None) -> Tensor:
        """Video tokens [t * h * w, hidden] of one video in the model's dtype: what stands for `<image>` in a prompt."""
        return self._engine.encode_video(self.processor.prepare([media], [frame_indices])[0])

    def prepare(self, request: Mapping[str, Any], params: SamplingParams | None = None, **sampling: Any) -> Request:
        """A request as `generate` takes it, checked and with its media decoded: ready for `engine.add`."""
        return self._request(request, self._params(params, sampling))

    def _stream(self, request: Request) -> Iterator[str]:
        self._engine.add(request)  # here and not in `stream`: an iterator nobody starts costs nothing
        sent = 0
        try:
            with self._engine.progress.logged():
                while True:
                    finished, text = request.is_finished, request.detokenizer.text
                    if len(text) > sent:
                        self._engine.progress.stop()
                        yield text[sent:]
                        sent = len(text)
                    elif not finished:
                        self._engine.step()
                    if finished:
                        request.output()  # raises what made it fail
                        return
        finally:
            self._engine.progress.stop()
            self._engine.abort(request)

    def _params(self, params: SamplingParams | None, fields: Mapping[str, Any] | None = None) -> SamplingParams:
        """`params`, or one with these fields; by default an answer is as long as the engine allows, at most 200."""
        fields = fields or {}
        unknown = sorted(set(fields) - set(_SAMPLING))
        if unknown:
            raise TypeError(f"unexpected arguments {unknown}; fields of SamplingParams are {', '.join(_SAMPLING)}")
        if params is None:
            longest = self._engine.config.max_output_length
            usual = min(SamplingParams.max_tokens, longest or SamplingParams.max_tokens)
            return SamplingParams(**{"max_tokens": usual, **fields})
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params is a {type(params).__name__}; it must be a SamplingParams")
        if fields:
            raise RequestError(f"params is given and {', '.join(sorted(fields))} too; put all into one of them")
        return params

    def _request(self, request: object, params: SamplingParams, name: str = "the request") -> Request:
        """Check a request, decode its media and expand its prompt; ready for the engine. `name`: for progress lines."""
        arrival = time.perf_counter()
        request = _checked(request)
        media, indices = _media_of(request)
        token_ids, stops = self._prompt_of(request, len(media))
        expanded, spans = expand_placeholders(
            token_ids, self.config.image_token_index, len(media), self.config.num_video_tokens
        )
        if not expanded:
            raise RequestError("the prompt is empty; there is nothing to continue")
        began = time.perf_counter()
        videos = self.processor.prepare(media, indices) if media else []
        decode_seconds = time.perf_counter() - began
        longest = self.config.text.max_position_embeddings
        if len(expanded) + params.max_tokens > longest:
            logger.warning(
                "%d prompt tokens and up to %d more exceed the %d positions the model was trained on; "
                "the quality beyond them is untested", len(expanded), params.max_tokens, longest)  # fmt: skip
        return Request.create(
            token_ids, expanded, spans, videos, params, stops, self.tokenizer, arrival, decode_seconds,
            request.get("id"), name)  # fmt: skip

    def _prompt_of(self, request: Mapping[str, Any], videos: int) -> tuple[list[int], list[int]]:
        """Token ids with one image token for each video, and the tokens that end the answer."""
        eos = list(self.config.eos_token_ids)
        if "prompt" in request:
            return self.tokenizer.encode(_text(request, "prompt")), eos
        pieces = render(
            self.conversation,
            _text(request, "question"),
            videos=videos,
            history=request.get("history") or (),
            answer_prefix=request.get("answer_prefix"),
        )
        assert self._turn_end is not None  # checked at load
        return self.tokenizer.encode_pieces(pieces), [*eos, self._turn_end]

    def _plan_blocks(self, model: Pllava, config: EngineConfig) -> int:
        """KV cache blocks: room for a full batch of the longest requests, within the memory there is."""
        element, int8 = torch.empty(0, dtype=model.dtype).element_size(), config.kv_cache_dtype == "int8"
        per_token = Costs(self.config, element, parallel=model.parallel, int8_kv=int8).kv_bytes_per_token
        wanted = kv_cache_tokens(self.config, config)
        free = free_memory(model.ops) // (model.parallel.size if model.ops.name == "cpu" else 1)
        blocks = plan_blocks(wanted, config.block_size, per_token, config.kv_cache_bytes, free)
        logger.debug(
            "KV cache: %d blocks of %d tokens, %.2f GB", blocks, config.block_size,
            blocks * config.block_size * per_token / 1e9)  # fmt: skip
        return blocks


def _stop_all(workers: Rendezvous) -> PllavaError | None:
    """A rank was lost: end the others too, and say which it was."""
    time.sleep(0.2)  # a process that has just died needs a moment to be seen as dead
    reason = workers.failure_reason()
    workers.kill()
    return None if reason is None else BackendError(f"{reason}; all ranks were stopped")


def _close(owner: int, executor: Executor, workers: Rendezvous, restore_threads: Callable[[], None]) -> None:
    if os.getpid() != owner:
        return  # a forked child: the ranks are not its own
    try:
        executor.stop()
    except RuntimeError:
        workers.kill()
    workers.stop()
    restore_threads()


def _name_of(request: object, number: int) -> str:
    """What progress lines call request `number`, counted from 0: its id, or that number counted from 1."""
    given = request.get("id") if isinstance(request, Mapping) else None
    return f"request {number + 1}" if given is None else str(given)


def _chat(
    media: Media | Sequence[Media] | None, question: str, history: Sequence[tuple[str, str]], answer_prefix: str | None
) -> dict[str, Any]:
    request: dict[str, Any] = {"question": question, "history": history, "answer_prefix": answer_prefix}
    return request if media is None else {**request, "video": media}


def _checked(request: object) -> Mapping[str, Any]:
    """A request whose texts and keys are as they must be; its media are checked when they are read."""
    if not isinstance(request, Mapping):
        raise RequestError(
            f"a request is a {type(request).__name__}; it must be a dict with {', '.join(_REQUEST_KEYS)}"
        )
    unknown = sorted(map(str, set(request) - set(_REQUEST_KEYS)))
    if unknown:
        raise RequestError(f"a request has unknown keys {unknown}; allowed are {', '.join(_REQUEST_KEYS)}")
    if "prompt" in request and not request.keys().isdisjoint({"question", "history", "answer_prefix"}):
        raise RequestError("a request with a literal 'prompt' takes no 'question', 'history' or 'answer_prefix'")
    text = _text(request, "prompt" if "prompt" in request else "question")
    if "prompt" not in request and not text.strip():
        raise RequestError(f"the question is {text!r}, an empty text; ask something")
    if not isinstance(request.get("id"), str | int | None) or isinstance(request.get("id"), bool):
        raise RequestError(f"id is a {type(request['id']).__name__}; it must be a text or a whole number")
    if request.get("answer_prefix") is not None:
        _text(request, "answer_prefix")
    history = request.get("history") or ()
    turns = history if isinstance(history, list | tuple) else [history]
    if not all(isinstance(turn, list | tuple) and [type(text) for text in turn] == [str, str] for turn in turns):
        raise RequestError(f"history is {history!r}; it must be a list of (question, answer) pairs of text")
    return request


def _text(request: Mapping[str, Any], key: str) -> str:
    text = request.get(key)
    if not isinstance(text, str):
        raise RequestError(f"a request needs a text under 'prompt' or 'question'; {key!r} is {type(text).__name__}")
    return text


def _media_of(request: Mapping[str, Any]) -> tuple[list[Media], list[list[int] | None]]:
    """The media of a request as a list, and the frames wanted of each (None: sampled)."""
    given = [key for key in _MEDIA_KEYS if request.get(key) is not None]
    if len(given) > 1:
        raise RequestError(f"a request has {' and '.join(given)}; name its media under one key")
    value = request[given[0]] if given else ()
    media: list[Media] = list(value) if isinstance(value, list | tuple) else [value]
    if given and not media:
        raise RequestError(f"{given[0]} is an empty list; leave it out to ask without media")
    if given == ["frames"] and not all(isinstance(item, np.ndarray) for item in media):
        raise RequestError("frames must be uint8 arrays [frames, height, width, 3]; files go under 'video' or 'image'")
    indices = request.get("frame_indices")
    if indices is None:
        return media, [None] * len(media)
    wanted = [_whole_numbers(part) for part in (indices if _is_nested(indices) else [indices])]
    if len(wanted) != len(media):
        raise RequestError(f"frame_indices is given for {counted(len(wanted), 'video')}, the request has {len(media)}")
    return media, list(wanted)


def _whole_numbers(values: Any) -> list[int]:
    """Frame numbers as plain integers, from any sequence of whole numbers."""
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        return [index(value) for value in values]
    except TypeError:
        raise RequestError(f"frame_indices is {values!r}; it must be a list of whole numbers for each video") from None


def _is_nested(indices: Any) -> bool:
    return isinstance(indices, list | tuple) and len(indices) > 0 and isinstance(indices[0], list | tuple | np.ndarray)
