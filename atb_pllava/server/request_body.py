"""Reads the JSON body of a request without holding up the event loop, and checks it against a pydantic model."""

import asyncio
import json
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from atb_pllava.server.api_error import ApiError
from atb_pllava.server.asgi import media_type
from atb_pllava.server.protocol.base import RequestModel, invalid_request

_LARGEST_AT_ONCE = 64 * 2**10  # bytes that are parsed in the event loop, about 0.2 ms

# Python's JSON parser holds up all threads, about a second for 5 million empty lists. Commas in texts count too.
_MOST_VALUES = 2**17

Model = TypeVar("Model", bound=RequestModel)


async def read_body(request: Request, model: type[Model]) -> Model:
    """The request's JSON body as a `model`.

    Raises ApiError: 415 for another content type, 400 for anything but JSON of the wanted form. Raises ClientDisconnect
    when the client goes away. The middleware `BodyLimit` bounds the size of the body and the time that it takes.
    """
    if media_type(request.scope) != "application/json":
        message = "the body must be JSON, with the header Content-Type: application/json"
        raise ApiError(415, "unsupported_media_type", message)
    body = b"".join([chunk async for chunk in request.stream()])  # request.body() would keep the bytes
    if len(body) <= _LARGEST_AT_ONCE:
        return _parse(body, model)
    return await asyncio.to_thread(_parse, body, model)


def parse_json(body: bytes) -> Any:
    """The value of a JSON text. Raises ApiError unless the text is UTF-8 and JSON as RFC 8259 has it.

    NaN, Infinity, an object with the same name twice, and more than 131072 values are refused.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > _MOST_VALUES:
        raise ApiError(400, "invalid_json", f"the body has more than {_MOST_VALUES} values")
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_object_of)
    except RecursionError:
        raise ApiError(400, "invalid_json", "the body is nested too deeply") from None
    except ValueError:  # also UnicodeDecodeError, JSONDecodeError, and a number with too many digits
        raise ApiError(400, "invalid_json", "the body is not JSON in UTF-8") from None


def _parse(body: bytes, model: type[Model]) -> Model:
    value = parse_json(body)
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid_request(error) from None
    except RecursionError:
        raise ApiError(400, "invalid_json", "the body is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, "invalid_json", f"the body has {name}, which is no JSON number")


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ApiError(400, "invalid_json", "an object of the body has the same name twice")
    return value
