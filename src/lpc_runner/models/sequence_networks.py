"""Networks of sequential models: generators of states, and encoders q(z|x; φ).

A generator computes x_t = cell(u_t, x_{t-1}) for t = 1 .. T from all of u at once. Each has `initial_size` (the size of
x_0) and `forward(initial, inputs, num_steps)` -> x_1 .. x_T (B, T, state_dim). `initial` is x_0 (B, initial_size),
`inputs` u_1 .. u_T (B, T, input_dim), or None for a generator built with input_dim = 0.

An encoder is a bidirectional network, a network per time bin, or a free table by trial. Every q is over the flat z and,
but for BlockTable's, factorised over coordinates; variance = softplus(raw, beta).
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


def recursion(first: Tensor, drive: Tensor, transition: Tensor) -> Tensor:
    """x_1 .. x_T of x_t = A x_{t-1} + v_t, from x_0 (B, D), v (B, T, D) and A (D, D).

    A plain loop: on a CPU it takes .84 ms (B = 104, T = 50, D = 8, gradient included) and 2.96 (D = 64), the log2(T)
    products of a doubling scan 1.15 and 10.8.
    """
    states, state, transposed = [], first, transition.T
    for step in drive.unbind(1):
        state = torch.addmm(step, state, transposed)
        states.append(state)
    return torch.stack(states, 1)


class LinearDynamics(nn.Module):
    """x_t = A x_{t-1} + b + L u_t: a linear dynamical system where u_t is N(0, I) and its noise has variance L Lᵀ."""

    def __init__(self, state_dim: int, input_dim: int) -> None:
        super().__init__()
        self.initial_size = state_dim
        self.transition = nn.Linear(state_dim, state_dim)  # A and b
        self.input_map = nn.Linear(input_dim, state_dim, bias=False) if input_dim else None  # L
        # A slow decay whose stationary variance, 0.3²/(1 - 0.95²), is about that of x_0.
        self.transition.weight.data.copy_(0.95 * torch.eye(state_dim))
        nn.init.zeros_(self.transition.bias)
        if self.input_map is not None:
            nn.init.orthogonal_(self.input_map.weight, gain=0.3)

    def forward(self, initial: Tensor, inputs: Tensor | None, num_steps: int) -> Tensor:
        drive = self.transition.bias.expand(len(initial), num_steps, -1)
        if self.input_map is not None:
            drive = drive + self.input_map(inputs)
        return recursion(initial, drive, self.transition.weight)


class Additive(nn.Module):
    """x_t = h(x_{t-1}) + L u_t, h(x) = x + W₂ g(W₁ x + b₁) + b₂: nonlinear dynamics with additive Gaussian noise."""

    def __init__(self, state_dim: int, input_dim: int, hidden_dim: int, nonlinearity: str) -> None:
        super().__init__()
        self.initial_size, self.activation = state_dim, {"tanh": torch.tanh, "relu": torch.relu}[nonlinearity]
        self.inner, self.outer = nn.Linear(state_dim, hidden_dim), nn.Linear(hidden_dim, state_dim)
        self.input_map = nn.Linear(input_dim, state_dim, bias=False) if input_dim else None  # L
        # Near the identity, and with small noise, whose variance adds up over time.
        nn.init.normal_(self.outer.weight, std=0.1 / hidden_dim**0.5)
        nn.init.zeros_(self.outer.bias)
        if self.input_map is not None:
            nn.init.orthogonal_(self.input_map.weight, gain=0.1)

    def forward(self, initial: Tensor, inputs: Tensor | None, num_steps: int) -> Tensor:
        noise = [0.0] * num_steps if self.input_map is None else self.input_map(inputs).unbind(1)
        states, state = [], initial
        for increment in noise:
            state = state + self.outer(self.activation(self.inner(state))) + increment
            states.append(state)
        return torch.stack(states, 1)


class Recurrent(nn.Module):
    """torch's recurrent networks over all of u in one call; x_t is the hidden state.

    vanilla: x_t = g(W u_t + U x_{t-1} + b), g tanh or relu. gru: torch applies the reset gate after U, tanh(W u_t + b +
    r ⊙ (U x_{t-1} + c)); the slides before, U (r ⊙ x_{t-1}). lstm: x_0 is hidden state and cell, (B, 2 state_dim).
    """

    def __init__(self, kind: str, state_dim: int, input_dim: int, nonlinearity: str) -> None:
        super().__init__()
        self.kind = kind
        self.initial_size = 2 * state_dim if kind == "lstm" else state_dim
        self.input_dim = max(input_dim, 1)  # without inputs a constant 0 is fed, whose weights get no gradient
        if kind == "vanilla":
            self.network = nn.RNN(self.input_dim, state_dim, nonlinearity=nonlinearity, batch_first=True)
        else:
            cell = {"gru": nn.GRU, "lstm": nn.LSTM}[kind]
            self.network = cell(self.input_dim, state_dim, batch_first=True)

    def forward(self, initial: Tensor, inputs: Tensor | None, num_steps: int) -> Tensor:
        if inputs is None:
            inputs = initial.new_zeros(len(initial), num_steps, self.input_dim)
        first = initial[None]
        if self.kind == "lstm":
            first = tuple(part.contiguous() for part in first.chunk(2, dim=2))
        return self.network(inputs, first)[0]

    def train(self, mode: bool = True) -> Recurrent:
        # cuDNN differentiates recurrent networks in training mode only; without dropout the modes are the same.
        super().train(mode)
        self.network.train()
        return self


Generator = LinearDynamics | Additive | Recurrent


def build_generator(kind: str, state_dim: int, input_dim: int, hidden_dim: int, nonlinearity: str) -> Generator:
    """The generator of that name: linear, additive, vanilla, gru or lstm."""
    if kind == "linear":
        return LinearDynamics(state_dim, input_dim)
    if kind == "additive":
        return Additive(state_dim, input_dim, hidden_dim, nonlinearity)
    return Recurrent(kind, state_dim, input_dim, nonlinearity)


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
