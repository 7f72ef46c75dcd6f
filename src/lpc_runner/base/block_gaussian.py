"""q(z|x) with full covariance inside blocks of coordinates and none between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpc_runner.base.distributions import LOG_2PI, Prior


@dataclass(frozen=True)
class BlockGaussian:
    """N(mean, L Lᵀ), L block-diagonal: mean (B, d); every factor holds n lower triangular blocks of it, (B, n, k, k).

    It answers as DiagonalGaussian does wherever an update needs no forward KL.
    """

    mean: Tensor
    factors: tuple[Tensor, ...]

    @property
    def variance(self) -> Tensor:
        """Diagonal of the covariance, (B, d)."""
        return torch.cat([factor.square().sum(-1).flatten(1) for factor in self.factors], 1)

    @property
    def _scales(self) -> Tensor:
        """Diagonal of L, (B, d)."""
        return torch.cat([factor.diagonal(dim1=-2, dim2=-1).flatten(1) for factor in self.factors], 1)

    def _blocks(self, vector: Tensor) -> list[Tensor]:
        """(B, d) as one (B, n, k, 1) per factor."""
        sizes = [factor.shape[1] * factor.shape[2] for factor in self.factors]
        parts = zip(vector.split(sizes, 1), self.factors)
        return [part.unflatten(1, factor.shape[1:3])[..., None] for part, factor in parts]

    def rsample(self, noise: Tensor) -> Tensor:
        """mean + L noise, (B, d), differentiable; noise ~ N(0, I) of shape (B, d)."""
        products = [factor @ part for factor, part in zip(self.factors, self._blocks(noise))]
        return self.mean + torch.cat([product.flatten(1) for product in products], 1)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z|x) in nats, (B,)."""
        parts = zip(self.factors, self._blocks(z - self.mean))
        white = [torch.linalg.solve_triangular(factor, part, upper=False).flatten(1) for factor, part in parts]
        return -(0.5 * (torch.cat(white, 1).square() + LOG_2PI) + self._scales.log()).sum(1)

    def kl_per_dimension(self, prior: Prior) -> Tensor:
        """Terms (B, d) whose sum over a block is its KL(q ‖ p) in nats: of trace, mean and log-determinant."""
        ratio = self.variance / prior.scale**2
        log_ratio = 2 * (self._scales / prior.scale).log()
        return 0.5 * (ratio + (self.mean / prior.scale).square() - 1 - log_ratio)

    def kl(self, prior: Prior) -> Tensor:
        """KL(q(z|x) ‖ p(z)) in nats, (B,)."""
        return self.kl_per_dimension(prior).sum(1)

    def detach(self) -> BlockGaussian:
        """The same distribution, cut from the encoder's graph."""
        return BlockGaussian(self.mean.detach(), tuple(factor.detach() for factor in self.factors))
