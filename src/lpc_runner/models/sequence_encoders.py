"""q(z|x; φ) of sequential models: a bidirectional network, a network per time bin, or a free table by trial.

Every q is over the flat z and, but for BlockTable's, factorised over coordinates; variance = softplus(raw, beta).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpc_runner.base.distributions import BlockGaussian, DiagonalGaussian
from lpc_runner.data.dataset import Batch


@dataclass(frozen=True)
class RawVariance:
    """variance = softplus(raw, beta), which starts at `initial`."""

    beta: float
    initial: float

    @property
    def start(self) -> float:
        """The raw value at which the variance is `initial`."""
        scaled = self.beta * self.initial
        return (scaled + math.log(-math.expm1(-scaled))) / self.beta

    def __call__(self, raw: Tensor) -> Tensor:
        return F.softplus(raw, beta=self.beta)

    def head(self, num_features: int, size: int) -> nn.Linear:
        """A layer to (mean, raw) of `size` coordinates."""
        layer = nn.Linear(num_features, 2 * size)
        with torch.no_grad():
            layer.weight[size:].mul_(0.1)
            layer.bias[size:] = self.start
        return layer


def _flat(heads: list[Tensor], variance: RawVariance) -> DiagonalGaussian:
    """Outputs (B, 2 size) or (B, T, 2 size), in the order of the blocks, to q over the flat z."""
    pairs = [head.chunk(2, dim=-1) for head in heads]
    mean, raw = (torch.cat([pair[part].flatten(1) for pair in pairs], 1) for part in (0, 1))
    return DiagonalGaussian(mean, variance(raw))


class BiRNN(nn.Module):
    """A bidirectional GRU over the held-in neurons: its last states give x_0, its outputs at t give u_t.

    shapes: (size,) or (T, size) of every block of z, in order.
    """

    def __init__(self, num_neurons: int, hidden_dim: int, shapes: list[tuple[int, ...]], variance: RawVariance) -> None:
        super().__init__()
        self.num_neurons, self.variance = num_neurons, variance
        self.over_time = [len(shape) == 2 for shape in shapes]
        self.network = nn.GRU(num_neurons, hidden_dim, batch_first=True, bidirectional=True)
        self.heads = nn.ModuleList(variance.head(2 * hidden_dim, shape[-1]) for shape in shapes)

    def forward(self, batch: Batch) -> DiagonalGaussian:
        outputs, last = self.network(batch.x[..., : self.num_neurons])
        summary = torch.cat([last[0], last[1]], 1)
        features = [outputs if over_time else summary for over_time in self.over_time]
        return _flat([head(feature) for head, feature in zip(self.heads, features)], self.variance)


class PerBin(nn.Module):
    """A fully connected network from x_t to q(z_t | x_t), for models whose time bins are independent."""

    def __init__(self, num_neurons: int, hidden_dim: int, size: int, variance: RawVariance) -> None:
        super().__init__()
        self.num_neurons, self.variance = num_neurons, variance
        self.network = nn.Sequential(nn.Linear(num_neurons, hidden_dim), nn.SiLU(), variance.head(hidden_dim, size))

    def forward(self, batch: Batch) -> DiagonalGaussian:
        return _flat([self.network(batch.x[..., : self.num_neurons])], self.variance)


class FreeTable(nn.Module):
    """Variational EM: every training trial has its own mean and raw variance, row batch.index of two tables.

    It starts at mean 0. learning_rate: Adam's for the rows, each of which moves only with its own trial. A trial that
    was not trained on has no row: its q must be fitted.
    """

    amortised = False

    def __init__(self, num_train: int, latent_dim: int, variance: RawVariance, learning_rate: float) -> None:
        super().__init__()
        self.variance, self.learning_rate = variance, learning_rate
        self.mean = nn.Parameter(torch.zeros(num_train, latent_dim))
        self.raw = nn.Parameter(torch.full((num_train, latent_dim), variance.start))

    def forward(self, batch: Batch) -> DiagonalGaussian:
        mean, raw = self.mean.index_select(0, batch.index), self.raw.index_select(0, batch.index)
        return DiagonalGaussian(mean, self.variance(raw))

    def build_optimizer(self, optimizer: Any) -> Any:
        """Each row by itself, at the table's own learning rate."""
        return optimizer.build_by_row(self.parameters(), self.learning_rate)


class BlockTable(FreeTable):
    """The free table with a covariance that is full inside every block: within z_0, and within u_t at each time t.

    shapes: (size,) or (T, size) of every block of z, in order. The factor's diagonal is the root of the variance that
    raw gives; entries below it start at 0.
    """

    def __init__(
        self, num_train: int, shapes: list[tuple[int, ...]], variance: RawVariance, learning_rate: float
    ) -> None:
        super().__init__(num_train, sum(math.prod(shape) for shape in shapes), variance, learning_rate)
        self.sizes = [(shape[0] if len(shape) == 2 else 1, shape[-1]) for shape in shapes]
        self.below = nn.ParameterList(nn.Parameter(torch.zeros(num_train, n, k, k)) for n, k in self.sizes)

    def forward(self, batch: Batch) -> BlockGaussian:
        q = super().forward(batch)
        scales = q.variance.sqrt().split([n * k for n, k in self.sizes], 1)
        factors = [
            below.index_select(0, batch.index).tril(-1) + torch.diag_embed(scale.unflatten(1, size))
            for below, scale, size in zip(self.below, scales, self.sizes)
        ]
        return BlockGaussian(q.mean, tuple(factors))
