"""Videos by what is seen in them: encoded once for all requests that ask at the same time, remembered for later ones.

A cache belongs to one model, so weights, pooling and dtype are the same for all of its entries.
"""

from collections.abc import Callable
from itertools import count

from atb_pllava.engine.request import EncoderEntry
from atb_pllava.multimodal.processor import ProcessedVideo


class EncoderCache:
    """At most `room` encoded videos are kept that nobody uses; the least recently used are forgotten first."""

    def __init__(self, room: int, forget: Callable[[int], None]) -> None:
        self.room, self._forget = room, forget
        self._states: dict[bytes, EncoderEntry] = {}  # least recently released first
        self._numbers = count()

    def acquire(self, video: ProcessedVideo) -> EncoderEntry:
        """The state of a video with these pixels, new or shared. Every `acquire` needs its `release`."""
        state = self._states.get(video.mm_hash)
        if state is None:
            state = self._states[video.mm_hash] = EncoderEntry(next(self._numbers), video.mm_hash, video)
        state.ref_count += 1
        return state

    def release(self, state: EncoderEntry) -> None:
        """One user less; the last one leaves the tokens, if they are there, to those who ask later."""
        state.ref_count -= 1
        if state.ref_count:
            return
        del self._states[state.mm_hash]
        if not state.ready:
            self._forget(state.video_id)
            return
        self._states[state.mm_hash] = state
        idle = [other for other in self._states.values() if not other.ref_count]
        for oldest in idle[: max(0, len(idle) - self.room)]:
            del self._states[oldest.mm_hash]
            self._forget(oldest.video_id)
