"""Fully connected models of images: `mlp`, and the linear-Gaussian one (probabilistic PCA), its posterior known."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from lpc_runner.base.likelihoods import Likelihood
from lpc_runner.base.schema import PositiveFloat, PositiveInt, checked
from lpc_runner.models.latent import Encoder, LatentVariableModel

ACTIVATIONS = {"silu": nn.SiLU, "tanh": nn.Tanh, "relu": nn.ReLU}


def network(sizes: list[int], activation: str) -> list[nn.Module]:
    """Layers from sizes[0] numbers to sizes[-1], the activation between them."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers += [nn.Linear(width_in, width_out), ACTIVATIONS[activation]()]
    return layers[:-1]


class MLP(LatentVariableModel):
    """Decoder latent_dim -> hidden -> data, encoder with the same hidden layers reversed; activation: between them."""

    @checked
    def __init__(
        self,
        data_shape: tuple[int, ...],
        latent_dim: PositiveInt,
        prior_scale: PositiveFloat,
        likelihood: Likelihood,
        variance_beta: PositiveFloat,
        hidden: list[PositiveInt],
        activation: Literal["silu", "tanh", "relu"] = "silu",
    ) -> None:
        super().__init__(latent_dim, prior_scale, likelihood)
        self.hidden, self.activation, self.variance_beta = hidden, activation, variance_beta
        self.data_dim = math.prod(data_shape)
        self.decoder = nn.Sequential(
            *network([latent_dim, *hidden, self.data_dim], activation), nn.Unflatten(1, tuple(data_shape))
        )

    def predict(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def build_encoder(self) -> Encoder:
        sizes = [self.data_dim, *reversed(self.hidden), 2 * self.latent_dim]
        return Encoder(nn.Sequential(nn.Flatten(), *network(sizes, self.activation)), self.variance_beta)


class Linear(MLP):
    """x = W z + b + σ ε, z ~ N(0, s²I), ε ~ N(0, I) (Tipping and Bishop 1999); x of any shape is flattened."""

    @checked
    def __init__(
        self,
        data_shape: tuple[int, ...],
        latent_dim: PositiveInt,
        prior_scale: PositiveFloat,
        likelihood: Likelihood,
        variance_beta: PositiveFloat,
    ) -> None:
        if likelihood.gaussian_variance() is None:
            raise ValueError("model=linear has a closed form only under a Gaussian, as model/likelihood=gaussian")
        super().__init__(data_shape, latent_dim, prior_scale, likelihood, variance_beta, hidden=[])

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """p(z|x; θ) = N(Σ Wᵀ(x - b)/σ², Σ), Σ⁻¹ = WᵀW/σ² + I/s²; batch (B,), event (latent_dim,)."""
        weight, bias = self.decoder.parameters()
        variance = self.likelihood.gaussian_variance()
        assert variance is not None  # as the constructor requires
        identity = torch.eye(self.latent_dim, dtype=weight.dtype, device=weight.device)
        precision = weight.T @ weight / variance + identity / self.prior.scale**2
        covariance = torch.linalg.inv(precision)
        mean = (x.flatten(1) - bias) @ weight / variance @ covariance
        return MultivariateNormal(mean, precision_matrix=precision.expand(len(x), -1, -1))

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x; θ) = log N(x; b, s² W Wᵀ + σ²I) in nats, (B,)."""
        weight, bias = self.decoder.parameters()
        identity = torch.eye(self.data_dim, dtype=weight.dtype, device=weight.device)
        variance = self.likelihood.gaussian_variance()
        assert variance is not None  # as the constructor requires
        covariance = self.prior.scale**2 * weight @ weight.T + variance * identity
        return MultivariateNormal(bias, covariance).log_prob(x.flatten(1))
