"""The id of an HTTP request, for the access log and for messages about failures."""

import uuid
from collections.abc import MutableMapping
from typing import Any


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """The id of the request of an ASGI scope: 32 hexadecimal digits, made when first asked for."""
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        state["request_id"] = uuid.uuid4().hex
    return str(state["request_id"])
