"""The requests of tests/soak_server.py: good ones with LLM's answers to them, and bad ones with their refusals."""

import base64
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from atb_pllava import LLM, RequestOutput, SamplingParams
from atb_pllava.multimodal.image_sequence import ImageSequence
from tests.support import EXAMPLES

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
VIDEOS = "/v1/videos"
CLIPS = sorted((EXAMPLES / "videos").glob("*.mp4"))

# How the tokens of an answer are chosen: fields of SamplingParams, which are those of the HTTP API.
GREEDY: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
PARAMS: list[dict[str, Any]] = [
    GREEDY,
    {"max_tokens": 24},
    {"max_tokens": 16, "temperature": 1.0, "top_p": 0.9, "seed": 5},
    {"max_tokens": 24, "temperature": 1.0, "seed": 6, "n": 3},
    {"max_tokens": 12, "num_beams": 2},
    {"max_tokens": 12, "num_beams": 3, "ignore_eos": True},
    {"max_tokens": 24, "stop": ["e", "moves"], "ignore_eos": True, "repetition_penalty": 1.1},
    {"max_tokens": 12, "logprobs": 3},
]
Parts = list[tuple[str, Any]]  # of a message: kind, and text, path or paths of JPEG images


@dataclass(frozen=True)
class Answer:
    """An answer to one prompt: text and finish reason of each choice, the tokens, and the chosen log-probabilities."""

    choices: list[tuple[str, str]]
    prompt_tokens: int
    output_tokens: int
    logprobs: list[list[float]] | None

    @classmethod
    def of(cls, output: RequestOutput) -> "Answer":
        values = None
        if output.outputs[0].logprobs is not None:
            values = [
                [float(one[token]) for token, one in zip(answer.token_ids, answer.logprobs or [], strict=True)]
                for answer in output.outputs
            ]
        choices = [(answer.text, answer.finish_reason) for answer in output.outputs]
        return cls(choices, output.metrics.prompt_tokens, output.metrics.output_tokens, values)


@dataclass(frozen=True)
class Case:
    """A request in two forms: the body that is posted to `path`, and what LLM takes. clip: the only video, if any."""

    path: str
    body: Mapping[str, Any]
    request: Mapping[str, Any]
    params: SamplingParams
    clip: Path | None = None
    answer: Answer | None = None

    def answered_by(self, llm: LLM) -> "Case":
        """The case with LLM's answer to it alone."""
        (output,) = llm.generate([self.request], self.params)
        return Case(self.path, self.body, self.request, self.params, self.clip, Answer.of(output))

    def about(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """The body with another part in place of its only video."""
        messages = [
            {**message, "content": [part if one["type"] == "video_url" else one for one in message["content"]]}
            for message in self.body["messages"]
        ]
        return {**self.body, "messages": messages}


@dataclass(frozen=True)
class BadRequest:
    """A request that must be refused with this status and code. json: the body, unless `content` is."""

    status: int
    code: str
    path: str = CHAT
    method: str = "POST"
    json: Any = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


def good_cases(folder: Path, llm: LLM) -> list[Case]:
    """The requests that are sent again and again, with their answers. folder: for image files."""
    chats = _chats(folder)
    cases = [_chat_case(chat, params) for chat in chats for params in PARAMS]
    cases += [_completion_case("USER: Is it red? ASSISTANT:", params) for params in PARAMS]
    cases.append(_chat_case(chats[-1], GREEDY, num_frames=8))
    return [case.answered_by(llm) for case in cases]


def unique_case(number: int) -> Case:
    """A request that no other number has: about a text, or about a video of JPEG frames."""
    params = {"max_tokens": random.Random(number).randint(1, 16), "ignore_eos": True}
    parts: Parts = [("text", f"What is in picture {number}?")]
    if number % 2:
        pixels = np.random.default_rng(number).integers(0, 255, (4, 40, 60, 3), dtype=np.uint8)
        parts.insert(0, ("frames", [_jpeg(Image.fromarray(frame)) for frame in pixels]))
    return _chat_case([("user", parts)], params)


def bad_requests(folder: Path) -> list[BadRequest]:
    """One refusal of each kind."""
    hello = {"messages": [{"role": "user", "content": "Hello"}]}
    fields = [
        ({"temperature": -1}, 400, "invalid_field"),
        ({"n": 10**6}, 400, "invalid_field"),
        ({"n": 2}, 400, "invalid_field"),
        ({"max_tokens": 0}, 400, "invalid_field"),
        ({"max_tokens": 199}, 400, "context_length_exceeded"),
        ({"top_p": 2}, 400, "invalid_field"),
        ({"stop": ["x"] * 1000}, 400, "invalid_field"),
        ({"stream_options": {}}, 400, "invalid_field"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_field"),
        ({"model": "other"}, 404, "model_not_found"),
        ({"messages": []}, 400, "invalid_field"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, 400, "invalid_messages"),
        ({"messages": [{"role": "user", "content": "why " * 400}]}, 400, "context_length_exceeded"),
        ({"media_io_kwargs": {"video": {"num_frames": 17}}}, 400, "too_many_frames"),
    ]
    bodies = [
        (b"{", 400, "invalid_json"),
        (b"\xff", 400, "invalid_json"),
        (b"[" * 20_000, 400, "invalid_json"),
        (b'{"messages": [], "messages": []}', 400, "invalid_json"),
        (b'{"temperature": NaN}', 400, "invalid_json"),
    ]
    text = {"Content-Type": "text/plain"}
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    return [
        *(BadRequest(status, code, json={**hello, **given}) for given, status, code in fields),
        *(BadRequest(status, code, content=content) for content, status, code in bodies),
        *(BadRequest(status, code, json=_about(url)) for url, status, code in _bad_urls(folder)),
        BadRequest(404, "video_not_found", json={"messages": [_message({"type": "video", "video_id": "video-0"})]}),
        BadRequest(404, "video_not_found", json={"messages": [_message({"type": "video_url", "uuid": "nobody's"})]}),
        BadRequest(415, "unsupported_media_type", content=b"Hello", headers=text),
        BadRequest(413, "body_too_large", content=b" " * (2**20 + 1)),
        BadRequest(400, "invalid_field", path=COMPLETIONS, json={"prompt": 5}),
        BadRequest(400, "context_length_exceeded", path=COMPLETIONS, json={"prompt": "why " * 400}),
        BadRequest(404, "unknown_path", path="/v1/nothing", json=hello),
        BadRequest(404, "model_not_found", path="/v1/models/other", method="GET"),
        BadRequest(405, "method_not_allowed", path=CHAT, method="GET"),
        BadRequest(404, "video_not_found", path=f"{VIDEOS}/video-0", method="DELETE"),
        BadRequest(400, "invalid_form", path=VIDEOS, content=b"--x--\r\n", headers=form),
        BadRequest(400, "invalid_field", path=VIDEOS, json={"url": _data_url(CLIPS[0]), "num_frames": 0}),
        BadRequest(422, "video_decode_failed", path=VIDEOS, json={"url": _data_url(folder / "noise.mp4")}),
    ]


def _bad_urls(folder: Path) -> list[tuple[str, int, str]]:
    """URLs of no video, each with its refusal."""
    whole = CLIPS[0].read_bytes()
    contents = {"empty": b"", "text": b"not a video", "head": whole[:200], "noise": random.Random(0).randbytes(5000)}
    for name, content in contents.items():
        (folder / f"{name}.mp4").write_bytes(content)
    image = base64.b64encode(_jpeg(Image.new("RGB", (80, 60)))).decode()
    return [
        *((_data_url(folder / f"{name}.mp4"), 422, "video_decode_failed") for name in contents),
        (f"data:video/mp4;base64,{image}", 422, "wrong_media_kind"),
        ("data:video/mp4;base64,&&&&", 400, "invalid_data_url"),
        ("data:text/html;base64,AAAA", 400, "unsupported_media_type"),
        ("data:,x", 400, "unsupported_media_type"),
        ("https://videos.example.org/a.mp4", 422, "remote_media_disabled"),
        ("http://169.254.169.254/latest", 422, "remote_media_disabled"),
        ("file:///etc/passwd", 400, "local_media_disabled"),
        ("ftp://videos.example.org/a.mp4", 400, "unsupported_media_url"),
        ("a.mp4", 400, "unsupported_media_url"),
    ]


def _about(url: str) -> dict[str, Any]:
    return {"messages": [_message({"type": "video_url", "video_url": {"url": url}})]}


def _message(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": "What moves?"}]}


def _chats(folder: Path) -> list[list[tuple[str, Parts]]]:
    """Conversations: (role, parts) of each message."""
    red = folder / "red.png"
    Image.new("RGB", (80, 60), (200, 30, 30)).save(red)
    frames = [_jpeg(Image.new("RGB", (64, 48), (40 * number, 90, 200))) for number in range(4)]
    return [
        [("user", [("text", "What is this?")])],
        [
            ("system", [("text", "You answer briefly.")]),
            ("user", [("text", "What moves?")]),
            ("assistant", [("text", "A circle.")]),
            ("user", [("text", "Why?")]),
        ],
        [("user", [("video", CLIPS[0]), ("video", CLIPS[1]), ("text", "Which is longer?")])],
        [("user", [("image", red), ("text", "Which colour?")])],
        [("user", [("frames", frames), ("text", "Which colour?")])],
        *([("user", [("video", clip), ("text", "Describe the video.")])] for clip in CLIPS),
    ]


def _chat_case(messages: Sequence[tuple[str, Parts]], params: Mapping[str, Any], num_frames: int | None = None) -> Case:
    """A chat, for the HTTP API and for LLM."""
    parts = [part for _, content in messages for part in content]
    clips = [value for kind, value in parts if kind == "video"]
    body: dict[str, Any] = {
        "messages": [{"role": role, "content": [_http_part(*part) for part in content]} for role, content in messages],
        **{name: value for name, value in params.items() if name != "logprobs"},
    }
    request: dict[str, Any] = {
        "messages": [{"role": role, "content": [_llm_part(*part) for part in content]} for role, content in messages]
    }
    if "logprobs" in params:
        body.update(logprobs=True, top_logprobs=params["logprobs"])
    if num_frames is not None:
        body["media_io_kwargs"] = {"video": {"num_frames": num_frames}}
        request["num_frames"] = num_frames
    only = clips[0] if len(clips) == 1 and num_frames is None else None
    return Case(CHAT, body, request, SamplingParams(**params), only)


def _completion_case(prompt: str, params: Mapping[str, Any]) -> Case:
    return Case(COMPLETIONS, {"prompt": prompt, **params}, {"prompt": prompt}, SamplingParams(**params))


def _http_part(kind: str, value: Any) -> dict[str, Any]:
    """A part of a message as clients of the HTTP API send it."""
    if kind == "text":
        return {"type": "text", "text": value}
    if kind == "image":
        content = base64.b64encode(value.read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
    if kind == "frames":
        url = f"data:video/jpeg;base64,{','.join(base64.b64encode(frame).decode() for frame in value)}"
    else:
        url = _data_url(value)
    return {"type": "video_url", "video_url": {"url": url}}


def _llm_part(kind: str, value: Any) -> dict[str, Any]:
    return {"video": ImageSequence(tuple(value))} if kind == "frames" else {kind: value}


def _data_url(path: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _jpeg(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG")
    return content.getvalue()
