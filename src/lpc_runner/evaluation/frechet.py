"""Fréchet distance between two sets of features, each summarised as a Gaussian (Heusel et al. 2017, eq.
6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpc_runner.base.errors import UserError


@dataclass(frozen=True)
class Moments:
    """mean: (d,) float64. covariance: (d, d) float64, unbiased (divided by N - 1)."""

    mean: Tensor
    covariance: Tensor

    def to(self, device: torch.device | str) -> Moments:
        """The same moments on another device."""
        return Moments(self.mean.to(device), self.covariance.to(device))


def moments(features: Tensor, *, chunk: int = 4096) -> Moments:
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
    return Moments(mean, scatter / (num_examples - 1))


def frechet_distance(first: Moments, second: Moments) -> float:
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
