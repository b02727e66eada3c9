"""The offline Python interface: load a checkpoint once, then ask about videos."""

import os
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.engine.arguments import EngineArgs
from atb_pllava.engine.build import build_engine
from atb_pllava.engine.engine_request import EngineRequest
from atb_pllava.engine.outputs import RequestOutput
from atb_pllava.engine.request_parser import chat_request
from atb_pllava.engine.request_window import RequestWindow, in_order
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.engine.text_stream import stream_text
from atb_pllava.errors import PllavaError
from atb_pllava.multimodal.processor import Media


class LLM:
    """PLLaVA on one device or split over several. Several threads may ask at once.

    A SamplingParams, or its fields as keywords, say how tokens are chosen:
    `llm.chat(video, question, max_tokens=64, temperature=0.2)`.

    `options` are the fields of the dataclasses in EngineArgs. An unknown option raises TypeError. `LLM(args)` takes an
    EngineArgs in place of all options. `rendezvous` is the link to ranks that torchrun started. `engine` is the
    AsyncEngine, for callers that want streams or statistics.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str] | EngineArgs,
        weight_dir: str | os.PathLike[str] | None = None,
        *,
        rendezvous: Rendezvous | None = None,
        **options: Any,
    ) -> None:
        self.args = EngineArgs.of(model_path, weight_dir, options)
        self.engine, launcher = build_engine(self.args, rendezvous)
        self.model = launcher.model  # all of it, or rank 0's part
        self.weights = launcher.plan
        self._description = str(launcher)
        self.request_parser = self.engine.request_parser
        self.config = self.request_parser.config
        self.tokenizer = self.request_parser.tokenizer
        self.conversation = self.request_parser.conversation
        self.processor = self.request_parser.processor
        self._finalizer = weakref.finalize(self, self.engine.close)

    def close(self) -> None:
        """Stop the engine and the other ranks, and free their memory. The model cannot be used afterwards."""
        self._finalizer()

    def __repr__(self) -> str:
        """Which checkpoint, in what dtype, on which device."""
        return f"LLM({self._description}, num_frames={self.config.num_frames})"

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
        return self.generate([chat_request(media, question, history, answer_prefix)], params, **sampling)[0]

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
        request = self.prepare(chat_request(media, question, history, answer_prefix), params, **sampling)
        return stream_text(self.engine, request, owner=self)

    def generate(
        self,
        requests: Iterable[Mapping[str, Any]] | Mapping[str, Any],
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> list[RequestOutput]:
        """Answer a batch of requests. The answers are in the order of the requests.

        A request has a "prompt", a "question" or "messages". `<image>` in a prompt stands once for each medium. A
        question is put into the conversation format as `chat` does, with "history" and "answer_prefix" if they are
        given. Messages are a chat with its media in it: see `prompt/messages.py`. Other media are "video" or "image" (a
        path, bytes, an ImageSequence, a ProcessedVideo, or a list) or "frames" (uint8 [frames, height, width, 3], or a
        list). "frame_indices" (a list, or one for each video) names the frames, "num_frames" says how many.
        "start_seconds" and "end_seconds" bound them. An "id" is in progress lines and is the answer's request_id.

        Raises the error of the first bad request, and then returns no answer. `generate_iter` goes on instead.
        """
        batch = [requests] if isinstance(requests, Mapping) else requests
        return in_order(self.generate_iter(batch, params, **sampling))

    def generate_iter(
        self,
        requests: Iterable[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        on_text: Callable[[int, str], None] | None = None,
        **sampling: Any,
    ) -> Generator[tuple[int, RequestOutput | PllavaError], None, None]:
        """Like `generate`, but yields (number of the request, answer or error) when each request ends.

        A request is taken from the iterable only when the engine has room for it soon. Media are read while the model
        works. A bad request is yielded as its error, and the others go on. Closing the iterator drops unfinished
        requests. `on_text` is called with (number, text so far) after new tokens.
        """
        params = self.request_parser.sampling_params(params, sampling)
        return RequestWindow(self.engine, requests, params, on_text, owner=self).answers()

    def encode_video(self, media: Media, frame_indices: Sequence[int] | None = None) -> Tensor:
        """Embeddings [t * h * w, hidden] of one video in the model's dtype."""
        self.engine.raise_if_dead()
        return self.engine.encode_video(*self.processor.prepare([media], [frame_indices]))

    def prepare(
        self, request: Mapping[str, Any], params: SamplingParams | None = None, **sampling: Any
    ) -> EngineRequest:
        """Check a request of `generate`, decode its media and tokenize its prompt. `engine.add` takes the result."""
        self.engine.raise_if_dead()
        return self.request_parser.parse(request, self.request_parser.sampling_params(params, sampling))
