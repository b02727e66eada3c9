"""Describes each piece of work of a step, with an estimate of the time left, for progress lines.

The engine calls `StepActivity` before and after each piece of work. The estimates use the times of earlier pieces.
"""

import time

from atb_pllava.engine.activity import ActivityLog
from atb_pllava.engine.scheduler import EncoderChunk, SchedulerOutput
from atb_pllava.errors import counted


class StepActivity:
    """Writes to `log`. The speeds are None until the first piece of work of their kind has ended."""

    def __init__(self, log: ActivityLog) -> None:
        self._log = log
        self._seconds_per_frame: float | None = None  # of the last video, including other work of its steps
        self._seconds_per_token: float | None = None  # of the last step with prompt tokens
        self._seconds_per_decode: float | None = None  # of the last step without prompt tokens

    def start_encoding(self, chunk: EncoderChunk, answers: int) -> None:
        """Note that the frames of `chunk` are encoded next, while `answers` requests decode."""
        now = time.monotonic()
        entry = chunk.entry
        if entry.encoding_since is None:
            entry.encoding_since = now
        encoded = entry.num_encoded_frames
        seconds_per_frame = (now - entry.encoding_since) / encoded if encoded else self._seconds_per_frame
        first = chunk.frames.start + 1
        last = chunk.frames.stop
        total = len(chunk.video)
        self._log.start(
            chunk.request.name,
            f"encoding {f'frame {last}' if last == first else f'frames {first} to {last}'} of {total}",
            None if seconds_per_frame is None else seconds_per_frame * (total - encoded),
            answers=answers,
        )

    def end_encoding(self, chunk: EncoderChunk) -> None:
        """After the last chunk of a video, remember the seconds a frame took."""
        if chunk.is_last and chunk.entry.encoding_since is not None:
            self._seconds_per_frame = (time.monotonic() - chunk.entry.encoding_since) / len(chunk.video)

    def start_forward(self, output: SchedulerOutput) -> None:
        """Note that a forward pass runs next, for the oldest prompt or, without prompts, for the oldest answer."""
        if output.prefill:
            self._start_prefill(output)
        else:
            self._start_decode(output)

    def end_forward(self, output: SchedulerOutput, seconds: float) -> None:
        """Remember the seconds that a token or a decode step took in a forward pass of `seconds`."""
        if output.prefill:
            self._seconds_per_token = seconds / output.num_prefill_tokens
        else:
            self._seconds_per_decode = seconds

    def _start_prefill(self, output: SchedulerOutput) -> None:
        request, _ = output.prefill[0]
        per_token = self._seconds_per_token
        self._log.start(
            request.name,
            f"prefilling the prompt, {request.num_computed_tokens} of {counted(len(request.token_ids), 'token')} done",
            None if per_token is None else per_token * request.num_uncomputed_tokens,
            answers=len(output.decode),
        )

    def _start_decode(self, output: SchedulerOutput) -> None:
        request = output.decode[0]
        per_token = self._seconds_per_decode
        tokens_left = request.params.max_tokens - request.num_generated
        self._log.start(
            request.name,
            f"token {request.num_generated + 1} of at most {request.params.max_tokens}",
            None if per_token is None else per_token * tokens_left,
            how_sure="at most",
            answers=len(output.decode),
        )
