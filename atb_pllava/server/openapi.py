"""What the OpenAPI document says about bodies that the server parses itself, and about refusals."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from atb_pllava.server.protocol.base import RequestModel
from atb_pllava.server.protocol.responses import ErrorResponse

_REF = "#/components/schemas/{model}"
_MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "The model or the registered video does not exist.",
    408: "The body did not come in time.",
    413: "The body or a video is too large.",
    415: "The body is not JSON.",
    422: "A video or an image cannot be used.",
    424: "A video or an image cannot be fetched.",
    429: "Too many requests wait. Retry-After says when to try again.",
    500: "A failure of the server. The message has the id under which the log has the cause.",
    503: "The server loads, shuts down or has failed. Retry-After says when to try again.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route for these statuses."""
    return {status: {"model": ErrorResponse, "description": _MEANINGS[status]} for status in statuses}


GENERATION_ERRORS = errors(400, 401, 404, 408, 413, 415, 422, 424, 429, 500, 503)


def answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that generates: a `model`, or a stream of its chunks, or a refusal."""
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    return {200: {"model": model, "description": "The answer.", "content": stream}, **GENERATION_ERRORS}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads a JSON body of this form with `request_body.read_body`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_bodies(app: FastAPI, *models: type[RequestModel]) -> None:
    """Add the models of bodies, and those inside of them, to the schemas of the app's OpenAPI document."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = make()
            _, found = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
            document.setdefault("components", {}).setdefault("schemas", {}).update(found.get("$defs", {}))
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
