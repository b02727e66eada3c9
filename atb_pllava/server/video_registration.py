"""VideoRegistration: reads the video of a request's body and puts it into the VideoStore."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.processor import Media, ProcessedVideo, TimeRange, VideoProcessor
from atb_pllava.server.api_error import RETRY_LATER, ApiError
from atb_pllava.server.asgi import media_type
from atb_pllava.server.media_errors import media_error
from atb_pllava.server.media_sources import MediaSources, OpenMedia
from atb_pllava.server.metrics import ServerMetrics
from atb_pllava.server.protocol.base import invalid_request
from atb_pllava.server.request_body import read_body
from atb_pllava.server.request_record import record_of
from atb_pllava.server.upload import Upload, UploadBudget, receive_upload
from atb_pllava.server.video_object import VideoOptions, VideoUrl
from atb_pllava.server.video_store import StoredVideo, VideoStore

FORM_BYTES = 2**16  # what a form may have beside the file
_MOST_REGISTRATIONS = 16  # under way at once
_UPLOADS_ON_DISK = 4  # files of the largest size that uploads under way may take together
_READERS = 8  # threads. Each waits for a media worker, or reads in this process if there is none

Options = TypeVar("Options", bound=VideoOptions)


class VideoRegistration:
    """Registers videos of requests. Used from one event loop.

    `processor()` reads media as the model needs them, and raises ApiError while there is no model. `max_frames` is the
    largest num_frames of a request, as far as `limits` allow.
    """

    def __init__(
        self,
        store: VideoStore,
        processor: Callable[[], VideoProcessor],
        sources: MediaSources,
        metrics: ServerMetrics,
        limits: MediaLimits,
        max_frames: int,
    ) -> None:
        self.store = store
        self._processor = processor
        self._sources = sources
        self._metrics = metrics
        self._limits = limits
        self._max_frames = min(max_frames, limits.max_sampled_frames)
        self._budget = UploadBudget(_UPLOADS_ON_DISK * limits.max_bytes)
        self._threads = ThreadPoolExecutor(_READERS, "register_video")
        self._under_way = 0

    @property
    def max_body_bytes(self) -> int:
        """The largest body of an upload, for the middleware BodyLimit."""
        return self._limits.max_bytes + FORM_BYTES

    async def register(self, request: Request) -> StoredVideo:
        """Register the video of a request. Raises ApiError."""
        processor = self._processor()
        if self._under_way >= _MOST_REGISTRATIONS:
            message = f"{_MOST_REGISTRATIONS} videos are being registered; try again later"
            raise ApiError(429, "too_many_registrations", message, headers=RETRY_LATER)
        self._under_way += 1
        try:
            return await self._register(request, processor)
        except ApiError as error:
            self._metrics.count_media_rejection(error.code)
            raise
        finally:
            self._under_way -= 1

    async def read(self, medium: Upload | OpenMedia, processor: VideoProcessor, times: TimeRange) -> ProcessedVideo:
        """The frames of a medium, which is closed then. A cancelled call closes it when the thread is done."""
        job = self._threads.submit(_prepare, processor, medium.media, times)
        job.add_done_callback(lambda _: medium.close())
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """End the threads. A medium that is being read is read to its end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _register(self, request: Request, processor: VideoProcessor) -> StoredVideo:
        medium, options, param = await self._open(request)
        self._metrics.count_media_bytes(medium.size)
        times = (options.start_seconds, options.end_seconds)
        if options.num_frames is not None:
            processor = replace(processor, num_frames=options.num_frames)
        processor = replace(processor, cache=None)  # the store keeps the frames
        began = time.perf_counter()
        try:
            video = await self.read(medium, processor, times)
        except VideoError as error:
            raise media_error(error, medium.name, param) from None
        self._metrics.observe_video_decode(time.perf_counter() - began)
        record = record_of(request.scope)
        record.videos = 1
        return self.store.add(
            video, record.owner, name=medium.name, media_bytes=medium.size, time_range=times, uuid=options.uuid
        )

    async def _open(self, request: Request) -> tuple[Upload | OpenMedia, VideoOptions, str]:
        """The medium of a request, its options, and the name of the field that has the medium."""
        content_type = media_type(request.scope)
        if content_type == "multipart/form-data":
            upload = await receive_upload(
                request, list(VideoOptions.model_fields), self._limits.max_bytes, self._budget
            )
            try:
                return upload, self._checked(_options_of(upload)), "file"
            except BaseException:
                upload.close()
                raise
        if content_type != "application/json":
            message = "Content-Type must be multipart/form-data with a file, or application/json with a url"
            raise ApiError(415, "unsupported_media_type", message)
        asked = self._checked(await read_body(request, VideoUrl))
        return await self._sources.open(asked.url, "video", "url"), asked, "url"

    def _checked(self, options: Options) -> Options:
        """The options. Raises ApiError for more frames than allowed, and for an end before the start."""
        if options.num_frames is not None and options.num_frames > self._max_frames:
            message = f"num_frames is {options.num_frames}; this server allows {self._max_frames}"
            raise ApiError(400, "too_many_frames", message, "num_frames")
        start = options.start_seconds
        end = options.end_seconds
        if start is not None and end is not None and end < start:
            message = f"end_seconds is {end:g}, before start_seconds {start:g}"
            raise ApiError(400, "invalid_field", message, "end_seconds")
        return options


def _options_of(upload: Upload) -> VideoOptions:
    """The options of a form. Its fields are text, which is read as numbers."""
    try:
        return VideoOptions.model_validate(upload.fields, strict=False)
    except ValidationError as error:
        raise invalid_request(error) from None


def _prepare(processor: VideoProcessor, medium: Media, times: TimeRange) -> ProcessedVideo:
    (video,) = processor.prepare([medium], None, [times])
    return video
