"""Densities: likelihoods of pixels, values, spike counts and binary pixels; the prior of z; the encoder's q(z|x)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lpc_runner.base.bins import BIN_HALF_WIDTH, log_bin_probability
from lpc_runner.base.likelihoods import Independent
from lpc_runner.base.schema import PositiveFloat, at_least, between, checked

LOG_2PI = math.log(2 * math.pi)


def log_normal(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log N(x; mean, σ²), nats, elementwise; log_scale = log σ broadcasts."""
    return -0.5 * (((x - mean) * torch.exp(-log_scale)).square() + LOG_2PI) - log_scale


class _ScaledLikelihood(Independent):
    """p(x | mean) with one scale σ for all dimensions; η is the mean.

    scale: `fixed` at initial_scale; `learned` by gradient; `optimal`, σ² = running mean squared error (σ-VAE,
    Rybkin et al. 2021), where momentum is the weight of the past.
    """

    data_kinds: ClassVar[tuple[str, ...]] = ("images", "real-valued series")
    log_scale: Tensor
    num_observed: Tensor

    @checked
    def __init__(
        self,
        scale: Literal["fixed", "learned", "optimal"],
        initial_scale: PositiveFloat,
        momentum: Annotated[float, between(0, 1)],
    ) -> None:
        super().__init__()
        self.observes, self.momentum = scale == "optimal", momentum
        log_scale = torch.tensor(math.log(initial_scale))
        if scale == "learned":
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.register_buffer("num_observed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: Tensor, mean: Tensor, average: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        """Move the optimal σ² towards the mean squared error of this batch; the first batch sets it."""
        assert self.observes
        error = average((x - self.within_range(mean)).square().mean())
        past = torch.where(self.num_observed == 0, 0.0, self.momentum)
        self.log_scale.copy_(0.5 * torch.log(past * torch.exp(2 * self.log_scale) + (1 - past) * error))
        self.num_observed += 1

    def within_range(self, mean: Tensor) -> Tensor:
        """The mean as an estimate of x."""
        return mean

    def scalars(self) -> dict[str, Tensor]:
        """What of it is logged: σ."""
        return {"sigma": self.log_scale.detach().exp()}

    def sample(self, mean: Tensor, source: torch.Generator) -> Tensor:
        """x ~ N(mean, σ²I), of the mean's shape."""
        noise = torch.randn(mean.shape, generator=source, device=mean.device, dtype=mean.dtype)
        return mean + torch.exp(self.log_scale) * noise


class DiscretisedGaussian(_ScaledLikelihood):
    """p(x | mean) of 8-bit images scaled to [-1, 1]: each of 256 levels owns a bin of width 2/255, end bins open."""

    data_kinds = ("images",)
    num_levels = 256

    def within_range(self, mean: Tensor) -> Tensor:
        # The open end bins reward means far outside [-1, 1] for black and white pixels: no error of that size exists.
        return mean.clamp(-1, 1)

    def density(self, x: Tensor, mean: Tensor) -> Tensor:
        return log_bin_probability(x, mean, self.log_scale)

    def sample(self, mean: Tensor, source: torch.Generator) -> Tensor:
        """The level of the bin in which a draw of the Gaussian falls."""
        level = ((super().sample(mean, source).clamp(-1, 1) + 1) / (2 * BIN_HALF_WIDTH)).round()
        return 2 * BIN_HALF_WIDTH * level - 1


class Gaussian(_ScaledLikelihood):
    """p(x | mean) = N(mean, σ²I), a density over real-valued x."""

    def density(self, x: Tensor, mean: Tensor) -> Tensor:
        return log_normal(x, mean, self.log_scale)

    def gaussian_variance(self) -> Tensor:
        return torch.exp(2 * self.log_scale)


@dataclass(frozen=True)
class Prior:
    """p(z) = N(0, s²I) over (B, d); scale is s."""

    scale: float = 1.0

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, (B,)."""
        dim = z.shape[1]
        return -0.5 * (z.square().sum(1) / self.scale**2 + dim * (LOG_2PI + 2 * math.log(self.scale)))

    def score(self, z: Tensor) -> Tensor:
        """∇z log p(z), (B, d)."""
        return -z / self.scale**2


class _AtOnce(ABC):
    """A q of independent coordinates, or blocks of them: a dataclass of tensors (B, ...)."""

    @abstractmethod
    def kl_per_dimension(self, prior: Prior) -> Tensor: ...

    def kl(self, prior: Prior) -> Tensor:
        """KL(q(z|x) ‖ p(z)) in nats, (B,)."""
        return self.kl_per_dimension(prior).sum(1)

    def at(self, z: Tensor) -> Self:
        """Each coordinate's law given those of z (B, d) that q draws before it: all are drawn at once."""
        del z
        return self

    def detach(self) -> Self:
        """The same distribution, cut from the encoder's graph."""
        return type(self)(*tree_map(Tensor.detach, tuple(vars(self).values())))

    def repeat(self, count: int) -> Self:
        """q of `count` copies of the batch, one after another: (count B, d)."""
        copies = lambda part: part.repeat(count, *[1] * (part.ndim - 1))
        return type(self)(*tree_map(copies, tuple(vars(self).values())))


@dataclass(frozen=True)
class DiagonalGaussian(_AtOnce):
    """q(z|x; φ) = N(mean, diag(variance)); mean and variance are (B, d)."""

    mean: Tensor
    variance: Tensor

    def rsample(self, noise: Tensor) -> Tensor:
        """mean + sqrt(variance) ⊙ noise, (B, d), differentiable; noise ~ N(0, I) of shape (B, d)."""
        return self.mean + self.variance.sqrt() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z|x) in nats, (B,)."""
        return log_normal(z, self.mean, 0.5 * self.variance.log()).sum(1)

    def kl_per_dimension(self, prior: Prior) -> Tensor:
        """KL(q ‖ p) of each coordinate in nats, (B, d)."""
        ratio = self.variance / prior.scale**2
        return 0.5 * (ratio + (self.mean / prior.scale).square() - 1 - ratio.log())


@dataclass(frozen=True)
class BlockGaussian(_AtOnce):
    """N(mean, L Lᵀ), L block-diagonal: mean (B, d); every factor holds n lower triangular blocks of it, (B, n, k, k).

    It has DiagonalGaussian's methods, and serves every update without forward KL by two sums.
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


SERIES_START = -15.0  # below it log softplus(η) = η - exp(η)/2 to float64's rounding of exp(2η)


class Poisson(Independent):
    """p(x | η) = Poisson(x; rate(η)) of counts per bin, with its normaliser log x!.

    link `exp`: rate = exp(η), from tail_start = c on continued by its tangent exp(c) (1 + η - c): once continuously
    differentiable and without a bound, so that no gradient vanishes as under a clamp. link `softplus`: log(1 + exp(η)).
    tail_start: in log counts per bin, for exp alone. initial_rate: counts per bin at which every neuron starts.
    """

    data_kinds: ClassVar[tuple[str, ...]] = ("spike counts",)

    @checked
    def __init__(
        self,
        link: Literal["exp", "softplus"],
        tail_start: Annotated[float, at_least(0)],
        initial_rate: PositiveFloat,
    ) -> None:
        super().__init__()
        self.link, self.tail_start = link, tail_start
        self.initial_predictor = math.log(initial_rate if link == "exp" else math.expm1(initial_rate))

    def log_rate(self, predictor: Tensor) -> Tensor:
        """log rate(η), elementwise, finite wherever η is."""
        if self.link == "exp":
            excess = F.relu(predictor - self.tail_start)
            return torch.where(predictor > self.tail_start, self.tail_start + torch.log1p(excess), predictor)
        is_low = predictor < SERIES_START
        low = torch.where(is_low, predictor, SERIES_START)  # the branch not taken must stay finite for its gradient
        high = torch.where(is_low, SERIES_START, predictor)
        return torch.where(is_low, low - low.exp() / 2, F.softplus(high).log())

    def mean(self, predictor: Tensor) -> Tensor:
        """Expected counts per bin, elementwise."""
        return self.log_rate(predictor).exp()

    def density(self, x: Tensor, predictor: Tensor) -> Tensor:
        """log p(x | η) = x log rate - rate - log x!, elementwise, nats; x: counts in a floating dtype."""
        log_rate = self.log_rate(predictor.to(x.dtype))  # where the network's arithmetic is bfloat16, this is not
        return x * log_rate - log_rate.exp() - torch.lgamma(x + 1)

    def sample(self, predictor: Tensor, source: torch.Generator) -> Tensor:
        """Counts, in the dtype of η."""
        return torch.poisson(self.mean(predictor), generator=source)


class Bernoulli(Independent):
    """p(x | η) of pixels in [-1, 1]: t log s(η) + (1 - t) log s(-η), t = (x + 1)/2, s the logistic function.

    The exact log-probability of binary pixels, x = -1 or 1. Of grey ones, which it reads as probabilities t, it is the
    expected log-probability of a binary draw: no probability of the grey levels.
    """

    num_levels = 2

    def mean(self, predictor: Tensor) -> Tensor:
        """2 s(η) - 1, elementwise, in [-1, 1]."""
        return 2 * torch.sigmoid(predictor) - 1

    def density(self, x: Tensor, predictor: Tensor) -> Tensor:
        """log p(x | η), elementwise, nats."""
        white = (x + 1) / 2
        return -F.binary_cross_entropy_with_logits(predictor.to(x.dtype), white, reduction="none")

    def sample(self, predictor: Tensor, source: torch.Generator) -> Tensor:
        """Binary pixels, -1 or 1."""
        return 2 * torch.bernoulli(torch.sigmoid(predictor), generator=source) - 1
