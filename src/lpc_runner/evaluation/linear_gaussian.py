"""Exact answers, in float64, where x is linear in z with Gaussian noise: x = M z + c + σ ε, z ~ N(0, I)."""

from __future__ import annotations

import copy
from typing import TypeGuard

import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.models.sequence_networks import LinearDynamics
from lpc_runner.models.sequential import LFADS


def is_linear_gaussian(model: torch.nn.Module) -> TypeGuard[LFADS]:
    """Whether the functions below have an answer for this model."""
    if not (isinstance(model, LFADS) and isinstance(model.generator, LinearDynamics)):
        return False
    return model.likelihood.gaussian_variance() is not None and model.input_prior is None


@torch.no_grad()
def evidence(model: LFADS) -> LowRankMultivariateNormal:
    """p(x; θ) = N(c, M Mᵀ + σ²I) of the held-in neurons of a trial as one vector, (T n,); M is its cov_factor."""
    assert is_linear_gaussian(model)
    exact = copy.deepcopy(model).double().cpu()
    units = torch.eye(model.latent_dim, dtype=torch.float64)
    mean, *shifted = exact.decode(torch.cat([torch.zeros_like(units[:1]), units]))[..., model.held_in].flatten(1)
    variance = model.likelihood.gaussian_variance()
    assert variance is not None  # of a Gaussian
    return LowRankMultivariateNormal(
        mean, torch.stack(shifted, 1) - mean[:, None], variance.double().cpu().expand(len(mean))
    )


def log_likelihood(model: LFADS, x: Tensor) -> Tensor:
    """Exact log p(x; θ) of the held-in neurons in nats, (B,) float64; x (B, T, N)."""
    return evidence(model).log_prob(x[..., model.held_in].flatten(1).double().cpu())


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
