"""What changes the model's logits before a token is drawn: repetition penalty, temperature, top-k and top-p.

Shapes: `L` rows, one a sequence, `V` tokens of the vocabulary. All functions work row by row on the logits' device.
None of them makes the host wait. A row that is not finite gives a meaningless result and no error. Numbers stay in
float32, which every backend has. The relative error of a weight above 1e-12 is below 1e-5.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# (shift, width) of the three digits of a float32's bits without the sign, highest first.
_DIGITS = ((20, 11), (10, 10), (0, 10))
# A weight of 1 in fixed point. The weights of 2**22 tokens still fit int64.
_UNIT = 2.0**40


def penalise(scores: Tensor, seen: Sequence[np.ndarray], penalties: Sequence[float]) -> Tensor:
    """Divide the positive and multiply the negative scores [L, V] of tokens that their row has seen.

    seen: the distinct token ids of each row, int64. penalties: one number a row. 1 leaves the row as it is. The formula
    is that of CTRL (arXiv 1909.05858), as in transformers' RepetitionPenaltyLogitsProcessor. One tensor is copied to
    the device. `scores` stays as it is.
    """
    rows = [row for row, penalty in enumerate(penalties) if penalty != 1.0]
    if not rows:
        return scores
    positions = np.concatenate([seen[row] + row * scores.shape[1] for row in rows])
    repeated = np.repeat(np.array([penalties[row] for row in rows], np.float32), [len(seen[row]) for row in rows])
    # The penalties' bits travel beside the positions, so that one copy suffices.
    both = torch.from_numpy(np.stack([positions, repeated.view(np.int32)])).to(scores.device, non_blocking=True)
    penalty = both[1].int().view(torch.float32)
    flat = scores.flatten()
    old = flat.index_select(0, both[0])
    return flat.index_copy(0, both[0], torch.where(old > 0, old / penalty, old * penalty)).view_as(scores)


def weights_of(scores: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities of scores [L, V] at a temperature [L, 1] above 0, divided by the largest one of the row.

    The largest weight is 1. No temperature overflows: exponents are at most 0, and exp(-inf) is 0.
    """
    return (scores - scores.amax(1, keepdim=True)).div_(temperature).exp_()


def keep_top_k(weights: Tensor, scores: Tensor, top_k: Tensor, largest: int) -> Tensor:
    """Set the weights [L, V] of all but the top_k [L, 1] largest scores to 0. Ties at the last place stay.

    largest: the largest value in `top_k`, at most V.
    """
    last = scores.topk(largest, dim=1).values.gather(1, top_k.long() - 1)
    return torch.where(scores >= last, weights, 0.0)


def keep_top_p(weights: Tensor, top_p: Tensor) -> Tensor:
    """Set the weights [L, V] of the improbable tokens to 0. Weights are from 0 to 1, top_p is [L, 1].

    A token stays if all more probable tokens together have less than top_p of the mass. Tokens of equal weight stay or
    go together. The smallest weight that stays is found by radix selection, digit by digit of its bits: floats above 0
    are ordered as their bits. On a CPU that takes a fifth to a third of the time of torch.sort. The masses are
    integers, so their sums are exact in any order.
    """
    bits = weights.view(torch.int32)
    mass = (weights * _UNIT).long()
    missing = (top_p * mass.sum(1, keepdim=True)).long().clamp(min=1)  # the likeliest token stays for any top_p
    smallest = torch.zeros_like(missing)
    for shift, width in _DIGITS:
        digit = (bits >> shift).bitwise_and_((1 << width) - 1).long()
        histogram = mass.new_zeros(len(mass), 1 << width).scatter_add_(1, digit, mass)
        from_largest = histogram.flip(1)
        above = from_largest.cumsum(1) - from_largest
        passed = ((above < missing).sum(1, keepdim=True) - 1).clamp(min=0)
        missing = missing - above.gather(1, passed)
        chosen = (1 << width) - 1 - passed
        mass.mul_(digit == chosen)  # the next digit is sought among the tokens with this one
        smallest = (smallest << width) + chosen
    return torch.where(weights >= smallest.int().view(torch.float32), weights, 0.0)
