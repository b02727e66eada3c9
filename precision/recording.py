"""A recording of one request: the logits of every generated token, and the hidden states of every layer.

Hidden states are kept for some rows only, so that a request of a 7B model takes about 100 MB instead of 2 GB. The kept
rows of the decoder are positions that are multiples of KEPT_EVERY, the first, middle and last video token of a step,
and rows whose logits are computed. The kept rows of the vision tower are ROWS_OF_A_FRAME evenly spread tokens of each
frame. With several ranks, rank 0 keeps the decoder's states, which are whole after each all-reduce. Of the vision tower
rank 0 keeps only the frames that rank 0 encodes.

A recording is one safetensors file. A recording can be made on one machine and compared on another.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from atb_pllava import LLM, ConfigError, RequestOutput, SamplingParams
from atb_pllava.files import write_bytes
from atb_pllava.model.pllava import Pllava

KEPT_EVERY = 37  # has no common factor with block sizes, frame grids and pooled rows
ROWS_OF_A_FRAME = 16


@dataclass(frozen=True)
class Recording:
    """The answer to one request, with the numbers that led to it.

    logits: float32 [n, vocabulary], a row for each generated token. frames: a digest of each frame's pixels.
    positions: [R], the positions of the decoder's kept rows. vision and decoder: hidden states by stage, in the order
    of computation, as float32 [frames, rows, hidden] and [R, hidden]. The projector belongs to `vision`.
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
    vision: dict[str, Tensor]
    decoder: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Write a file, whole or not at all. Raises ConfigError when it cannot be written."""
        facts = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor | dict)}
        tensors = {"positions": self.positions, "logits": self.logits, **self.vision, **self.decoder}
        # safetensors sorts its tensors by name, so the order of the stages is kept in the metadata.
        stages = {"vision": list(self.vision), "decoder": list(self.decoder)}
        write_bytes(path, save(tensors, {"recording": json.dumps({**facts, "stages": stages})}))

    @classmethod
    def load(cls, path: Path) -> "Recording":
        """Read a file. Raises ConfigError for a file that is no recording."""
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads(file.metadata()["recording"])
                stages = facts.pop("stages")
                return cls(
                    **facts,
                    positions=file.get_tensor("positions"),
                    logits=file.get_tensor("logits"),
                    vision={stage: file.get_tensor(stage) for stage in stages["vision"]},
                    decoder={stage: file.get_tensor(stage) for stage in stages["decoder"]},
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is no recording of precision.parity: {error}") from None


def record(llm: LLM, media: str | None, prompt: str, max_tokens: int, tokens: Sequence[int] | None = None) -> Recording:
    """Answer one question and record it.

    The answer is greedy. With `tokens`, the model is given these tokens one by one, whatever it prefers.
    """
    request: dict[str, Any] = {"question": prompt} if media is None else {"question": prompt, "video": media}
    length = max_tokens if tokens is None else len(tokens)
    params = SamplingParams(max_tokens=length, ignore_eos=tokens is not None)
    with _recorder(llm.model, tokens) as recorder:
        answer = llm.generate(request, params)[0]
    return recorder.recording(answer, media, prompt)


class _Recorder:
    """Forward hooks that keep logits and hidden states while one request runs, and force tokens upon the model."""

    def __init__(self, tokens: Sequence[int] | None) -> None:
        self.tokens = tokens
        self.logits: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.frames: list[str] = []
        self.vision: dict[str, list[Tensor]] = defaultdict(list)
        self.decoder: dict[str, list[Tensor]] = defaultdict(list)
        self._rows = torch.empty(0, dtype=torch.int64)  # rows of this step that are kept

    def begin_step(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Choose the decoder rows of this step that are kept."""
        batch = inputs[0]
        kept = batch.positions % KEPT_EVERY == 0
        kept[batch.logits_indices] = True
        if batch.video_positions is not None:
            kept[batch.video_positions[[0, len(batch.video_positions) // 2, -1]]] = True
        self._rows = kept.nonzero()[:, 0]
        self.positions.append(batch.positions[self._rows].cpu())

    def end_step(self, _: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        """Keep the logits. With forced tokens, return logits whose largest value is at the next forced token."""
        if len(logits) == 0:
            return None
        self.logits.append(logits.float().cpu())
        if self.tokens is None:
            return None
        forced = torch.zeros_like(logits)
        forced[:, self.tokens[len(self.logits) - 1]] = 1.0
        return forced

    def begin_frames(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Keep a digest of each frame's pixels."""
        self.frames += [hashlib.sha256(frame.float().cpu().numpy().tobytes()).hexdigest() for frame in inputs[0]]

    def keep_vision(self, stage: str, states: Tensor) -> None:
        """Keep some rows of hidden states [frames, tokens, hidden]."""
        rows = torch.linspace(0, states.shape[1] - 1, min(ROWS_OF_A_FRAME, states.shape[1])).long()
        self.vision[stage].append(states[:, rows.to(states.device)].float().cpu())

    def keep_decoder(self, stage: str, states: Tensor) -> None:
        """Keep the chosen rows of hidden states [N, hidden]."""
        self.decoder[stage].append(states[self._rows].float().cpu())

    def recording(self, answer: RequestOutput, media: str | None, prompt: str) -> Recording:
        """All that was kept, as one recording."""
        return Recording(
            media=media,
            prompt=prompt,
            token_ids=answer.token_ids,
            prompt_token_ids=answer.prompt_token_ids,
            prompt_tokens=answer.metrics.prompt_tokens,
            frame_indices=answer.frame_indices,
            text=answer.text,
            frames=self.frames,
            positions=torch.cat(self.positions),
            logits=torch.cat(self.logits),
            vision={stage: torch.cat(parts) for stage, parts in self.vision.items()},
            decoder={stage: torch.cat(parts) for stage, parts in self.decoder.items()},
        )


Keep = Callable[[str, Tensor], None]


@contextmanager
def _recorder(model: Pllava, tokens: Sequence[int] | None) -> Iterator[_Recorder]:
    """A recorder with forward hooks on every part of the model. The hooks are removed when the body ends."""
    recorder = _Recorder(tokens)
    vision = model.vision.layers
    decoder = model.language.layers
    handles = [
        model.register_forward_pre_hook(recorder.begin_step),
        model.register_forward_hook(recorder.end_step),
        model.vision.register_forward_pre_hook(recorder.begin_frames),
        _keep_input(vision[0], recorder.keep_vision, "vision patches"),
        *(_keep_output(layer, recorder.keep_vision, f"vision layer {i}") for i, layer in enumerate(vision)),
        _keep_output(model.projector, recorder.keep_vision, "vision projector"),
        _keep_input(decoder[0], recorder.keep_decoder, "decoder input"),
        *(_keep_output(layer, recorder.keep_decoder, f"decoder layer {i}") for i, layer in enumerate(decoder)),
    ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _keep_input(module: nn.Module, keep: Keep, stage: str) -> RemovableHandle:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        keep(stage, inputs[0])

    return module.register_forward_pre_hook(hook)


def _keep_output(module: nn.Module, keep: Keep, stage: str) -> RemovableHandle:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        # A decoder layer returns (output, residual) and leaves their sum to the next layer's norm.
        keep(stage, output if isinstance(output, Tensor) else output[1] + output[0])

    return module.register_forward_hook(hook)
