"""ServerState: what the handlers of all requests share, and whether the server takes requests."""

import threading
from enum import Enum

from starlette.requests import Request

from atb_pllava.server.admission import Admission
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.errors import unavailable
from atb_pllava.server.options import ServerOptions
from atb_pllava.server.served_model import ServedModel


class Phase(Enum):
    """Where the server stands. Only a ready server takes requests."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


_REFUSALS = {
    Phase.LOADING: ("loading", "the model is being loaded"),
    Phase.DRAINING: ("shutting_down", "the server is shutting down"),
    Phase.DEAD: ("engine_dead", "the engine has failed, and the server is about to end"),
}


class ServerState:
    """One server. `serve` makes it ready once the model is loaded, and `drain` takes no more requests."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._model: ServedModel | None = None
        self._is_draining = False
        self.admission = Admission(options.max_waiting, max_running=1)
        self.changed = threading.Event()

    @property
    def phase(self) -> Phase:
        """Where the server stands at this moment."""
        if self._model is None:
            return Phase.LOADING
        if self._model.engine.is_dead:
            return Phase.DEAD
        return Phase.DRAINING if self._is_draining else Phase.READY

    @property
    def model(self) -> ServedModel:
        """The served model. Raises ApiError 503 while the server takes no requests."""
        phase = self.phase
        if phase is not Phase.READY or self._model is None:
            raise self.refusal(phase)
        return self._model

    def serve(self, model: ServedModel) -> None:
        """Take requests for `model` from now on."""
        self.admission.max_running = model.engine.config.max_batch_size
        self._model = model

    def drain(self) -> None:
        """Refuse new requests from now on. Those under way go on."""
        self._is_draining = True

    def refusal(self, phase: Phase) -> ApiError:
        """The 503 of a server that takes no requests."""
        return unavailable(*_REFUSALS[phase])


def state_of(request: Request) -> ServerState:
    """The state of the server that got a request."""
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state
