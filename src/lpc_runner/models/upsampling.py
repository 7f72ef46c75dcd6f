"""Layers that enlarge images in decoders: transposed convolutions, with faster equivalents where a CPU has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight


class FromPoint(nn.ConvTranspose2d):
    """A transposed convolution of a 1x1 image without padding: one matrix product, whose result is channels last."""

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.bias is not None
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
        return for_hidden, for_weight, exact.sum((0, 2, 3)) if to_bias and exact is not None else None


def _by_pixel(weight: Tensor) -> Tensor:
    """Weights (in, out, 4, 4) of `Doubling` as those of a 3x3 convolution to (2, 2, out) channels."""
    # Row 2y of the result sees rows y - 1 and y by weights 3 and 1; row 2y + 1 sees rows y and y + 1 by 2 and 0.
    kernels = weight.new_zeros(2, 2, weight.shape[1], len(weight), 3, 3)
    turned = weight.transpose(0, 1).flip(2, 3)
    for i in range(2):
        for j in range(2):
            kernels[i, j, :, :, i : i + 2, j : j + 2] = turned[:, :, i::2, j::2]
    return kernels.flatten(0, 2).contiguous(memory_format=torch.channels_last)
