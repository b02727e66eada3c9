"""Every error becomes a response in the form of OpenAI's API. No response has the text of a library or a traceback."""

import logging

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from atb_pllava.errors import BackendError, EngineDeadError, PllavaError, RequestError, VideoError
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.request_id import request_id_of

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5
_CLIENT_CLOSED_REQUEST = 499  # nginx's status of a request whose client went away. No client sees it

# The status of a medium that cannot be used, by VideoError.kind. The others are 422.
_VIDEO_STATUS = {
    "bad_request": 400,
    "not_found": 404,
    "too_large": 413,
    "out_of_resources": 503,
    "closed": 503,
    "internal": 500,
}


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception of a route, and every path and method that no route has, with an ApiError's body."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(PllavaError, _answer_pllava_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_bug)


def response_of(error: ApiError) -> JSONResponse:
    """The response that refuses a request."""
    return JSONResponse(error.body(), error.status, dict(error.headers))


def api_error_of(error: PllavaError, request_id: str) -> ApiError:
    """The refusal for an error of this package: 400 for a bad request, 422 for a bad medium, 503 for a dead engine."""
    if _is_bug(error):
        logger.error("request %s failed", request_id, exc_info=error)
        return bug_error(request_id)
    if isinstance(error, VideoError):
        return _video_error(error, request_id)
    if isinstance(error, RequestError):
        return ApiError(400, "invalid_request", str(error))
    if isinstance(error, EngineDeadError):
        return unavailable("engine_dead", "the engine has failed, and the server is about to end")
    if isinstance(error, MemoryError):
        return unavailable("out_of_memory", "the server has no memory left for this request; try again")
    if isinstance(error, BackendError):
        logger.error("request %s failed: %s", request_id, error)
        return bug_error(request_id)
    return ApiError(400, "invalid_request", str(error))


def unavailable(code: str, message: str) -> ApiError:
    """A 503 with Retry-After."""
    return ApiError(503, code, message, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def bug_error(request_id: str) -> ApiError:
    """A 500 that names only the request's id, under which the log has the cause."""
    return ApiError(500, "internal_error", f"the server failed; its log has the cause under request id {request_id}")


def _is_bug(error: PllavaError) -> bool:
    """Whether an unexpected exception stands behind a RequestError. The message would show that exception's text."""
    cause = error.__cause__
    return isinstance(error, RequestError) and cause is not None and not isinstance(cause, PllavaError)


def _video_error(error: VideoError, request_id: str) -> ApiError:
    kind = str(getattr(error, "kind", "unreadable"))
    status = _VIDEO_STATUS.get(kind, 422)
    if status == 500:
        logger.error("request %s failed: %s", request_id, error)
        return bug_error(request_id)
    if status == 503:
        return unavailable("media_unavailable", "the server cannot read media at the moment; try again")
    return ApiError(status, f"video_{kind}", str(error))


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return response_of(error)


async def _answer_pllava_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PllavaError)
    return response_of(api_error_of(error, request_id_of(request.scope)))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """A path or a method that no route has. Starlette raises the exception."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    if status == 404:
        message = "no such path; the server's paths are listed in /openapi.json"
        return response_of(ApiError(404, "unknown_path", message))
    if status == 405:
        message = "the path does not take this method"
        return response_of(ApiError(405, "method_not_allowed", message, headers=dict(error.headers or {})))
    return response_of(ApiError(status, "invalid_request", "the request cannot be understood"))


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _answer_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the exception again after this response, and uvicorn logs its traceback."""
    request_id = request_id_of(request.scope)
    logger.error("request %s failed", request_id)
    return response_of(bug_error(request_id))
