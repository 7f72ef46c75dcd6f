"""Distances between two sets of features: Fréchet (Heusel et al. 2017, eq. 6), kernel, neighbours.

Kernel: KID, Bińkowski et al. 2018. Neighbours: precision and recall, Kynkäänniemi et al. 2019; density and coverage,
Naeem et al. 2020. All work in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lpc_runner.base.errors import UserError


@dataclass(frozen=True)
class FeatureMoments:
    """mean: (d,) float64. covariance: (d, d) float64, unbiased (divided by N - 1)."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor, *, chunk: int = 4096) -> FeatureMoments:
    """Mean and covariance of features (N, d), accumulated in float64 over chunks; UserError when N < 2."""
    num_examples, dimension = features.shape
    if num_examples < 2:
        raise UserError(f"a Fréchet distance needs at least 2 images on each side, got {num_examples}")
    mean = torch.zeros(dimension, dtype=torch.float64, device=features.device)
    for part in features.split(chunk):
        mean += part.double().sum(0)
    mean /= num_examples
    scatter = torch.zeros(dimension, dimension, dtype=torch.float64, device=features.device)
    for part in features.split(chunk):
        centred = part.double() - mean
        scatter.addmm_(centred.T, centred)
    return FeatureMoments(mean, scatter / (num_examples - 1))


def frechet_distance(first: FeatureMoments, second: FeatureMoments) -> float:
    """|m₁ - m₂|² + tr(S₁ + S₂ - 2 (S₁S₂)^½), in squared feature units.

    With any F Fᵀ = S₁ the product S₁S₂ has the non-zero eigenvalues of the symmetric FᵀS₂F, so its root needs
    neither a matrix square root nor complex numbers. Rounding may leave a few 1e-9 below zero between equal
    sets: clamped.
    """
    factor = _factor(first.covariance)
    eigenvalues = torch.linalg.eigvalsh(factor.T @ second.covariance @ factor)
    root_trace = eigenvalues.clamp_min(0).sqrt().sum()
    gap = (first.mean - second.mean).square().sum()
    distance = gap + first.covariance.trace() + second.covariance.trace() - 2 * root_trace
    return max(distance.item(), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """F (d, r) with F Fᵀ = covariance: Cholesky, or scaled eigenvectors when the rank r is below d."""
    cholesky, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return cholesky
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    # Below this an eigenvalue is rounding; its root would be noise of 1e-8, a thousand times over.
    threshold = eigenvalues[-1].clamp_min(0) * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    kept = eigenvalues > threshold
    return vectors[:, kept] * eigenvalues[kept].sqrt()


def kernel_distance(
    references: Tensor, samples: Tensor, *, reference_term: float | None = None, chunk: int = 512
) -> float:
    """Unbiased MMD² with k(x, y) = (x·y / d + 1)³, between references (N, d) and samples (M, d).

    mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{i,j} k(x_i, y_j): negative values are possible
    and right. This is the estimator over all pairs, not the usual average over random subsets of 1000: same
    expectation, less variance, no random numbers. reference_term: `within_term(references)` where it is known
    already.
    """
    if reference_term is None:
        reference_term = within_term(references, chunk=chunk)
    between = _kernel_sum(references, samples, chunk) / (len(references) * len(samples))
    return reference_term + within_term(samples, chunk=chunk) - 2 * between


def within_term(features: Tensor, *, chunk: int = 512) -> float:
    """mean_{i≠j} k(x_i, x_j) over features (N, d); UserError when N < 2."""
    num_examples, dimension = features.shape
    if num_examples < 2:
        raise UserError(f"a kernel distance needs at least 2 images on each side, got {num_examples}")
    diagonal = sum(
        (part.double().square().sum(1) / dimension + 1).pow(3).sum().item() for part in features.split(chunk)
    )
    return (_kernel_sum(features, features, chunk) - diagonal) / (num_examples * (num_examples - 1))


def _kernel_sum(first: Tensor, second: Tensor, chunk: int) -> float:
    """Σ_{i,j} k(x_i, y_j) in float64: cubes of large features leave float32 no digits."""
    columns = second.double().T / second.shape[1]
    return sum((part.double() @ columns).add_(1).pow_(3).sum().item() for part in first.split(chunk))


BUDGET = 2**29  # bytes of working memory
# A point on a ball's edge is outside it: radii and distances in float64 agree to this, far under what float32 resolves.
_TIE = 1e-9
# What a product form in float64 leaves of the distance between equal points, relative to their own lengths.
_ZERO = 1e-12


def squared_radii(features: Tensor, k: int, *, budget: int = BUDGET) -> Tensor:
    """Squared distance of each row of features (N, d) to its k-th nearest other row: (N,) float64."""
    _check_enough(len(features), k)
    radii = []
    for rows, distances in _squared_distances(features, features, budget):
        own = torch.arange(rows.start, rows.stop, device=features.device)
        distances[own - rows.start, own] = math.inf  # a point is not its own neighbour, a duplicate of it is
        radii.append(distances.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def compare_neighbours(
    references: Tensor, samples: Tensor, k: int, *, reference_radii: Tensor | None = None, budget: int = BUDGET
) -> dict[str, float]:
    """Precision, recall, density and coverage of samples (M, d) against references (N, d).

    With r the distance to the k-th nearest other point of the same set, and < strict:
        precision = mean over samples of [some reference i: |x_i - y| < r_i]
        recall    = mean over references of [some sample j: |x - y_j| < r_j]
        density   = mean over samples of #{i: |x_i - y| < r_i} / k
        coverage  = mean over references of [some sample: |x_i - y| < r_i]
    reference_radii: `squared_radii(references, k)` where it is known already. budget: bytes of working memory beside
    the features. UserError when a set has k points or fewer.
    """
    _check_enough(min(len(references), len(samples)), k)
    if reference_radii is None:
        reference_radii = squared_radii(references, k, budget=budget)
    # The margin keeps rounding from putting a point on the edge inside.
    reference_balls = reference_radii * (1 - _TIE)
    sample_balls = squared_radii(samples, k, budget=budget) * (1 - _TIE)

    num_inside = num_covered = num_recalled = 0
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    for rows, distances in _squared_distances(references, samples, budget):
        inside = distances < reference_balls[rows, None]
        num_inside += inside.sum()
        num_covered += inside.any(1).sum()
        precise |= inside.any(0)
        num_recalled += (distances < sample_balls).any(1).sum()
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


def _rows_at_once(num_columns: int, budget: int) -> int:
    """Of a block of distances, whose copies and masks take 48 bytes each at most."""
    return max(1, min(4096, budget // (48 * num_columns)))


def _squared_distances(first: Tensor, second: Tensor, budget: int) -> Iterator[tuple[slice, Tensor]]:
    """Block by block: which rows of `first` (N, d), and |a|² + |b|² - 2ab to all of `second` (M, d), (rows, M) float64.

    0 where only rounding is left.
    """
    centre = second.mean(0, dtype=torch.float64)
    columns = second - centre
    lengths_of_columns = columns.square().sum(1)
    num_rows = _rows_at_once(len(second), budget)
    for number, part in enumerate(first.split(num_rows)):
        rows = part - centre
        lengths = rows.square().sum(1, keepdim=True) + lengths_of_columns
        distances = torch.addmm(lengths, rows, columns.T, alpha=-2)
        start = number * num_rows
        yield slice(start, start + len(part)), distances.masked_fill_(distances <= lengths.mul_(_ZERO), 0.0)
