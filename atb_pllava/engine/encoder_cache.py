"""Videos by what is seen in them: encoded once for all requests that ask at the same time, remembered for later ones.

A cache belongs to one model, so weights, pooling and dtype are the same for all of its entries.
"""

from collections.abc import Callable
from itertools import count

from atb_pllava.engine.request import VideoState
from atb_pllava.multimodal.processor import PreparedVideo


class VideoCache:
    """At most `room` encoded videos are kept that nobody uses; the least recently used are forgotten first."""

    def __init__(self, room: int, forget: Callable[[int], None]) -> None:
        self.room, self._forget = room, forget
        self._states: dict[bytes, VideoState] = {}  # least recently released first
        self._numbers = count()

    def acquire(self, video: PreparedVideo) -> VideoState:
        """The state of a video with these pixels, new or shared. Every `acquire` needs its `release`."""
        state = self._states.get(video.digest)
        if state is None:
            state = self._states[video.digest] = VideoState(next(self._numbers), video.digest, video)
        state.users += 1
        return state

    def release(self, state: VideoState) -> None:
        """One user less; the last one leaves the tokens, if they are there, to those who ask later."""
        state.users -= 1
        if state.users:
            return
        del self._states[state.digest]
        if not state.ready:
            self._forget(state.number)
            return
        self._states[state.digest] = state
        idle = [other for other in self._states.values() if not other.users]
        for oldest in idle[: max(0, len(idle) - self.room)]:
            del self._states[oldest.digest]
            self._forget(oldest.number)
