"""What a model computes on its way to an answer: the logits of every token, and every layer's hidden states.

Hidden states are kept at some rows, so that a request of a 7B model takes some 100 MB and not 2 GB: of the decoder
every token whose position is a multiple of KEPT_EVERY, the first, middle and last of a step's video tokens, and all
whose next token is wanted; of the vision tower ROWS_OF_A_FRAME evenly spread tokens of each frame. With several ranks,
rank 0 has all of the decoder's states (they are whole after each all-reduce) and those of the frames that it encodes.

A recording is one safetensors file, so that it can be made on one machine and compared on another.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from atb_pllava import LLM, ConfigError, RequestOutput, SamplingParams
from atb_pllava.files import write_bytes
from atb_pllava.model.pllava import Pllava

KEPT_EVERY = 37  # has no factor with block sizes, frame grids and pooled rows
ROWS_OF_A_FRAME = 16


@dataclass(frozen=True)
class Recording:
    """One request's answer and what led to it.

    logits [n, vocabulary] float32: one row a generated token; positions [R]: of the decoder's rows; frames: a digest
    of each frame's pixels; states: {stage: [R, hidden]} of the decoder, {stage: [frames, rows, hidden]} of the vision
    tower and the projector, float32, in the order of computation.
    """

    media: str | None
    prompt: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    prompt_tokens: int
    frame_indices: list[Any]
    text: str
    frames: list[str]
    positions: Tensor
    logits: Tensor
    states: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Write a whole file or none. Raises ConfigError when it cannot be written."""
        facts = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor | dict)}
        tensors = {"positions": self.positions, "logits": self.logits, **self.states}
        order = list(self.states)
        write_bytes(path, save(tensors, {"recording": json.dumps({**facts, "stages": order})}))

    @classmethod
    def load(cls, path: Path) -> "Recording":
        """Raises ConfigError for a file that is no recording."""
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads(file.metadata()["recording"])
                states = {stage: file.get_tensor(stage) for stage in facts.pop("stages")}
                return cls(**facts, positions=file.get_tensor("positions"), logits=file.get_tensor("logits"),
                           states=states)  # fmt: skip
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is no recording of precision.parity: {error}") from None


def record(llm: LLM, media: str | None, prompt: str, max_tokens: int, tokens: Sequence[int] | None = None) -> Recording:
    """Answer one question, greedily, or with `tokens` forced upon the model one by one whatever it would say."""
    request: dict[str, Any] = {"question": prompt} if media is None else {"question": prompt, "video": media}
    forced = tokens is not None
    params = SamplingParams(max_tokens=len(tokens) if tokens is not None else max_tokens, ignore_eos=forced)
    with _listening(llm.model, tokens) as heard:
        answer = llm.generate(request, params)[0]
    return heard.recording(answer, media, prompt)


class _Listener:
    """Keeps what passes by while one request runs, and answers with the forced tokens."""

    def __init__(self, tokens: Sequence[int] | None) -> None:
        self.tokens = tokens
        self.logits: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.frames: list[str] = []
        self.decoder: dict[str, list[Tensor]] = defaultdict(list)
        self.vision: dict[str, list[Tensor]] = defaultdict(list)
        self._rows = torch.empty(0, dtype=torch.int64)

    def begin_step(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        batch = inputs[0]
        kept = batch.positions % KEPT_EVERY == 0
        kept[batch.logits_indices] = True
        if batch.video_rows is not None:
            kept[batch.video_rows[[0, len(batch.video_rows) // 2, -1]]] = True
        self._rows = kept.nonzero()[:, 0]
        self.positions.append(batch.positions[self._rows].cpu())

    def end_step(self, _: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        """Hand the engine, in place of the logits, a row in which the forced token is the best."""
        if len(logits) == 0:
            return None
        self.logits.append(logits.float().cpu())
        if self.tokens is None:
            return None
        forced = torch.zeros_like(logits)
        forced[:, self.tokens[len(self.logits) - 1]] = 1.0
        return forced

    def begin_frames(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.frames += [hashlib.sha256(frame.float().cpu().numpy().tobytes()).hexdigest() for frame in inputs[0]]

    def keep_input(self, stage: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.keep(stage, _, inputs, inputs[0])

    def keep(self, stage: str, _: nn.Module, inputs: tuple[Any, ...], states: Any) -> None:
        """Hidden states [N, hidden] of the decoder or [frames, tokens, hidden] of the vision tower."""
        if isinstance(states, tuple):  # a decoder layer leaves the addition of its residual to the next one
            states = states[1] + states[0]
        if stage.startswith("decoder"):
            self.decoder[stage].append(states[self._rows].float().cpu())
        else:
            rows = torch.linspace(0, states.shape[1] - 1, min(ROWS_OF_A_FRAME, states.shape[1])).long()
            self.vision[stage].append(states[:, rows.to(states.device)].float().cpu())

    def recording(self, answer: RequestOutput, media: str | None, prompt: str) -> Recording:
        states = {stage: torch.cat(parts) for kept in (self.vision, self.decoder) for stage, parts in kept.items()}
        return Recording(
            media,
            prompt,
            answer.token_ids,
            answer.prompt_token_ids,
            answer.metrics.prompt_tokens,
            answer.frame_indices,
            answer.text,
            self.frames,
            torch.cat(self.positions),
            torch.cat(self.logits),
            states,
        )


@contextmanager
def _listening(model: Pllava, tokens: Sequence[int] | None) -> Iterator[_Listener]:
    """A listener that hears every part of the model."""
    heard = _Listener(tokens)
    decoder, vision = model.language.layers, model.vision.layers
    handles = [
        model.register_forward_pre_hook(heard.begin_step),
        model.register_forward_hook(heard.end_step),
        model.vision.register_forward_pre_hook(heard.begin_frames),
        vision[0].register_forward_pre_hook(partial(heard.keep_input, "vision patches")),
        model.projector.register_forward_hook(partial(heard.keep, "vision projector")),
        decoder[0].register_forward_pre_hook(partial(heard.keep_input, "decoder input")),
        *(
            layer.register_forward_hook(partial(heard.keep, f"{part} layer {i}"))
            for part, layers in (("vision", vision), ("decoder", decoder))
            for i, layer in enumerate(layers)
        ),
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
