"""The oracle of beam search: transformers' own `generate`."""

from collections.abc import Sequence
from typing import Any

import torch

from atb_pllava.engine.beam_search import Hypothesis


@torch.no_grad()
def transformers_hypotheses(
    model: Any, num_beams: int, max_tokens: int, eos: Sequence[int], **inputs: Any
) -> list[Hypothesis]:
    """All hypotheses of transformers' beam search, best first. `inputs`: the prompt and more options of `generate`."""
    out = model.generate(
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=max_tokens,
        do_sample=False,
        length_penalty=1.0,
        early_stopping=False,
        eos_token_id=list(eos) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **inputs,
    )
    before = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    scores = out.sequences_scores.tolist()
    return [hypothesis(row[before:], score, eos) for row, score in zip(out.sequences.tolist(), scores, strict=True)]


def hypothesis(padded: list[int], score: float, eos: Sequence[int]) -> Hypothesis:
    """A hypothesis from a row of transformers' result, which has padding after the end-of-sequence token."""
    stop = next((i for i, token in enumerate(padded) if token in eos), None)
    return Hypothesis(padded if stop is None else padded[: stop + 1], score, stop is not None)
