"""Likelihoods beside the Gaussian: spike counts and binary pixels, each given a predictor η per dimension."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lpc_runner.base.likelihoods import Independent
from lpc_runner.base.schema import PositiveFloat, at_least, checked

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
