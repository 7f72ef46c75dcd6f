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
from lpc_runner.base.tensors import exact_arithmetic


@dataclass(frozen=True)
class FeatureMoments:
    """mean: (d,) float64. covariance: (d, d) float64, unbiased (divided by N - 1)."""

    mean: Tensor
    covariance: Tensor

    def to(self, device: torch.device | str) -> FeatureMoments:
        """The same moments on another device."""
        return FeatureMoments(self.mean.to(device), self.covariance.to(device))


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
_SPARE = 8  # neighbours beyond the k-th that are computed again
# What a product form in float64 leaves of the distance between equal points, relative to their own lengths.
_ZERO = 1e-12
_MANY = 0.02  # share of a block's pairs beyond which the whole block is computed again


def squared_radii(features: Tensor, k: int, *, budget: int = BUDGET) -> Tensor:
    """Squared distance of each row of features (N, d) to its k-th nearest other row: (N,) float64."""
    _check_enough(len(features), k)
    pairs = _Pairs(features, features, features.mean(0, dtype=torch.float64), budget)
    count = min(k + _SPARE, len(features) - 1)
    radii = torch.empty(len(features), dtype=torch.float64, device=features.device)
    for rows, low, margin in pairs.bounds():
        own = torch.arange(rows.start, rows.stop, device=low.device)
        low[own - rows.start, own] = math.inf  # a point is not its own neighbour, a duplicate of it is
        least, nearest = low.topk(count, dim=1, largest=False)
        most = least + margin.gather(1, nearest)
        # The k-th distance lies between the k-th lower and the k-th upper bound: what is surely nearer is only counted.
        nearer = most < least[:, k - 1 : k]
        farthest = most.sort(dim=1).values[:, k - 1 : k]
        open_ones = (~nearer & (least <= farthest)).nonzero(as_tuple=True)
        exact = torch.full(least.shape, math.inf, dtype=torch.float64, device=low.device)
        exact[open_ones] = pairs.exact(open_ones[0] + rows.start, nearest[open_ones])
        rank = k - 1 - nearer.sum(1, keepdim=True)
        radii[rows] = exact.sort(dim=1).values.gather(1, rank).squeeze(1)
        # Where the last of these candidates may be the k-th, other points may be it, too.
        unsure = own[least[:, -1] <= farthest[:, 0]] if count < len(features) - 1 else own[:0]
        if len(unsure) > 0:
            distances = pairs.products(unsure)
            distances[torch.arange(len(unsure), device=low.device), unsure] = math.inf
            radii[unsure] = distances.kthvalue(k, dim=1).values
    return radii


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
    pairs = _Pairs(references, samples, references.mean(0, dtype=torch.float64), budget)
    for rows, low, margin in pairs.bounds():
        inside = pairs.decide(rows, low, margin, reference_balls[rows, None])
        num_inside += inside.sum()
        num_covered += inside.any(1).sum()
        precise |= inside.any(0)
        num_recalled += pairs.decide(rows, low, margin, sample_balls).any(1).sum()
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


def _centred(features: Tensor, centre: Tensor, dtype: torch.dtype) -> Tensor:
    result = torch.empty(features.shape, dtype=dtype, device=features.device)
    for target, part in zip(result.split(1024), features.split(1024)):
        target.copy_(part.double() - centre)
    return result


class _Pairs:
    """Squared distances between rows of `first` (N, d) and `second` (M, d): bounds in float32, values in float64."""

    def __init__(self, first: Tensor, second: Tensor, centre: Tensor, budget: int) -> None:
        self.originals, self.centre = (first, second), centre
        self.first = _centred(first, centre, torch.float32)
        self.second = self.first if second is first else _centred(second, centre, torch.float32)
        self.lengths = self.first.square().sum(1), self.second.square().sum(1)
        # Rounding the features, their lengths and a product of d terms in any order moves |a|² + |b|² - 2ab by no more
        # than this times |a|² + |b|², the unit roundoff being 2⁻²⁴ (Higham 2002, section 3.1).
        self.relative_error = 2 * (first.shape[1] + 16) * 2.0**-24
        # A block's float32 distances, their copies and masks: 24 bytes each at most.
        self.num_rows = max(1, min(4096, budget // (48 * len(second))))
        self.num_pairs = max(1, budget // (4 * 16 * first.shape[1]))

    def bounds(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Block by block: which rows, lower bounds of their distances (rows, M), and how far upper ones lie above."""
        with exact_arithmetic():
            for start in range(0, len(self.first), self.num_rows):
                rows = slice(start, min(start + self.num_rows, len(self.first)))
                lengths = self.lengths[0][rows, None] + self.lengths[1]
                margin = lengths * (2 * self.relative_error)
                low = torch.addmm(lengths, self.first[rows], self.second.T, alpha=-2).sub_(margin, alpha=0.5)
                yield rows, low, margin

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Σ (a - b)² in float64 for pairs of indices, (P,)."""
        first, second = self.originals
        parts = zip(rows.split(self.num_pairs), columns.split(self.num_pairs))
        values = [(first[i].double() - second[j].double()).square_().sum(1) for i, j in parts]
        return torch.cat(values) if values else torch.empty(0, dtype=torch.float64, device=first.device)

    def products(self, rows: Tensor) -> Tensor:
        """|a|² + |b|² - 2ab in float64 for whole rows, (R, M); 0 where only rounding is left."""
        first = _centred(self.originals[0][rows], self.centre, torch.float64)
        second = _centred(self.originals[1], self.centre, torch.float64)
        lengths = first.square().sum(1, keepdim=True) + second.square().sum(1)
        distances = torch.addmm(lengths, first, second.T, alpha=-2)
        return distances.masked_fill_(distances <= lengths.mul_(_ZERO), 0.0)

    def decide(self, rows: slice, low: Tensor, margin: Tensor, balls: Tensor) -> Tensor:
        """Whether each distance of the block is below `balls` (squared radii, float64, broadcast): (rows, M) bool."""
        # Rounding the radius itself down or up by one part in 2²³ keeps the comparison on the safe side.
        least, most = (balls * (1 - 2.0**-23)).float(), (balls * (1 + 2.0**-23)).float()
        possible = low <= most
        inside = possible & (low + margin < least)
        unsure = (possible & ~inside).nonzero(as_tuple=True)
        if len(unsure[0]) > _MANY * low.numel():
            return self.products(torch.arange(rows.start, rows.stop, device=low.device)) < balls
        radii = balls.expand(low.shape)[unsure]
        inside[unsure] = self.exact(unsure[0] + rows.start, unsure[1]) < radii
        return inside
