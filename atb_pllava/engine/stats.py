"""Counters of the engine's work, and the snapshot of the engine's state that `AsyncEngine.stats` returns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepStats:
    """The work and the times of one step.

    began: a moment of time.perf_counter. decoding: sequences that decoded one token. prefilled: prompt tokens. encoded:
    frames. sampled: new tokens. encode: seconds in the vision tower. forward: seconds in the decoder. total: seconds of
    the whole step.
    """

    began: float
    decoding: int
    prefilled: int
    encoded: int
    sampled: int
    encode: float
    forward: float
    total: float


@dataclass
class CoreCounters:
    """Totals since the engine started. The engine's thread writes them, and any thread may read them.

    prompt_tokens counts the prompts of ended requests, cached_tokens those whose keys and values were in the KV cache.
    encoder_queries counts the videos of requests, encoder_hits those whose embeddings were in the encoder cache.
    corrupted_requests counts requests that failed because their logits were not finite. The seconds are those of
    StepStats.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    encoded_frames: int = 0
    encoder_queries: int = 0
    encoder_hits: int = 0
    preemptions: int = 0
    corrupted_requests: int = 0
    encode_seconds: float = 0.0
    forward_seconds: float = 0.0
    step_seconds: float = 0.0

    def add(self, step: StepStats) -> None:
        """Count one step."""
        self.steps += 1
        self.prefilled_tokens += step.prefilled
        self.generated_tokens += step.sampled
        self.encoded_frames += step.encoded
        self.encode_seconds += step.encode
        self.forward_seconds += step.forward
        self.step_seconds += step.total


@dataclass(frozen=True)
class EngineStats:
    """The engine's state at one moment, and its totals since the start.

    reading: requests whose media are read or wait for a reader. waiting: requests in the queue. running: sequences in
    the batch. kv_blocks_used: blocks that running sequences hold, of kv_blocks_total. finished and failed count
    requests. media_seconds: time without work while media were read. idle_seconds: time without any request. The time
    in steps is core.step_seconds.
    """

    reading: int
    waiting: int
    running: int
    kv_blocks_used: int
    kv_blocks_total: int
    finished: int
    failed: int
    media_seconds: float
    idle_seconds: float
    core: CoreCounters
