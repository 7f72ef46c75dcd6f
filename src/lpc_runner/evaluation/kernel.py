"""Kernel distance between two sets of features (KID, Bińkowski et al. 2018), exact and in chunks."""

from __future__ import annotations

from torch import Tensor

from lpc_runner.base.errors import UserError


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
