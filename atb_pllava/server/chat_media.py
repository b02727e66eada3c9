"""Opens the media of a chat: URLs through MediaSources, and registered videos from the VideoStore."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.processor import ProcessedVideo, VideoProcessor
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.chat_messages import MediaPart
from atb_pllava.server.media_errors import media_error
from atb_pllava.server.media_sources import MediaSources, OpenMedia
from atb_pllava.server.metrics import ServerMetrics
from atb_pllava.server.video_registration import VideoRegistration
from atb_pllava.server.video_store import StoredVideo


@dataclass
class OpenedMedia:
    """The media of a chat: what the engine takes, and the words and the request's field for each of them."""

    metrics: ServerMetrics
    contents: list[Any] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)
    files: ExitStack = field(default_factory=ExitStack)

    def add(self, content: Any, name: str, param: str) -> None:
        self.contents.append(content)
        self.names.append((name, param))

    def refusal(self, error: VideoError) -> ApiError:
        """The refusal of a medium that cannot be read. Of several media, the error does not tell which one."""
        name, param = self.names[0] if len(self.names) == 1 else ("a medium", "messages")
        refusal = media_error(error, name, param)
        self.metrics.count_media_rejection(refusal.code)
        return refusal


@dataclass(frozen=True)
class ChatMedia:
    """Opens media for one owner, and counts them. `num_frames` None is the model's own number."""

    sources: MediaSources
    videos: VideoRegistration
    metrics: ServerMetrics
    processor: VideoProcessor
    owner: str | None
    num_frames: int | None

    async def open(self, parts: Sequence[MediaPart]) -> OpenedMedia:
        """Open all media. Raises ApiError for the first that cannot be had, and then nothing stays open."""
        opened = OpenedMedia(self.metrics)
        try:
            for part in parts:
                await self._add(part, opened)
        except BaseException as error:
            opened.files.close()
            if isinstance(error, ApiError):
                self.metrics.count_media_rejection(error.code)
            raise
        return opened

    async def _add(self, part: MediaPart, opened: OpenedMedia) -> None:
        if part.url is None:
            opened.add(self._stored(part).video, "the registered video", part.param)
            return
        medium = await self.sources.open(part.url, part.kind, part.param)
        opened.files.callback(medium.close)
        self.metrics.count_media_bytes(medium.size)
        content = medium.media if part.uuid is None else await self._remembered(part, part.uuid, medium)
        opened.add(content, medium.name, part.param)

    def _stored(self, part: MediaPart) -> StoredVideo:
        """A registered video. Raises ApiError for options that differ from those with which it was registered."""
        if part.video_id is not None:
            stored = self.videos.store.get(part.video_id, self.owner, part.param)
        else:
            stored = self.videos.store.get_by_uuid(part.uuid or "", self.owner, part.param)
        frames = len(stored.video.frame_indices)
        if self.num_frames not in (None, frames):
            message = f"the registered video has {frames} frames, not {self.num_frames}: register it anew, or leave out"
            param = "media_io_kwargs.video.num_frames"
            raise ApiError(400, "registered_differently", f"{message} {param}", param)
        if part.time_range not in ((None, None), stored.time_range):
            message = "the frames of the registered video were sampled between other times: register it anew"
            raise ApiError(400, "registered_differently", message, part.param)
        return stored

    async def _remembered(self, part: MediaPart, uuid: str, medium: OpenMedia) -> ProcessedVideo:
        """Read a video now, and keep it under the client's uuid."""
        processor = self.processor if self.num_frames is None else self.processor.with_num_frames(self.num_frames)
        try:
            video = await self.videos.read(medium, processor, part.time_range)
        except VideoError as error:
            raise media_error(error, medium.name, part.param) from None
        stored = self.videos.store.add(
            video,
            self.owner,
            name=medium.name,
            media_bytes=medium.size,
            time_range=part.time_range,
            uuid=uuid,
        )
        return stored.video
