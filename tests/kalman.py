"""The Kalman filter, a smoother and a gap in closed form: exact answers for linear systems, by recursions.

x_0 ~ N(m_0, P_0), x_t = A x_{t-1} + b + N(0, Q), y_t = C x_t + d + N(0, R), t = 1 .. T; all in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lpc_runner.base.distributions import LOG_2PI
from lpc_runner.evaluation.linear_gaussian import posterior


class LinearGaussian(NamedTuple):
    """The system above for the held-in neurons; variance: R = variance · I."""

    initial_mean: Tensor
    initial_covariance: Tensor
    transition: Tensor
    offset: Tensor
    noise_covariance: Tensor
    readout: Tensor
    bias: Tensor
    variance: Tensor


class Filtered(NamedTuple):
    """log p(y) (B,) in nats; of x_t given y_1 .. y_{t-1} and y_1 .. y_t: means (B, T, D), covariances (T, D, D).

    innovation: y_t - E[y_t | y_1 .. y_{t-1}], (B, T, N).
    """

    log_likelihood: Tensor
    predicted_mean: Tensor
    predicted_covariance: Tensor
    mean: Tensor
    covariance: Tensor
    innovation: Tensor


@torch.no_grad()
def linear_gaussian(model) -> LinearGaussian:
    """The system that model=lds is, in float64 on the CPU."""
    read = lambda tensor: tensor.detach().double().cpu()
    spread, transition = read(model.initial_map.weight), read(model.generator.transition.weight)
    inputs = model.generator.input_map
    noise = torch.zeros_like(transition) if inputs is None else read(inputs.weight) @ read(inputs.weight).T
    readout, bias = read(model.readout.weight)[model.held_in], read(model.readout.bias)[model.held_in]
    if isinstance(model.factor_map, torch.nn.Linear):
        bias = bias + readout @ read(model.factor_map.bias)
        readout = readout @ read(model.factor_map.weight)
    return LinearGaussian(
        initial_mean=read(model.initial_map.bias),
        initial_covariance=spread @ spread.T,
        transition=transition,
        offset=read(model.generator.transition.bias),
        noise_covariance=noise,
        readout=readout,
        bias=bias,
        variance=read(model.likelihood.gaussian_variance()),
    )


def kalman_filter(system: LinearGaussian, y: Tensor) -> Filtered:
    """Filter y (B, T, N), float64, the system's neurons only."""
    a, c = system.transition, system.readout
    identity = torch.eye(len(a), dtype=a.dtype)
    noise = system.variance * torch.eye(len(c), dtype=a.dtype)
    mean, covariance = system.initial_mean.expand(len(y), -1), system.initial_covariance
    total, kept = torch.zeros(len(y), dtype=a.dtype), []
    for observed in y.unbind(1):
        predicted, spread = mean @ a.T + system.offset, a @ covariance @ a.T + system.noise_covariance
        factor = torch.linalg.cholesky(c @ spread @ c.T + noise)
        innovation = observed - predicted @ c.T - system.bias
        white = torch.linalg.solve_triangular(factor, innovation.T, upper=False)
        log_det = 2 * factor.diagonal().log().sum()
        total = total - 0.5 * (white.square().sum(0) + log_det + len(c) * LOG_2PI)
        gain = torch.cholesky_solve(c @ spread, factor).T
        mean = predicted + innovation @ gain.T
        rest = identity - gain @ c
        covariance = rest @ spread @ rest.T + gain @ noise @ gain.T  # Joseph's form stays symmetric
        kept.append((predicted, spread, mean, covariance, innovation))
    predicted, spread, mean, covariance, innovation = zip(*kept)
    return Filtered(
        total,
        torch.stack(predicted, 1),
        torch.stack(spread),
        torch.stack(mean, 1),
        torch.stack(covariance),
        torch.stack(innovation, 1),
    )


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


def log_likelihood(model, x: Tensor) -> Tensor:
    """log p(x; θ) of the held-in neurons in nats, (B,)."""
    return kalman_filter(linear_gaussian(model), x[..., model.held_in].double().cpu()).log_likelihood


def approximation_gap(model) -> float:
    """log p(x) - max over factorised q of the ELBO, nats: ½ (Σ log Λ_ii - log det Λ), the same for every trial.

    KL(N(μ, diag(1/Λ_ii)) ‖ N(μ, Λ⁻¹)): the best diagonal q has the posterior's mean and the precisions Λ_ii.
    """
    empty = torch.zeros(1, model.num_steps, model.num_neurons, dtype=next(model.parameters()).dtype)
    precision = posterior(model, empty).precision_matrix[0]
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert math.isfinite(gap)
    return float(gap)
