"""Exact answers, in float64, where x is linear in z with Gaussian noise: x = M z + c + σ ε, z ~ N(0, I).

log p(x) is the Kalman filter's, of x_0 ~ N(m_0, P_0), x_t = A x_{t-1} + b + N(0, Q), y_t = C x_t + d + N(0, R).
"""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal

from lpc_runner.base.distributions import LOG_2PI, DiagonalGaussian
from lpc_runner.models.sequence_networks import LinearDynamics
from lpc_runner.models.sequential import LFADS


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


def is_linear_gaussian(model: torch.nn.Module) -> TypeGuard[LFADS]:
    """Whether the functions below have an answer for this model."""
    if not (isinstance(model, LFADS) and isinstance(model.generator, LinearDynamics)):
        return False
    return model.likelihood.gaussian_variance() is not None and model.input_prior is None


@torch.no_grad()
def evidence(model: LFADS) -> LowRankMultivariateNormal:
    """p(x; θ) = N(c, M Mᵀ + σ²I) of the held-in neurons of a trial as one vector, (T n,), dense; M: cov_factor."""
    assert is_linear_gaussian(model)
    exact = copy.deepcopy(model).double().cpu()
    units = torch.eye(model.latent_dim, dtype=torch.float64)
    mean, *shifted = exact.decode(torch.cat([torch.zeros_like(units[:1]), units]))[..., model.held_in].flatten(1)
    variance = model.likelihood.gaussian_variance()
    assert variance is not None  # of a Gaussian
    return LowRankMultivariateNormal(
        mean, torch.stack(shifted, 1) - mean[:, None], variance.double().cpu().expand(len(mean))
    )


@torch.no_grad()
def linear_gaussian(model: LFADS) -> LinearGaussian:
    """The system that model=lds is, in float64 on the CPU."""
    assert is_linear_gaussian(model) and isinstance(model.generator, LinearDynamics)
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


def log_likelihood(model: LFADS, x: Tensor) -> Tensor:
    """Exact log p(x; θ) of the held-in neurons in nats, (B,) float64; x (B, T, N)."""
    return kalman_filter(linear_gaussian(model), x[..., model.held_in].double().cpu()).log_likelihood


@torch.no_grad()
def exact_log_evidence(model: torch.nn.Module, x: Tensor) -> Tensor | None:
    """log p(x; θ), of a sequence's held-in neurons, in nats, (B,) float64, for any model that knows it; else None."""
    if is_linear_gaussian(model):
        return log_likelihood(model, x)
    known = getattr(model, "log_evidence", None)
    return None if known is None else known(x).double()


def posterior(model: LFADS, x: Tensor) -> MultivariateNormal:
    """p(z | x; θ) over the flat z, float64: Λ = I + MᵀM/σ²; batch (B,), event (latent_dim,).

    Dense in latent_dim: for systems of some hundred coordinates.
    """
    marginal = evidence(model)
    scaled = marginal.cov_factor / marginal.cov_diag[:, None]
    precision = torch.eye(model.latent_dim, dtype=torch.float64) + marginal.cov_factor.T @ scaled
    centred = x[..., model.held_in].flatten(1).double().cpu() - marginal.loc
    mean = torch.linalg.solve(precision, (centred @ scaled).T).T
    return MultivariateNormal(mean, precision_matrix=precision.expand(len(x), -1, -1))


def best_factorised(model: LFADS, x: Tensor) -> DiagonalGaussian:
    """argmax of the ELBO over diagonal Gaussians, (B, latent_dim): the posterior's means and precisions Λ_ii."""
    exact, like = posterior(model, x), next(model.parameters())
    variance = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).reciprocal()
    return DiagonalGaussian(exact.mean.to(like), variance.to(like))
