"""Precision, recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), chunked.

All four ask whether one point lies inside the ball that reaches from another to its k-th nearest neighbour in
its own set. Distances are squared and float64, of centred features: cdist in float32 is wrong by up to .016
on features far from the origin. Memory is `chunk` x N distances, whatever N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lpc_runner.errors import UserError

# The product form of a squared distance loses digits in proportion to the points' own lengths: what is left
# of the distance between equal points is below the first number (relative to those lengths); a radius and the
# distance it was taken from agree to the second. Both lie far under what float32 features resolve.
_ZERO = 1e-12
_TIE = 1e-9


def squared_radii(features: Tensor, k: int, *, chunk: int = 512) -> Tensor:
    """Squared distance of each row of features (N, d) to its k-th nearest other row: (N,) float64."""
    _check_enough(len(features), k)
    centred = _centre(features, features)
    radii = []
    for rows, block in _distance_blocks(centred, centred, chunk):
        own = torch.arange(rows.start, rows.stop, device=block.device)
        block[own - rows.start, own] = math.inf  # a point is not its own neighbour, a duplicate of it is
        radii.append(block.topk(k, dim=1, largest=False, sorted=True).values[:, -1])
    return torch.cat(radii)


def compare_neighbours(
    references: Tensor, samples: Tensor, k: int, *, reference_radii: Tensor | None = None, chunk: int = 512
) -> dict[str, float]:
    """Precision, recall, density and coverage of samples (M, d) against references (N, d).

    With r the distance to the k-th nearest other point of the same set, and < strict:
        precision = mean over samples of [some reference i: |x_i - y| < r_i]
        recall    = mean over references of [some sample j: |x - y_j| < r_j]
        density   = mean over samples of #{i: |x_i - y| < r_i} / k
        coverage  = mean over references of [some sample: |x_i - y| < r_i]
    reference_radii: `squared_radii(references, k)` where it is known already. UserError when a set has k
    points or fewer.
    """
    _check_enough(min(len(references), len(samples)), k)
    if reference_radii is None:
        reference_radii = squared_radii(references, k, chunk=chunk)
    # A point on a ball's edge is outside it: the margin keeps rounding from deciding otherwise.
    reference_balls = reference_radii * (1 - _TIE)
    sample_balls = squared_radii(samples, k, chunk=chunk) * (1 - _TIE)

    num_inside = num_covered = num_recalled = 0
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    blocks = _distance_blocks(_centre(references, references), _centre(samples, references), chunk)
    for rows, block in blocks:
        inside = block < reference_balls[rows, None]
        num_inside += inside.sum()
        num_covered += inside.any(1).sum()
        precise |= inside.any(0)
        num_recalled += (block < sample_balls).any(1).sum()
    return {
        "precision": precise.double().mean().item(),
        "recall": int(num_recalled) / len(references),
        "density": int(num_inside) / (k * len(samples)),
        "coverage": int(num_covered) / len(references),
    }


def coverage_ceiling(num_references: int, num_samples: int, k: int) -> float:
    """E[coverage] of N references by M samples of one distribution: 1 - Π_{j=1..k} (N - j) / (N + M - j).

    A reference is missed when its k nearest among the N - 1 + M exchangeable others are all references.
    """
    total = num_references + num_samples
    return 1 - math.prod((num_references - j) / (total - j) for j in range(1, k + 1))


def _check_enough(num_points: int, k: int) -> None:
    if num_points <= k:
        raise UserError(f"the {k}-th nearest neighbour needs at least {k + 1} images, there are {num_points}")


def _centre(features: Tensor, references: Tensor) -> Tensor:
    return features.double() - references.mean(0, dtype=torch.float64)


def _distance_blocks(first: Tensor, second: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of the rows of first (N, d) to second (M, d): which rows, and their (chunk, M)."""
    second_lengths = second.square().sum(1)
    for start in range(0, len(first), chunk):
        rows = slice(start, min(start + chunk, len(first)))
        part = first[rows]
        lengths = part.square().sum(1, keepdim=True) + second_lengths
        block = torch.addmm(lengths, part, second.T, alpha=-2)
        yield rows, block.masked_fill_(block <= lengths.mul_(_ZERO), 0.0)
