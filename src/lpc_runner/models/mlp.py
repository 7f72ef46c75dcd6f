"""Fully connected networks for images of any shape."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from lpc_runner.base.likelihoods import Likelihood
from lpc_runner.base.schema import PositiveFloat, PositiveInt, checked
from lpc_runner.models.latent import Encoder, LatentVariableModel

ACTIVATIONS = {"silu": nn.SiLU, "tanh": nn.Tanh, "relu": nn.ReLU}


def _network(sizes: list[int], activation: str) -> list[nn.Module]:
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
            *_network([latent_dim, *hidden, self.data_dim], activation), nn.Unflatten(1, tuple(data_shape))
        )

    def predict(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def build_encoder(self) -> Encoder:
        sizes = [self.data_dim, *reversed(self.hidden), 2 * self.latent_dim]
        return Encoder(nn.Sequential(nn.Flatten(), *_network(sizes, self.activation)), self.variance_beta)
