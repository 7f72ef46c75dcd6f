"""A sequential model small enough to be known in closed form: Gaussian or Poisson factor analysis per trial."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from lpc_runner.base.distributions import DiagonalGaussian, Gaussian
from lpc_runner.base.likelihoods import Independent
from lpc_runner.data.dataset import Batch
from lpc_runner.models.latent import LatentVariableModel


class Run(NamedTuple):
    states: Tensor
    factors: Tensor
    inputs: Tensor | None


class PoissonCounts(Independent):
    def density(self, x: Tensor, rates: Tensor) -> Tensor:
        return torch.xlogy(x, rates) - rates - torch.lgamma(x + 1)


class FactorModel(LatentVariableModel):
    """x_tn = Σ_f C_nf (B_t z)_f + d_n + σ ε, or Poisson of exp of that: z (B, D) drives factors linearly in time."""

    data_kinds = ("spike counts", "real-valued series")

    def __init__(self, shape, latent_dim=4, num_factors=3, num_held_out=0, counts=False, seed=0, scale=0.7):
        likelihood = PoissonCounts() if counts else Gaussian("learned", scale, 0.9)
        super().__init__(latent_dim, 1.0, likelihood)
        source = torch.Generator().manual_seed(seed)
        draw = lambda *size: nn.Parameter(torch.randn(*size, generator=source))
        self.time, self.weight, self.bias = draw(shape[0], num_factors, latent_dim), draw(shape[1], num_factors), None
        self.bias = nn.Parameter(torch.full((shape[1],), -1.5 if counts else 0.3))
        with torch.no_grad():
            self.time /= math.sqrt(latent_dim)
            self.weight /= math.sqrt(num_factors)
        self.shape, self.counts, self.num_held_in = shape, counts, shape[1] - num_held_out
        self.blocks = {"first": slice(0, 1), "rest": slice(1, latent_dim)}

    def run(self, z: Tensor) -> Run:
        factors = torch.einsum("tfd,bd->btf", self.time, z)
        return Run(factors, factors, factors[..., :1])

    def predict(self, z: Tensor) -> Tensor:
        predictor = self.run(z).factors @ self.weight.T + self.bias
        return predictor.exp() if self.counts else predictor

    def log_likelihood(self, x: Tensor, z: Tensor, neurons: slice) -> Tensor:
        return self.likelihood(x[..., neurons], self.decode(z)[..., neurons])

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return self.log_likelihood(x, z, slice(0, self.num_held_in)) + self.prior.log_prob(z)

    def build_encoder(self) -> nn.Module:
        return Guess(self)

    def matrix(self) -> Tensor:
        """W of vec(x) = W z + b + σ ε over held-in neurons."""
        return torch.einsum("nf,tfd->tnd", self.weight[: self.num_held_in], self.time).flatten(0, 1)

    def precision(self) -> Tensor:
        """Of the exact posterior, (D, D)."""
        weight = self.matrix()
        return torch.eye(self.latent_dim) + weight.T @ weight / torch.exp(2 * self.likelihood.log_scale)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        variance, weight = torch.exp(2 * self.likelihood.log_scale), self.matrix()
        offset = (x[..., : self.num_held_in] - self.bias[: self.num_held_in]).flatten(1)
        precision = self.precision()
        mean = torch.linalg.solve(precision, (offset @ weight / variance).T).T
        return MultivariateNormal(mean, precision_matrix=precision)


class Exact(FactorModel):
    """The same, telling its evidence."""

    def log_evidence(self, x: Tensor) -> Tensor:
        weight = self.matrix()
        identity = torch.eye(len(weight))
        covariance = weight @ weight.T + torch.exp(2 * self.likelihood.log_scale) * identity
        mean = self.bias[: self.num_held_in].repeat(self.shape[0])
        return MultivariateNormal(mean.double(), covariance.double()).log_prob(x.flatten(1).double())


class Guess(nn.Module):
    """A poor encoder: means that lean the right way, one variance for all."""

    def __init__(self, model: FactorModel) -> None:
        super().__init__()
        held_in = model.num_held_in
        self.body = nn.Linear(model.shape[0] * held_in, model.latent_dim)
        self.num_held_in = held_in
        with torch.no_grad():
            self.body.weight.copy_(0.05 * model.matrix().T)
            self.body.bias.zero_()

    def forward(self, batch: Batch) -> DiagonalGaussian:
        mean = self.body(batch.x[..., : self.num_held_in].flatten(1))
        return DiagonalGaussian(mean, torch.full_like(mean, 0.3))
