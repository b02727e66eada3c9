"""ServerAnswerer: asks a running server. Each video is uploaded once and then named by its id."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from atb_pllava.cli.chat_answerer import Turns
from atb_pllava.client.api_client import ApiClient, text_of
from atb_pllava.errors import ServerError, counted


class ServerAnswerer:
    """See `chat_answerer.Answerer`. `fields` are added to every request: temperature, max_tokens and so on.

    `close` makes the server forget the videos.
    """

    def __init__(self, client: ApiClient, fields: Mapping[str, Any], system: str | None) -> None:
        self._client = client
        self._fields = fields
        self._system = system
        self._media: list[str] = []
        self._video_ids: list[str] = []
        self.model = str(client.model()["id"])

    def __enter__(self) -> "ServerAnswerer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, media: Sequence[str]) -> str:
        """See `Answerer.open`."""
        videos = [self._client.register_video(path) for path in media]
        self.close()
        self._media = list(media)
        self._video_ids = [video["id"] for video in videos]
        return counted(sum(video["num_frames"] for video in videos), "frame")

    def ask(self, question: str, history: Turns) -> Iterator[str]:
        """See `Answerer.ask`. A video that the server has forgotten meanwhile is uploaded anew."""
        try:
            yield from self._stream(question, history)
        except ServerError as error:
            if error.code != "video_not_found":
                raise
            self.open(self._media)
            yield from self._stream(question, history)

    def close(self) -> None:
        """Forget the videos. A server that is gone has forgotten them."""
        for video_id in self._video_ids:
            with suppress(ServerError):
                self._client.delete_video(video_id)
        self._video_ids = []

    def _stream(self, question: str, history: Turns) -> Iterator[str]:
        body = {"model": self.model, "messages": self._messages(question, history), **self._fields}
        for chunk in self._client.stream_chat(body):
            text = text_of(chunk)
            if text:
                yield text

    def _messages(self, question: str, history: Turns) -> list[dict[str, Any]]:
        """The whole conversation. The first question stands behind the videos."""
        messages: list[dict[str, Any]] = []
        for asked, answer in history:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": question})
        videos = [{"type": "video", "video_id": video_id} for video_id in self._video_ids]
        if videos:
            messages[0]["content"] = [*videos, {"type": "text", "text": messages[0]["content"]}]
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return system + messages
