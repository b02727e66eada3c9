"""Numbers that say how far two answers to the same question agree.

Two recordings are compared token by token along the left one's answer, so every step is made from the same text and the
first difference of free answers is where the right side first prefers another token. Two rows of `run --output_json`
were generated freely: they are compared up to their first difference and no further.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from atb_pllava import ConfigError
from precision.recording import Recording

NOISE = 1e-3  # a relative error that rounding to 16 bits makes in one layer
NOT_COMPARABLE = ("prompt_token_ids", "prompt_tokens", "frame_indices")


@dataclass(frozen=True)
class Agreement:
    """One request. Numbers that the two sides do not give are None.

    tokens: positions that were compared; first_difference: number of the first token that differs, None for equal
    answers; top1: share of positions at which both prefer the same token; max_error, mean_error: absolute differences
    of logits (of log-probabilities, for rows of files); kl: mean of KL(left || right) over the positions, in nats;
    stages: {stage: relative error of its hidden states}.
    """

    media: str | None
    prompt: str
    tokens: int
    first_difference: int | None
    top1: float
    max_error: float | None = None
    mean_error: float | None = None
    kl: float | None = None
    stages: dict[str, float] = field(default_factory=dict)


def compare_recordings(left: Recording, right: Recording) -> Agreement:
    """The agreement of two recordings, the right one made with the left one's tokens forced upon it.

    Raises ConfigError when they do not answer the same thing: other prompt ids, prompt lengths or frames.
    """
    for name in NOT_COMPARABLE:
        if getattr(left, name) != getattr(right, name):
            raise ConfigError(f"the sides' {name} differ; they must share tokenizer, conversation, sampler and pooling")
    if left.logits.shape != right.logits.shape:
        raise ConfigError(f"the sides' logits are {[*left.logits.shape]} and {[*right.logits.shape]}")
    preferred = right.logits.argmax(1)
    same = preferred == torch.tensor(left.token_ids)
    errors = (right.logits - left.logits).abs()
    p, q = left.logits.double().log_softmax(1), right.logits.double().log_softmax(1)
    return Agreement(
        media=left.media, prompt=left.prompt, tokens=len(same),
        first_difference=None if bool(same.all()) else int((~same).nonzero()[0]),
        top1=float(same.float().mean()), max_error=float(errors.max()), mean_error=float(errors.mean()),
        kl=float((p.exp() * (p - q)).sum(1).mean().clamp(min=0)), stages=_stage_errors(left, right))  # fmt: skip


def _stage_errors(left: Recording, right: Recording) -> dict[str, float]:
    """Mean over the rows that both have of |right - left| / |left|, lengths of hidden states: rows count alike, though
    a few of LLaMA's (the first token's) are a thousand times as long as the others."""
    errors = {}
    for stage, states in left.states.items():
        if stage.startswith("vision"):
            ours, theirs = _shared(left.frames, right.frames)
        else:
            ours, theirs = _shared(left.positions.tolist(), right.positions.tolist())
        if ours and stage in right.states:
            one, other = states[ours].double(), right.states[stage][theirs].double()
            errors[stage] = float(((other - one).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-30)).mean())
    return errors


def _shared(left: Sequence[Any], right: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Where the items that both hold stand in each."""
    place = {item: i for i, item in enumerate(right)}
    pairs = [(i, place[item]) for i, item in enumerate(left) if item in place]
    return [i for i, _ in pairs], [i for _, i in pairs]


def compare_rows(left: Mapping[str, Any], right: Mapping[str, Any]) -> Agreement:
    """The agreement of two rows of `run --output_json`, log-probabilities where both have them (`--logprobs`)."""
    for name in ("prompt_token_ids", "frame_indices"):
        if left[name] != right[name]:
            raise ConfigError(
                f"{left['media']}: {name} differ; the runs must share tokenizer, conversation and sampler"
            )
    ours, theirs = left["token_ids"], right["token_ids"]
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if first is None and len(ours) != len(theirs):
        first = min(len(ours), len(theirs))  # one goes on where the other ends
    tokens = max(len(ours), len(theirs)) if first is None else first + 1
    return Agreement(
        media=left["media"], prompt=left["prompt"], tokens=tokens, first_difference=first,
        top1=(tokens if first is None else first) / tokens,
        **_logprob_errors(left.get("logprobs"), right.get("logprobs"), tokens))  # fmt: skip


def _logprob_errors(left: Any, right: Any, tokens: int) -> dict[str, Any]:
    """Of the tokens that both sides name at a position. What they do not name counts as one further token, which can
    only make the divergence smaller: `kl` is a lower bound then."""
    if left is None or right is None:
        return {}
    errors, kls = [], []
    for ours, theirs in zip(left[:tokens], right[:tokens], strict=False):
        named = sorted(ours.keys() & theirs.keys())
        p, q = (torch.tensor([side[token] for token in named], dtype=torch.float64) for side in (ours, theirs))
        errors += (p - q).abs().tolist()
        kls.append(_divergence(p.exp(), q.exp()))
    return {"max_error": max(errors), "mean_error": _mean(errors), "kl": _mean(kls)} if errors else {}


def _divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats of probabilities that may not add up to 1; the rest of each is one further outcome."""
    p, q = (torch.cat((x, (1 - x.sum()).clamp(min=0)[None])) for x in (p, q))
    return max(0.0, float(torch.where(p > 0, p * (p / q.clamp(min=1e-30)).log(), 0.0).sum()))


@dataclass(frozen=True)
class Total:
    """All requests of one side together. Means are over tokens; stages over requests."""

    requests: int
    failed: int
    same: int
    tokens: int
    top1: float
    max_error: float | None
    mean_error: float | None
    kl: float | None
    stages: dict[str, float]

    @classmethod
    def of(cls, agreements: Sequence[Agreement], failed: int = 0) -> "Total":
        tokens = sum(a.tokens for a in agreements)
        measured = [a for a in agreements if a.max_error is not None]

        def mean(name: str, among: Sequence[Agreement]) -> float | None:
            weight = sum(a.tokens for a in among)
            return sum(getattr(a, name) * a.tokens for a in among) / weight if weight else None

        stages = dict.fromkeys(stage for a in agreements for stage in a.stages)
        return cls(
            requests=len(agreements) + failed,
            failed=failed,
            same=sum(a.first_difference is None for a in agreements),
            tokens=tokens,
            top1=mean("top1", agreements) or 0.0,
            max_error=max((a.max_error for a in measured if a.max_error is not None), default=None),
            mean_error=mean("mean_error", measured),
            kl=mean("kl", measured),
            stages={stage: _mean([a.stages[stage] for a in agreements if stage in a.stages]) for stage in stages},
        )

    @property
    def jump(self) -> tuple[str, float, float] | None:
        """The stage at which the error multiplies most, with the largest error before it and the error there; the first
        one that is not finite, if any. Errors under NOISE count as NOISE. None without hidden states."""
        rises, before = [], 0.0
        for stage, error in self.stages.items():
            if not isfinite(error):
                return stage, before, error
            rises.append((error / max(before, NOISE), stage, before, error))
            before = max(before, error)
        return max(rises)[1:] if rises else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
