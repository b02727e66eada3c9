"""ServerState: what the handlers of all requests share, and whether the server takes requests."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from starlette.requests import Request

from atb_pllava.engine.async_engine import AsyncEngine
from atb_pllava.errors import BackendError, PllavaError
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.server.admission import Admission
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.auth import ApiKeys
from atb_pllava.server.errors import api_error_of, unavailable
from atb_pllava.server.media_sources import MediaSources
from atb_pllava.server.metrics import ServerMetrics
from atb_pllava.server.options import ServerOptions
from atb_pllava.server.served_model import ServedModel
from atb_pllava.server.video_registration import VideoRegistration
from atb_pllava.server.video_store import VideoStore


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
    """One server. `api_keys` None asks for no key. `limits` bound media, as in the model's processor.

    `serve` makes it ready once the model is loaded. `drain` makes it refuse new requests.
    """

    def __init__(
        self,
        model_name: str,
        options: ServerOptions,
        api_keys: ApiKeys | None = None,
        limits: MediaLimits | None = None,
    ) -> None:
        self.model_name = model_name
        self.options = options
        self.api_keys = api_keys
        limits = limits or MediaLimits()
        self.media_sources = MediaSources(limits, options.allowed_media_domains, options.allowed_local_media_path)
        self.video_store = VideoStore(options.max_videos_mib * 2**20, options.video_ttl)
        self._model: ServedModel | None = None
        self._is_draining = False
        self.metrics = ServerMetrics(model_name, self.video_store)
        self.videos = VideoRegistration(
            self.video_store,
            lambda: self.model.engine.request_parser.processor,
            self.media_sources,
            self.metrics,
            limits,
            options.max_frames,
        )
        self.admission = Admission(options.max_waiting, self.metrics.count_admission_rejection)

    @property
    def phase(self) -> Phase:
        """Where the server stands at this moment."""
        if self._model is None:
            return Phase.LOADING
        if self._is_draining:
            return Phase.DRAINING
        return Phase.DEAD if self.has_failed else Phase.READY

    @property
    def has_failed(self) -> bool:
        """Whether the engine is dead."""
        return self._model is not None and self._model.engine.is_dead

    @property
    def model(self) -> ServedModel:
        """The served model. Raises ApiError 503 while the server takes no requests."""
        phase = self.phase
        if phase is not Phase.READY or self._model is None:
            raise self.refusal(phase)
        return self._model

    def serve(self, engine: AsyncEngine, settings: Mapping[str, Any] | None = None) -> None:
        """Take requests for the engine's model from now on. `settings` decide its answers, for /v1/models."""
        self.admission.max_running = engine.config.max_batch_size
        self.metrics.watch(engine)
        self._model = ServedModel(self.model_name, engine, settings)

    def drain(self) -> None:
        """Refuse new requests from now on. Those under way go on."""
        self._is_draining = True

    def close(self) -> None:
        """End the reading and fetching of media. Call it when no request is under way."""
        self.videos.close()
        self.media_sources.close()

    def refusal(self, phase: Phase) -> ApiError:
        """The 503 of a server that takes no requests."""
        return unavailable(*_REFUSALS[phase])

    def refusal_of(self, error: PllavaError, request_id: str) -> ApiError:
        """The refusal for an error of this package. An engine that ends fails its requests, which is no bug."""
        phase = self.phase
        if phase is not Phase.READY and isinstance(error, BackendError):
            return self.refusal(phase)
        return api_error_of(error, request_id)


def state_of(request: Request) -> ServerState:
    """The state of the server that got a request."""
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state
