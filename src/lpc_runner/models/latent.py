"""The interface of every model: p(x, z; θ) with a Gaussian prior over a flat z, and an encoder for q(z|x; φ)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpc_runner.base.distributions import DiagonalGaussian, Prior
from lpc_runner.base.likelihoods import Likelihood
from lpc_runner.data.dataset import Batch


class LatentVariableModel(nn.Module, ABC):
    """p(x, z; θ) = p(x | η(z); θ) p(z), z flat of shape (B, latent_dim); p(x | η) is the likelihood.

    data_kinds: kinds of dataset that fit.
    """

    data_kinds: ClassVar[tuple[str, ...]] = ("images",)
    blocks: Mapping[str, slice] = {}  # named parts of z, where a model has any: each one's coordinates
    factorised_q = True  # whether q(z|x) is a DiagonalGaussian, which forward KL needs

    def __init__(self, latent_dim: int, prior_scale: float, likelihood: Likelihood) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.prior = Prior(prior_scale)
        self.likelihood = likelihood

    @abstractmethod
    def predict(self, z: Tensor) -> Tensor:
        """η, what the likelihood reads, (B, *data_shape), from z (B, latent_dim): the network's own output."""

    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x|z; θ), (B, *data_shape), from z (B, latent_dim)."""
        return self.likelihood.mean(self.predict(z))

    @abstractmethod
    def build_encoder(self) -> nn.Module:
        """A new encoder that fits this model: called with a Batch, it returns a DiagonalGaussian over z."""

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z; θ) in nats, (B,), summed over the dimensions of x; x (B, *data_shape), z (B, latent_dim)."""
        return self.likelihood(x, self.predict(z)) + self.prior.log_prob(z)

    @torch.no_grad()
    def observe(self, x: Tensor, z: Tensor, average: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        """What the likelihood estimates from data without a gradient. Called once per update.

        average: the mean over the processes that share the batch.
        """
        if self.likelihood.observes:
            self.likelihood.observe(*self.compared(x, z), average)

    def compared(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the likelihood explains of x, and its mean."""
        return x, self.decode(z)


class EncoderInterface(ABC):
    """q(z|x; φ) by a module; what of this one leaves out has the default given here (`schema.declared`)."""

    parameters: Callable[[], Iterator[nn.Parameter]]  # of the module that it is
    amortised: bool = True  # whether it answers for examples that it was not trained on

    @abstractmethod
    def __call__(self, batch: Batch) -> DiagonalGaussian:
        """q(z|x), differentiable with respect to φ; batch: x (B, *data_shape) and index (B,)."""

    def build_optimizer(self, optimizer: Any) -> Any:
        """φ's optimiser, made by `training.learner.AdamOptimizer`."""
        return optimizer.build(self.parameters())


class Encoder(nn.Module):
    """q(z|x; φ): a network to 2d numbers per example, read as mean and raw variance.

    variance = softplus(raw, beta=variance_beta), as the paper's appendix. body maps x (B, *data_shape) to (B, 2d).
    """

    def __init__(self, body: nn.Module, variance_beta: float) -> None:
        super().__init__()
        self.body, self.variance_beta = body, variance_beta

    def forward(self, batch: Batch) -> DiagonalGaussian:
        mean, raw = self.body(batch.x).chunk(2, dim=1)
        return DiagonalGaussian(mean, F.softplus(raw, beta=self.variance_beta))
