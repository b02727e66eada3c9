"""Routes of registered videos: POST a video once, then ask many questions about its id.

The application has a VideoRegistration in `app.state.videos`.
"""

import asyncio
from io import BytesIO
from typing import Annotated, Any

from fastapi import APIRouter, Query
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from atb_pllava.errors import counted
from atb_pllava.multimodal.processor import ProcessedVideo
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.openapi import errors, json_body
from atb_pllava.server.request_record import record_of
from atb_pllava.server.video_object import DeletedVideo, VideoList, VideoObject, VideoOptions, VideoUrl, video_object
from atb_pllava.server.video_registration import VideoRegistration
from atb_pllava.server.video_store import StoredVideo

VIDEOS = "/v1/videos"
FORMATS = ("jpeg", "png")
_JPEG_QUALITY = 90

router = APIRouter()


def _bodies() -> dict[str, Any]:
    """What the OpenAPI document says of the body of POST: JSON with a URL, or a form with a file."""
    body = json_body(VideoUrl)
    options = VideoOptions.model_json_schema()["properties"]
    file = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": {"file": file, **options}, "required": ["file"]}
    body["requestBody"]["content"]["multipart/form-data"] = {"schema": form}
    return body


@router.post(
    VIDEOS,
    response_model=VideoObject,
    openapi_extra=_bodies(),
    responses=errors(400, 401, 408, 413, 415, 422, 424, 429, 503),
)
async def register(request: Request) -> VideoObject:
    """Register a video, a file or a URL, so that many requests can ask about it."""
    videos = videos_of(request)
    return video_object(await videos.register(request), videos.store)


@router.get(VIDEOS, response_model=VideoList, responses=errors(401))
async def list_videos(request: Request) -> VideoList:
    """The videos that this API key has registered, the newest first."""
    store = videos_of(request).store
    return VideoList(data=[video_object(stored, store) for stored in store.list(record_of(request.scope).owner)])


@router.get(f"{VIDEOS}/{{video_id}}", response_model=VideoObject, responses=errors(401, 404))
async def get_video(request: Request, video_id: str) -> VideoObject:
    """One registered video. It lives on as if it were asked about."""
    return video_object(_find(request, video_id), videos_of(request).store)


@router.delete(f"{VIDEOS}/{{video_id}}", response_model=DeletedVideo, responses=errors(401, 404))
async def delete_video(request: Request, video_id: str) -> DeletedVideo:
    """Forget a registered video."""
    videos_of(request).store.delete(video_id, record_of(request.scope).owner, "video_id")
    return DeletedVideo(id=video_id)


@router.get(
    f"{VIDEOS}/{{video_id}}/frames/{{number}}",
    response_class=Response,
    responses={200: {"content": {f"image/{name}": {} for name in FORMATS}}, **errors(400, 401, 404)},
)
async def get_frame(
    request: Request,
    video_id: str,
    number: str,
    format: Annotated[str, Query(json_schema_extra={"enum": list(FORMATS)})] = "jpeg",
) -> Response:
    """One of the sampled frames, as the model sees it."""
    video = _find(request, video_id).video
    if format not in FORMATS:
        raise ApiError(400, "invalid_field", f"format must be one of {', '.join(FORMATS)}", "format")
    last = len(video.frame_indices) - 1
    if not (number.isascii() and number.isdigit() and len(number) < 10 and int(number) <= last):
        message = f"the video has {counted(last + 1, 'frame')}, numbered from 0 to {last}"
        raise ApiError(404, "frame_not_found", message, "number")
    content = await asyncio.to_thread(_encode, video, int(number), format)
    return Response(content, headers={"X-Content-Type-Options": "nosniff"}, media_type=f"image/{format}")


def videos_of(request: Request) -> VideoRegistration:
    """The registration of the server that got a request."""
    videos = request.app.state.videos
    assert isinstance(videos, VideoRegistration)
    return videos


def _find(request: Request, video_id: str) -> StoredVideo:
    return videos_of(request).store.get(video_id, record_of(request.scope).owner, "video_id")


def _encode(video: ProcessedVideo, number: int, format: str) -> bytes:
    """Frame `number` of the sampled frames as an image file."""
    content = BytesIO()
    image = Image.fromarray(video.frames[video.inverse_indices[number]])
    if format == "png":
        image.save(content, "PNG")
    else:
        image.save(content, "JPEG", quality=_JPEG_QUALITY)
    return content.getvalue()
