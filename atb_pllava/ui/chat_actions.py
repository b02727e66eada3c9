"""What the buttons of the chat page do. Every action asks the server's API, as any other client does."""

import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from PIL import Image

from atb_pllava.client.api_client import ApiClient, text_of
from atb_pllava.errors import PllavaError

Lines = list[dict[str, str]]  # of the chat, as gradio's Chatbot takes them
Frames = list[tuple[Image.Image, str]]  # each with its time


@dataclass
class Conversation:
    """One visitor's chat. `messages` are those of the API. `video` is shown with the next question, if it is new."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    video: dict[str, Any] | None = None
    used_video_ids: list[str] = field(default_factory=list)

    def delete_videos(self, client: ApiClient) -> None:
        """Make the server forget the conversation's videos. A server that is gone has forgotten them."""
        for video_id in [*self.used_video_ids, *([] if self.video is None else [self.video["id"]])]:
            with suppress(PllavaError):
                client.delete_video(video_id)


def new_conversation() -> Conversation:
    """A visitor's empty chat."""
    return Conversation()


class ChatActions:
    """The actions of all visitors. gradio calls each one on a thread of its own, with the visitor's Conversation.

    An error of the server is raised as gr.Error, which the page shows until the visitor closes it.
    """

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    def describe_model(self) -> str:
        """The page's head: which model answers, how it pools a video, and what to do."""
        try:
            model = self._client.model()
        except PllavaError as error:
            return f"## PLLaVA\n{error}. Reload this page when the server is ready."
        shape = "x".join(map(str, model["pooling_shape"]))
        pooled = f"{model['num_frames']} frames are pooled to {shape} = {model['num_video_tokens']} tokens"
        return (
            f"## {model['id']}\nUpload a video, or pick an example, and ask about it: {pooled}. "
            f"A later video joins the same conversation, which may have {model['max_model_len']} tokens."
        )

    def show_video(
        self, path: str | None, num_frames: int, conversation: Conversation
    ) -> tuple[Conversation, Frames, str]:
        """Register the video that the next question is about. Returns its frames, and one line about it."""
        if conversation.video is not None:  # it was shown and not asked about
            with suppress(PllavaError):
                self._client.delete_video(conversation.video["id"])
            conversation.video = None
        if path is None:
            return conversation, [], ""
        try:
            video = self._client.register_video(path, num_frames=int(num_frames))
            frames = [self._frame(video, number) for number in range(video["num_frames"])]
        except PllavaError as error:
            raise gr.Error(str(error), duration=None) from None
        conversation.video = video
        return conversation, frames, _about(video)

    def ask(
        self,
        question: str,
        conversation: Conversation,
        system: str,
        temperature: float,
        num_beams: int,
        max_tokens: int,
    ) -> Iterator[tuple[str, Conversation, Lines]]:
        """Yield the question's box, the conversation and the chat's lines while the answer grows."""
        if not question.strip():
            raise gr.Error("Write a question first.")
        asked = _with_question(conversation, question)
        body: dict[str, Any] = {"messages": asked.messages, "temperature": temperature, "max_tokens": int(max_tokens)}
        if system.strip():
            body["messages"] = [{"role": "system", "content": system}, *asked.messages]
        if num_beams > 1:
            body["num_beams"] = int(num_beams)
        answer = {"role": "assistant", "content": ""}
        grown = Conversation([*asked.messages, answer], None, asked.used_video_ids)
        yield "", grown, _lines(grown)
        try:
            for chunk in self._client.stream_chat(body):
                answer["content"] += text_of(chunk)
                yield "", grown, _lines(grown)
        except PllavaError as error:
            yield question, conversation, _lines(conversation)
            raise gr.Error(str(error), duration=None) from None

    def begin_anew(self, conversation: Conversation) -> tuple[Conversation, Lines, None, Frames, str]:
        """Forget the conversation and its videos."""
        conversation.delete_videos(self._client)
        return new_conversation(), [], None, [], ""

    def _frame(self, video: dict[str, Any], number: int) -> tuple[Image.Image, str]:
        image = Image.open(io.BytesIO(self._client.frame(video["id"], number)))
        times = video["frame_seconds"]
        return image, f"frame {video['frame_indices'][number]}" if times is None else f"{times[number]:.2f} s"


def _with_question(conversation: Conversation, question: str) -> Conversation:
    """The conversation with one message more, which holds the new video if there is one."""
    video_ids = [] if conversation.video is None else [conversation.video["id"]]
    videos = [{"type": "video", "video_id": video_id} for video_id in video_ids]
    message = {"role": "user", "content": [*videos, {"type": "text", "text": question}]}
    return Conversation([*conversation.messages, message], None, [*conversation.used_video_ids, *video_ids])


def _lines(conversation: Conversation) -> Lines:
    """The chat's lines. A question about a new video says so."""
    return [{"role": message["role"], "content": _line(message["content"])} for message in conversation.messages]


def _line(content: Any) -> str:
    if isinstance(content, str):
        return content
    text = str(content[-1]["text"])
    return text if len(content) == 1 else f"(about the video) {text}"


def _about(video: dict[str, Any]) -> str:
    """One line about a registered video."""
    length = "" if video["duration"] is None else f", {video['duration']:.1f} s"
    return f"{video['num_frames']} of {video['total_frames']} frames, {video['width']}x{video['height']} pixels{length}"
