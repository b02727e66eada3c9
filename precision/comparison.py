"""Measures of the agreement of two answers to the same question.

Two recordings are compared token by token: the right side is given the left side's tokens, so every step of both has
the same text before it. The first difference is the first token at which the right side prefers another one. Two rows
of `run --output_json` were generated freely, so they are compared up to their first difference only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from atb_pllava import ConfigError
from precision.recording import Recording

NOISE = 1e-3  # relative error of one layer from rounding to 16 bits
NOT_COMPARABLE = ("prompt_token_ids", "prompt_tokens", "frame_indices")


@dataclass(frozen=True)
class Agreement:
    """The agreement of two sides on one request. A number that cannot be computed is None.

    tokens: positions compared. first_difference: number of the first token that differs, None for equal answers.
    top1: share of positions at which both sides prefer the same token. max_error, mean_error: absolute differences of
    logits, or of log-probabilities for rows of files. kl: mean KL(left || right) over the positions, in nats.
    vision, decoder: {stage: relative error of its hidden states}.
    """

    media: str | None
    prompt: str
    tokens: int
    first_difference: int | None
    top1: float
    max_error: float | None = None
    mean_error: float | None = None
    kl: float | None = None
    vision: dict[str, float] = field(default_factory=dict)
    decoder: dict[str, float] = field(default_factory=dict)


def compare_recordings(left: Recording, right: Recording) -> Agreement:
    """The agreement of two recordings. The right one was made with the left one's tokens.

    Raises ConfigError when the prompt ids, prompt lengths or frames differ, or the shapes of the logits.
    """
    for name in NOT_COMPARABLE:
        if getattr(left, name) != getattr(right, name):
            raise ConfigError(f"the sides' {name} differ; they must share tokenizer, conversation, sampler and pooling")
    if left.logits.shape != right.logits.shape:
        raise ConfigError(f"the sides' logits are {[*left.logits.shape]} and {[*right.logits.shape]}")
    preferred = right.logits.argmax(1)
    same = preferred == torch.tensor(left.token_ids)
    errors = (right.logits - left.logits).abs()
    p = left.logits.double().log_softmax(1)
    q = right.logits.double().log_softmax(1)
    ours, theirs = _shared(left.positions.tolist(), right.positions.tolist())
    our_frames, their_frames = _shared(left.frames, right.frames)
    return Agreement(
        media=left.media,
        prompt=left.prompt,
        tokens=len(same),
        first_difference=None if bool(same.all()) else int((~same).nonzero()[0]),
        top1=float(same.float().mean()),
        max_error=float(errors.max()),
        mean_error=float(errors.mean()),
        kl=float((p.exp() * (p - q)).sum(1).mean().clamp(min=0)),
        vision=_stage_errors(left.vision, right.vision, our_frames, their_frames),
        decoder=_stage_errors(left.decoder, right.decoder, ours, theirs),
    )


def _stage_errors(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], ours: list[int], theirs: list[int]
) -> dict[str, float]:
    """Mean of |right - left| / |left| over rows `ours` of the left and `theirs` of the right hidden states.

    The norm is taken for each token, so that all tokens count alike. A few of LLaMA's hidden states (of the first
    token) are a thousand times as long as the others. Empty when the sides share no row.
    """
    errors = {}
    for stage, states in left.items() if ours else ():
        if stage in right:
            one = states[ours].double()
            other = right[stage][theirs].double()
            errors[stage] = float(((other - one).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-30)).mean())
    return errors


def _shared(left: Sequence[Any], right: Sequence[Any]) -> tuple[list[int], list[int]]:
    """The indices in `left` and in `right` of the items that both have."""
    place = {item: i for i, item in enumerate(right)}
    pairs = [(i, place[item]) for i, item in enumerate(left) if item in place]
    return [i for i, _ in pairs], [i for _, i in pairs]


def compare_rows(left: Mapping[str, Any], right: Mapping[str, Any]) -> Agreement:
    """The agreement of two rows of `run --output_json`. Errors and KL need `--logprobs` on both sides."""
    for name in ("prompt_token_ids", "frame_indices"):
        if left[name] != right[name]:
            raise ConfigError(
                f"{left['media']}: {name} differ; the runs must share tokenizer, conversation and sampler"
            )
    ours = left["token_ids"]
    theirs = right["token_ids"]
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if first is None and len(ours) != len(theirs):
        first = min(len(ours), len(theirs))  # one answer ends where the other goes on
    tokens = max(len(ours), len(theirs)) if first is None else first + 1
    errors = _logprob_errors(left.get("logprobs"), right.get("logprobs"), tokens)
    return Agreement(
        media=left["media"],
        prompt=left["prompt"],
        tokens=tokens,
        first_difference=first,
        top1=(tokens if first is None else first) / tokens,
        **errors,
    )


def _logprob_errors(left: Any, right: Any, tokens: int) -> dict[str, Any]:
    """Errors over the tokens that both sides list at a position. Empty when a side has no log-probabilities.

    All tokens that are not listed count as one further token. Merging makes KL smaller, so `kl` is a lower bound.
    """
    if left is None or right is None:
        return {}
    errors: list[float] = []
    kls: list[float] = []
    for ours, theirs in zip(left[:tokens], right[:tokens], strict=False):
        named = sorted(ours.keys() & theirs.keys())
        p, q = (torch.tensor([side[token] for token in named], dtype=torch.float64) for side in (ours, theirs))
        errors += (p - q).abs().tolist()
        kls.append(_divergence(p.exp(), q.exp()))
    return {"max_error": max(errors), "mean_error": _mean(errors), "kl": _mean(kls)} if errors else {}


def _divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats. In p and in q, the probability missing to a sum of 1 is one further outcome."""
    p, q = (torch.cat((x, (1 - x.sum()).clamp(min=0)[None])) for x in (p, q))
    return max(0.0, float(torch.where(p > 0, p * (p / q.clamp(min=1e-30)).log(), 0.0).sum()))


@dataclass(frozen=True)
class Total:
    """All requests of one side. Means are over tokens. Errors of stages are means over requests."""

    requests: int
    failed: int
    same: int
    tokens: int
    top1: float
    max_error: float | None
    mean_error: float | None
    kl: float | None
    vision: dict[str, float]
    decoder: dict[str, float]

    @classmethod
    def of(cls, agreements: Sequence[Agreement], failed: int = 0) -> "Total":
        """The total of some agreements and of `failed` further requests without one."""
        tokens = sum(a.tokens for a in agreements)
        measured = [a for a in agreements if a.max_error is not None]

        def mean(name: str, among: Sequence[Agreement]) -> float | None:
            weight = sum(a.tokens for a in among)
            return sum(getattr(a, name) * a.tokens for a in among) / weight if weight else None

        return cls(
            requests=len(agreements) + failed,
            failed=failed,
            same=sum(a.first_difference is None for a in agreements),
            tokens=tokens,
            top1=mean("top1", agreements) or 0.0,
            max_error=max((a.max_error for a in measured if a.max_error is not None), default=None),
            mean_error=mean("mean_error", measured),
            kl=mean("kl", measured),
            vision=_mean_by_stage([a.vision for a in agreements]),
            decoder=_mean_by_stage([a.decoder for a in agreements]),
        )

    @property
    def jump(self) -> tuple[str, float, float] | None:
        """The stage where the error jumps, the largest error before it, and the error there. None without stages.

        The jump is the largest error[i] / max(error[:i], NOISE). The first error that is not finite wins.
        """
        rises: list[tuple[float, str, float, float]] = []
        before = 0.0
        for stage, error in {**self.vision, **self.decoder}.items():
            if not isfinite(error):
                return stage, before, error
            rises.append((error / max(before, NOISE), stage, before, error))
            before = max(before, error)
        return max(rises)[1:] if rises else None


def _mean_by_stage(errors: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean error of each stage over the requests that have it."""
    stages = dict.fromkeys(stage for of_request in errors for stage in of_request)
    return {stage: _mean([of_request[stage] for of_request in errors if stage in of_request]) for stage in stages}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
