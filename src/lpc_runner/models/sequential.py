"""Sequential models p(x, z; θ) of counts or real values (T, N): nonlinear factor analysis, linear systems, LFADS.

Everything is noncentred: z is flat and N(0, I), and whatever prior the slides put on states and inputs is a map of z.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lpc_runner.base.likelihoods import Likelihood
from lpc_runner.base.schema import NonNegativeInt, PositiveFloat, PositiveInt, checked
from lpc_runner.models.latent import LatentVariableModel
from lpc_runner.models.sequence_networks import (
    BiRNN,
    BlockTable,
    FreeTable,
    PerBin,
    RawVariance,
    build_generator,
    recursion,
)


class Rollout(NamedTuple):
    """States x_1 .. x_T (B, T, Dx), factors (B, T, F) and inputs u_1 .. u_T (B, T, Du), or None, of one z."""

    states: Tensor
    factors: Tensor
    inputs: Tensor | None


class SequentialModel(LatentVariableModel):
    """log p(x, z) = Σ_t Σ_n log p(x_tn | η_tn) + log N(z; 0, I), η = C f_t + d, over the held-in neurons.

    The last num_held_out neurons are held out: they train their own rows of C and d from the factors, and neither z
    nor any other parameter sees them. blocks: where each named part of z lies in the flat z.
    """

    data_kinds = ("spike counts", "real-valued series")

    def __init__(
        self,
        data_shape: tuple[int, ...],
        num_held_out: int,
        likelihood: Likelihood,
        shapes: dict[str, tuple[int, ...]],
        num_factors: int,
        encoder: str,
        encoder_dim: int,
        variance: RawVariance,
        num_train: int,
        table_learning_rate: float,
    ) -> None:
        if len(data_shape) != 2:
            raise ValueError(f"sequential models take trials of shape (time, neurons), got {tuple(data_shape)}")
        ends = [0, *accumulate(map(math.prod, shapes.values()))]
        super().__init__(ends[-1], 1.0, likelihood)
        self.shapes = shapes
        self.blocks = {name: slice(*ends) for name, ends in zip(shapes, pairwise(ends))}
        self.num_steps, self.num_neurons = data_shape
        if num_held_out >= self.num_neurons:
            raise ValueError(f"num_held_out must be less than the {self.num_neurons} neurons, got {num_held_out}")
        self.held_in = slice(0, self.num_neurons - num_held_out)
        self.held_out = slice(self.num_neurons - num_held_out, self.num_neurons)
        self.readout = nn.Linear(num_factors, self.num_neurons)  # C and d
        nn.init.constant_(self.readout.bias, likelihood.initial_predictor)
        self.encoder, self.encoder_dim, self.variance = encoder, encoder_dim, variance
        self.num_train, self.table_learning_rate = num_train, table_learning_rate
        self.factorised_q = encoder != "free_block"

    def build_encoder(self) -> nn.Module:
        shapes, num_held_in = list(self.shapes.values()), self.held_in.stop
        if self.encoder == "mlp":
            return PerBin(num_held_in, self.encoder_dim, shapes[0][1], self.variance)
        if self.encoder == "birnn":
            return BiRNN(num_held_in, self.encoder_dim, shapes, self.variance)
        if self.encoder == "free_block":
            return BlockTable(self.num_train, shapes, self.variance, self.table_learning_rate)
        return FreeTable(self.num_train, self.latent_dim, self.variance, self.table_learning_rate)

    @abstractmethod
    def run(self, z: Tensor) -> Rollout:
        """States, factors and inputs from z (B, latent_dim)."""

    def named(self, z: Tensor) -> dict[str, Tensor]:
        """Views of z (B, latent_dim) by block, (B, Dx) or (B, T, Du)."""
        return {name: z[:, block].unflatten(1, self.shapes[name]) for name, block in self.blocks.items()}

    def predictor(self, factors: Tensor, neurons: slice = slice(None)) -> Tensor:
        """η = C f + d of those neurons, (B, T, n), from factors (B, T, F)."""
        return F.linear(factors, self.readout.weight[neurons], self.readout.bias[neurons])

    def predict(self, z: Tensor) -> Tensor:
        return self.predictor(self.run(z).factors)

    def log_likelihood(self, x: Tensor, z: Tensor, neurons: slice) -> Tensor:
        """log p(x | z) of those neurons in nats, (B,); x (B, T, N), whose other neurons are not read."""
        return self.likelihood(x[..., neurons], self.predictor(self.run(z).factors, neurons))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z; θ) of the held-in neurons in nats, (B,).

        In training mode a term of value 0 is added, whose gradient is that of the held-out neurons' log-likelihood in
        their own readout alone. In evaluation mode the held-out neurons of x are not read.
        """
        factors = self.run(z).factors
        value = self.likelihood(x[..., self.held_in], self.predictor(factors, self.held_in))
        if self.training and self.held_out.start < self.num_neurons:
            assert isinstance(self.likelihood, nn.Module)
            constants = {name: parameter.detach() for name, parameter in self.likelihood.named_parameters()}
            predictor = self.predictor(factors.detach(), self.held_out)
            held_out = functional_call(self.likelihood, constants, (x[..., self.held_out], predictor))
            value = value + (held_out - held_out.detach())
        return value + self.prior.log_prob(z)

    def compared(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., self.held_in], self.decode(z)[..., self.held_in]


class FactorAnalysis(SequentialModel):
    """Nonlinear factor analysis, a VAE per time bin: x_t = z_t, f_t a fully connected network of x_t, no dynamics.

    hidden: widths of its layers, SiLU after each; with none f_t = x_t, linear factor analysis. encoder: `mlp`, a
    network of one hidden layer per time bin, or as in LFADS. The other arguments are LFADS's.
    """

    @checked
    def __init__(
        self,
        data_shape: tuple[int, ...],
        num_train: PositiveInt,
        num_held_out: NonNegativeInt,
        likelihood: Likelihood,
        state_dim: PositiveInt,
        hidden: list[PositiveInt],
        encoder: Literal["mlp", "birnn", "free", "free_block"],
        encoder_dim: PositiveInt,
        variance_beta: PositiveFloat,
        initial_variance: PositiveFloat,
        table_learning_rate: PositiveFloat,
    ) -> None:
        widths = [state_dim, *hidden]
        variance, shapes = RawVariance(variance_beta, initial_variance), {"states": (data_shape[0], state_dim)}
        of_encoder = (encoder, encoder_dim, variance, num_train, table_learning_rate)
        super().__init__(data_shape, num_held_out, likelihood, shapes, widths[-1], *of_encoder)
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.SiLU())]
        self.features = nn.Sequential(*layers)

    def run(self, z: Tensor) -> Rollout:
        states = self.named(z)["states"]
        return Rollout(states, self.features(states), None)


class LFADS(SequentialModel):
    """x_0 = m_0 + L_0 z_0, x_t = generator(u_t, x_{t-1}), f_t = F x_t + e, η_t = C f_t + d; p(z) = N(0, I).

    generator: `linear`, `additive` (x_t = h(x_{t-1}) + L u_t), `vanilla`, `gru`, `lstm`; the linear one with identity
    factors is the linear dynamical system, with Poisson emission the Poisson LDS. nonlinearity: of vanilla and
    additive. hidden_dim: width of additive's h. initial_dim: size of z_0, null for that of x_0. inputs: `inferred`
    u_t of size input_dim, or `none`. input_prior: `white`, u_t = z_t; `ar1`, see AR1. num_factors: null for f_t = x_t.
    encoder: `birnn` of encoder_dim units each way, `free`, a table of num_train rows that learns at
    table_learning_rate, or `free_block`, one with a full covariance within z_0 and within each u_t. variance_beta,
    initial_variance: see RawVariance.
    """

    @checked
    def __init__(
        self,
        data_shape: tuple[int, ...],
        num_train: PositiveInt,
        num_held_out: NonNegativeInt,
        likelihood: Likelihood,
        generator: Literal["linear", "additive", "vanilla", "gru", "lstm"],
        nonlinearity: Literal["tanh", "relu"],
        hidden_dim: PositiveInt,
        state_dim: PositiveInt,
        initial_dim: PositiveInt | None,
        inputs: Literal["inferred", "none"],
        input_dim: PositiveInt,
        input_prior: Literal["white", "ar1"],
        num_factors: PositiveInt | None,
        encoder: Literal["birnn", "free", "free_block"],
        encoder_dim: PositiveInt,
        variance_beta: PositiveFloat,
        initial_variance: PositiveFloat,
        table_learning_rate: PositiveFloat,
    ) -> None:
        input_dim = input_dim if inputs == "inferred" else 0
        network = build_generator(generator, state_dim, input_dim, hidden_dim, nonlinearity)
        initial_dim = initial_dim or network.initial_size
        shapes: dict[str, tuple[int, ...]] = {"initial_condition": (initial_dim,)}
        if input_dim:
            shapes["inputs"] = (data_shape[0], input_dim)
        variance = RawVariance(variance_beta, initial_variance)
        of_encoder = (encoder, encoder_dim, variance, num_train, table_learning_rate)
        super().__init__(data_shape, num_held_out, likelihood, shapes, num_factors or state_dim, *of_encoder)
        self.generator = network
        self.initial_map = nn.Linear(initial_dim, network.initial_size)  # m_0 and L_0
        nn.init.zeros_(self.initial_map.bias)
        if generator in ("linear", "additive"):
            nn.init.orthogonal_(self.initial_map.weight)
        self.factor_map = nn.Identity() if num_factors is None else nn.Linear(state_dim, num_factors)
        self.input_prior = AR1(input_dim) if input_dim and input_prior == "ar1" else None

    def run(self, z: Tensor) -> Rollout:
        parts = self.named(z)
        inputs = parts.get("inputs")
        if self.input_prior is not None:
            inputs = self.input_prior(inputs)
        states = self.generator(self.initial_map(parts["initial_condition"]), inputs, self.num_steps)
        return Rollout(states, self.factor_map(states), inputs)


class AR1(nn.Module):
    """u_1 = s z_1, u_t = ρ u_{t-1} + s sqrt(1 - ρ²) z_t: stationary with variance s², ρ and s learned per input."""

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((input_dim,), 2.0))  # ρ = sigmoid(logit), .88: a time constant of 8 bins
        self.log_scale = nn.Parameter(torch.zeros(input_dim))

    def forward(self, z: Tensor) -> Tensor:
        """u (B, T, Du) from white z of that shape."""
        correlation = torch.sigmoid(self.logit)
        fresh = torch.cat([z[:, :1], (1 - correlation.square()).sqrt() * z[:, 1:]], 1)
        return self.log_scale.exp() * recursion(torch.zeros_like(z[:, 0]), fresh, torch.diag(correlation))
