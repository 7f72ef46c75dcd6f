"""A smoother and a gap in closed form: exact answers for the systems of evaluation.linear_gaussian, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lpc_runner.evaluation.linear_gaussian import Filtered, LinearGaussian, posterior


def smooth(system: LinearGaussian, filtered: Filtered) -> tuple[Tensor, Tensor]:
    """Means (B, T, D) and covariances (T, D, D) of x_t given all of y (Bryson and Frazier 1963; Bierman 1973).

    The adjoint recursion inverts the innovations' covariance alone, never a state's: without process noise states'
    covariances lose rank, and the gain of Rauch, Tung and Striebel with them.
    """
    a, c = system.transition, system.readout
    noise = system.variance * torch.eye(len(c), dtype=a.dtype)
    score, information = torch.zeros_like(filtered.mean[:, -1]), torch.zeros_like(filtered.covariance[-1])
    means, covariances = [], []
    for t in range(len(filtered.covariance) - 1, -1, -1):
        mean, covariance = filtered.mean[:, t], filtered.covariance[t]
        means.append(mean + score @ covariance)
        covariances.append(covariance - covariance @ information @ covariance)
        spread = filtered.predicted_covariance[t]
        weight = torch.cholesky_solve(c, torch.linalg.cholesky(c @ spread @ c.T + noise))  # S⁻¹ C
        rest = torch.eye(len(a), dtype=a.dtype) - spread @ c.T @ weight
        score = (filtered.innovation[:, t] @ weight + score @ rest) @ a
        information = a.T @ (c.T @ weight + rest.T @ information @ rest) @ a
    return torch.stack(means[::-1], 1), torch.stack(covariances[::-1])


def approximation_gap(model) -> float:
    """log p(x) - max over factorised q of the ELBO, nats: ½ (Σ log Λ_ii - log det Λ), the same for every trial.

    KL(N(μ, diag(1/Λ_ii)) ‖ N(μ, Λ⁻¹)): the best diagonal q has the posterior's mean and the precisions Λ_ii.
    """
    empty = torch.zeros(1, model.num_steps, model.num_neurons, dtype=next(model.parameters()).dtype)
    precision = posterior(model, empty).precision_matrix[0]
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert math.isfinite(gap)
    return float(gap)
