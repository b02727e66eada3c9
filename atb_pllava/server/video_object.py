"""The JSON of registered videos: the request that registers one, and the objects of the responses."""

import time
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from atb_pllava.server.protocol.base import RequestModel
from atb_pllava.server.video_store import StoredVideo, VideoStore


class VideoOptions(RequestModel):
    """How a video is sampled. start_seconds and end_seconds bound the part that frames are taken from."""

    model_config = ConfigDict(extra="forbid")

    num_frames: int | None = Field(None, ge=1, le=4096, description="Frames to sample; by default the model's number.")
    start_seconds: float | None = Field(None, ge=0, description="Frames are sampled from here on.")
    end_seconds: float | None = Field(None, ge=0, description="Frames are sampled up to here.")
    uuid: str | None = Field(None, min_length=1, max_length=128, description="Your own name for the video.")


class VideoUrl(VideoOptions):
    """A video to register from a URL: data:, or http(s): and file: where the server allows them."""

    url: str = Field(min_length=1)


class VideoObject(BaseModel):
    """A registered video. Frame i of num_frames is frame number frame_indices[i] of the medium."""

    id: str
    object: Literal["video"] = "video"
    created: int = Field(description="Seconds since 1970.")
    expires_at: int = Field(description="Seconds since 1970, if nobody uses the video before.")
    name: str
    uuid: str | None
    bytes: int = Field(description="Size of the medium.")
    num_frames: int
    frame_indices: list[int]
    frames_hash: str = Field(description="SHA-256 of the sampled frames: videos with the same frames have the same.")
    frame_seconds: list[float] | None = Field(description="The time of each frame; null without a frame rate.")
    width: int | None = Field(description="Pixels of the medium's pictures.")
    height: int | None = Field(description="Pixels of the medium's pictures.")
    duration: float | None = Field(description="Seconds; null without a frame rate.")
    total_frames: int | None = Field(description="Frames of the medium.")
    fps: float | None = Field(description="Average frame rate; null without one.")


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VideoObject]


class DeletedVideo(BaseModel):
    id: str
    object: Literal["video"] = "video"
    deleted: bool = True


def video_object(stored: StoredVideo, store: VideoStore) -> VideoObject:
    """The JSON of a registered video at this moment."""
    video = stored.video
    source = video.source
    seconds = video.frame_seconds
    return VideoObject(
        id=stored.video_id,
        created=stored.created,
        expires_at=int(time.time() + store.seconds_left(stored)),
        name=stored.name,
        uuid=stored.uuid,
        bytes=stored.media_bytes,
        num_frames=len(video.frame_indices),
        frame_indices=list(video.frame_indices),
        frames_hash=video.mm_hash.hex(),
        frame_seconds=None if seconds is None else list(seconds),
        width=None if source is None else source.width,
        height=None if source is None else source.height,
        duration=None if source is None else source.seconds,
        total_frames=None if source is None else source.total_frames,
        fps=None if source is None or not source.fps else source.fps,
    )
