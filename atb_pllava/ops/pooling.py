"""Adaptive average pooling as matrix products, for shapes that do not divide evenly."""

from collections.abc import Sequence
from math import ceil, floor

import torch
from torch import Tensor


def pooling_matrix(size: int, pooled: int) -> Tensor:
    """Averaging matrix [pooled, size] of adaptive average pooling along one axis, float32.

    Output i averages inputs floor(i * size / pooled) up to ceil((i + 1) * size / pooled), as torch's
    AdaptiveAvgPool3d does. If there are more outputs than inputs, inputs repeat.
    """
    matrix = torch.zeros(pooled, size)
    for i in range(pooled):
        first = floor(i * size / pooled)
        last = ceil((i + 1) * size / pooled)
        matrix[i, first:last] = 1.0 / (last - first)
    return matrix


def pool_by_matrices(grid: Tensor, shape: Sequence[int]) -> Tensor:
    """Adaptive average pooling of grid [T, h, w, C] to [t, h', w', C] as two matrix products, exact for any sizes.

    Pooling is separable: one product is over frames, the other over flattened rows and columns. shape: (t, h', w').
    """
    frames, rows, columns, width = grid.shape
    t, h, w = shape
    over_frames = pooling_matrix(frames, t).to(grid.device)
    over_patches = torch.kron(pooling_matrix(rows, h), pooling_matrix(columns, w)).to(grid.device)
    pooled = over_patches @ grid.reshape(frames, rows * columns, width).float()  # [T, h'*w', C]
    pooled = over_frames @ pooled.reshape(frames, h * w * width)  # [t, h'*w'*C]
    return pooled.reshape(t, h, w, width).to(grid.dtype)
