"""The paper's convolutional networks (Table 2) for images of 28, 32 or 64 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from lpc_runner.base.likelihoods import Likelihood
from lpc_runner.base.schema import PositiveFloat, PositiveInt, checked
from lpc_runner.models.latent import Encoder, LatentVariableModel

SIDES = (28, 32, 64)


class FromPoint(nn.ConvTranspose2d):
    """A transposed convolution of a 1x1 image without padding: one matrix product, whose result is channels last."""

    def forward(self, hidden: Tensor) -> Tensor:
        height, width = self.kernel_size
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        spread = hidden.flatten(1) @ weight
        return (spread.view(-1, height, width, self.out_channels) + self.bias).permute(0, 3, 1, 2)


class Doubling(nn.ConvTranspose2d):
    """A transposed convolution with kernel 4, stride 2 and padding 1: (B, in, H, W) -> (B, out, 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 4, 2, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.device.type == "cpu":
            return _DoublingOnCPU.apply(hidden, self.weight, self.bias)
        return super().forward(hidden)


class _DoublingOnCPU(torch.autograd.Function):
    """`Doubling` around two weaknesses of oneDNN: images as output, and weight gradients in bfloat16.

    Its transposed convolution pads 3 channels to 16. The same numbers are a 3x3 convolution to one channel for each
    of the four pixels of a 2x2 square, which fill those 16 better, although it has 9/4 of the arithmetic.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        channels = weight.shape[1]
        if 4 * channels > 16:
            return nn.functional.conv_transpose2d(hidden, weight, bias, 2, 1)
        by_pixel = nn.functional.conv2d(hidden, _by_pixel(weight), bias.repeat(4), 1, 1).permute(0, 2, 3, 1)
        batch, height, width = by_pixel.shape[:3]
        squares = by_pixel.reshape(batch, height, width, 2, 2, channels).transpose(2, 3)
        return squares.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        (hidden, weight), (to_hidden, to_weight, to_bias) = ctx.saved_tensors, ctx.needs_input_grad
        for_hidden = nn.functional.conv2d(gradient, weight.to(gradient.dtype), None, 2, 1) if to_hidden else None
        exact = gradient.to(weight.dtype) if to_weight or to_bias else None
        for_weight = conv2d_weight(exact, weight.shape, hidden.to(weight.dtype), 2, 1) if to_weight else None
        return for_hidden, for_weight, exact.sum((0, 2, 3)) if to_bias else None


def _by_pixel(weight: Tensor) -> Tensor:
    """Weights (in, out, 4, 4) of `Doubling` as those of a 3x3 convolution to (2, 2, out) channels."""
    # Row 2y of the result sees rows y - 1 and y by weights 3 and 1; row 2y + 1 sees rows y and y + 1 by 2 and 0.
    kernels = weight.new_zeros(2, 2, weight.shape[1], len(weight), 3, 3)
    turned = weight.transpose(0, 1).flip(2, 3)
    for i in range(2):
        for j in range(2):
            kernels[i, j, :, :, i : i + 2, j : j + 2] = turned[:, :, i::2, j::2]
    return kernels.flatten(0, 2).contiguous(memory_format=torch.channels_last)


def _decoder(latent_dim: int, channels: int, side: int) -> nn.Sequential:
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


def _encoder(latent_dim: int, channels: int, side: int) -> nn.Sequential:
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
        self.decoder = _decoder(latent_dim, channels, self.side).to(memory_format=torch.channels_last)

    def predict(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def build_encoder(self) -> Encoder:
        body = _encoder(self.latent_dim, self.channels, self.side).to(memory_format=torch.channels_last)
        return Encoder(body, self.variance_beta)
