"""RequestModel: the base of the JSON objects that clients send, and the path of a wrong field in its request."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from atb_pllava.server.api_error import ApiError


class RequestModel(BaseModel):
    """A JSON object of a request. Values are not converted: the text "16" is no number, and true is no 1.

    Unknown fields are kept, and `protocol.fields` names them in the log. Infinity and NaN are refused.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)

    def unknown_fields(self) -> dict[str, Any]:
        """The fields that this class does not declare, with their values."""
        return self.__pydantic_extra__ or {}


def invalid_request(error: ValidationError) -> ApiError:
    """The refusal that names the first wrong field of a request, as `messages[0].content[1].video_url`."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = path_of(first["loc"])
    message = f"{param}: {first['msg']}" if param else first["msg"]
    return ApiError(400, "invalid_field", message, param)


def path_of(location: tuple[int | str, ...]) -> str | None:
    """The path of a field from pydantic's location. Names in parentheses are alternatives of a field's type."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("("):
            path += f".{step}" if path else step
    return path or None
