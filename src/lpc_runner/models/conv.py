"""The paper's convolutional networks (Table 2) for images of 28, 32 or 64 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lpc_runner.base.likelihoods import Likelihood
from lpc_runner.base.schema import PositiveFloat, PositiveInt, checked
from lpc_runner.models.latent import Encoder, LatentVariableModel
from lpc_runner.models.upsampling import Doubling, FromPoint

SIDES = (28, 32, 64)


def table_2_decoder(latent_dim: int, channels: int, side: int) -> nn.Sequential:
    """From z (B, latent_dim) to η (B, channels, side, side), side 28, 32 or 64; maps of 4x4, 8x8, 16x16 between."""
    # The second to last layer is the only one that depends on the image side.
    last_hidden = {
        28: nn.Conv2d(32, 32, 3, 1, 0),
        32: nn.Conv2d(32, 32, 3, 1, 1),
        64: Doubling(32, 32),
    }[side]
    return nn.Sequential(
        nn.Linear(latent_dim, 256), nn.SiLU(), nn.Unflatten(1, (256, 1, 1)),
        FromPoint(256, 64, 4, 1, 0), nn.SiLU(),
        Doubling(64, 64), nn.SiLU(),
        Doubling(64, 32), nn.SiLU(),
        last_hidden, nn.SiLU(),
        Doubling(32, channels),
    )  # fmt: skip


def table_2_encoder(latent_dim: int, channels: int, side: int) -> nn.Sequential:
    """From x (B, channels, side, side) to (B, 2 latent_dim)."""
    first = nn.Conv2d(channels, 32, 3, 3, 1) if side == 64 else nn.Conv2d(channels, 32, 4, 2, 1)
    fourth = nn.Conv2d(64, 64, 3, 2, 1) if side == 28 else nn.Conv2d(64, 64, 4, 2, 1)
    return nn.Sequential(
        first, nn.SiLU(),
        nn.Conv2d(32, 32, 4, 2, 1), nn.SiLU(),
        nn.Conv2d(32, 64, 4, 2, 1), nn.SiLU(),
        fourth, nn.SiLU(),
        nn.Conv2d(64, 256, 4, 2, 1), nn.SiLU(),
        nn.Flatten(), nn.Linear(256, 2 * latent_dim),
    )  # fmt: skip


class Conv(LatentVariableModel):
    """Table 2 of the paper; data_shape is (C, side, side) with side 28, 32 or 64, any number of channels."""

    @checked
    def __init__(
        self,
        data_shape: tuple[int, ...],
        latent_dim: PositiveInt,
        prior_scale: PositiveFloat,
        likelihood: Likelihood,
        variance_beta: PositiveFloat,
    ) -> None:
        super().__init__(latent_dim, prior_scale, likelihood)
        channels, *sides = data_shape
        if sides not in [[side, side] for side in SIDES]:
            raise ValueError(
                f"model=conv takes square images of {SIDES} pixels, got {'x'.join(map(str, sides))} (model=mlp: any)"
            )
        self.channels, self.side, self.variance_beta = channels, sides[0], variance_beta
        self.decoder = table_2_decoder(latent_dim, channels, self.side).to(memory_format=torch.channels_last)

    def predict(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def build_encoder(self) -> Encoder:
        body = table_2_encoder(self.latent_dim, self.channels, self.side).to(memory_format=torch.channels_last)
        return Encoder(body, self.variance_beta)
