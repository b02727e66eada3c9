"""Every error becomes a response in the form of OpenAI's API. No response has the text of a library or a traceback."""

import logging

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atb_pllava.errors import BackendError, EngineDeadError, PllavaError, RequestError, VideoError
from atb_pllava.server.access_log import CLIENT_CLOSED_REQUEST
from atb_pllava.server.api_error import RETRY_LATER, ApiError
from atb_pllava.server.asgi import error_response
from atb_pllava.server.media_errors import media_error
from atb_pllava.server.request_record import record_of

logger = logging.getLogger(__name__)


def add_error_handlers(app: FastAPI) -> None:
    """Answer refusals of the routes, and every path and method that no route has, with an ApiError's body.

    `BugGuard` answers all other exceptions.
    """
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(PllavaError, _answer_pllava_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)


def api_error_of(error: PllavaError, request_id: str) -> ApiError:
    """The refusal for an error of this package: 400 for a bad request, 422 for a bad medium, 503 for a dead engine."""
    if _is_bug(error):
        logger.error("request %s failed", request_id, exc_info=error)
        return bug_error(request_id)
    if isinstance(error, VideoError):
        return media_error(error, "a medium", "messages")
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
    return ApiError(503, code, message, headers=RETRY_LATER)


def bug_error(request_id: str) -> ApiError:
    """A 500 that names only the request's id, under which the log has the cause."""
    return ApiError(500, "internal_error", f"the server failed; its log has the cause under request id {request_id}")


def _is_bug(error: PllavaError) -> bool:
    """Whether an unexpected exception stands behind a RequestError. The message would show that exception's text."""
    cause = error.__cause__
    return isinstance(error, RequestError) and cause is not None and not isinstance(cause, PllavaError)


class BugGuard:
    """ASGI middleware: an exception that nothing else handles becomes a 500, and its traceback is logged."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            request_id = record_of(scope).request_id
            logger.error("request %s failed", request_id, exc_info=error)
            if has_begun or scope["type"] != "http":
                raise
            await error_response(scope, bug_error(request_id))(scope, receive, send)


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(request.scope, error)


async def _answer_pllava_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PllavaError)
    request_id = record_of(request.scope).request_id
    return error_response(request.scope, request.app.state.server.refusal_of(error, request_id))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """A path or a method that no route has. Starlette raises the exception."""
    assert isinstance(error, HTTPException)
    refusals = {
        404: ("unknown_path", "no such path; the server's paths are listed in /openapi.json"),
        405: ("method_not_allowed", "the path does not take this method"),
    }
    code, message = refusals.get(error.status_code, ("invalid_request", "the request cannot be understood"))
    return error_response(request.scope, ApiError(error.status_code, code, message, headers=dict(error.headers or {})))


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client went away. The status stands in the access log."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)
