"""Other packages on the same chain: torchebm's Langevin sampler, and JAX with the whole chain in one jit(scan)."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lpc_runner.base.bins import BIN_HALF_WIDTH, TAIL_START
from lpc_runner.base.distributions import LOG_2PI, DiscretisedGaussian
from lpc_runner.models.conv import Conv

STEP_SIZE, BETA, EPS = 1e-3, 0.25, 1e-8  # of every chain that is compared


def torchebm_chain(model: Conv, x: Tensor, num_steps: int) -> tuple[Callable[[int], Any], str]:
    """torchebm's `LangevinDynamics` on log p(x, z): z alone, unpreconditioned, no gradient of θ; and its version.

    Raises ImportError without torchebm.
    """
    import torchebm  # pyright: ignore[reportMissingImports]  # of an extra, as below
    from torchebm.core import BaseModel  # pyright: ignore[reportMissingImports]
    from torchebm.samplers import LangevinDynamics  # pyright: ignore[reportMissingImports]

    class Energy(BaseModel):
        def forward(self, z: Tensor) -> Tensor:
            return -model.log_joint(x, z)

    model.requires_grad_(False)  # no gradient of θ is asked for
    sampler = LangevinDynamics(Energy(device=x.device), step_size=STEP_SIZE, device=x.device)

    def update(number: int) -> Tensor:
        source = torch.Generator(x.device).manual_seed(number)
        start = torch.randn(len(x), model.latent_dim, generator=source, device=x.device)
        return sampler.sample(x=start, n_steps=num_steps, generator=source)

    return update, torchebm.__version__


def jax_chain(model: Conv, x: Tensor, num_steps: int, precision: str = "float32") -> tuple[Callable[..., Any], str]:
    """The preconditioned chain in JAX, jit(scan): drift and θ's gradient from one pass, sums for forward KL; version.

    The function takes an update's number and, for the tests, z(0) and ξ(1) .. ξ(T); it returns z(T), the sum over
    states of ∇θ, the sums of z and z², and log p(x, z(0)), after waiting for the device. Nothing of the encoder and no
    optimiser's step are in it. precision: of products and convolutions, `float32` or `tensorfloat32`, which XLA by
    itself takes on a card that has it. Raises ImportError without JAX, RuntimeError where JAX does not see x's kind of
    device.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes three quarters of a card's memory
    import jax  # pyright: ignore[reportMissingImports]  # of an extra, as below
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

    place = jax.devices("gpu" if x.is_cuda else "cpu")[0]
    theta, decode = _jax_decoder(model, jax, jnp, on_cpu=not x.is_cuda)
    assert isinstance(model.likelihood, DiscretisedGaussian)
    theta["log_scale"] = jnp.asarray(model.likelihood.log_scale.detach().cpu().numpy())
    log_bin = _jax_log_bin(jax, jnp)
    levels = jax.device_put(jnp.asarray(x.permute(0, 2, 3, 1).contiguous().cpu().numpy()), place)
    theta = jax.device_put(theta, place)
    shape = (len(x), model.latent_dim)

    def log_joint(z, theta, levels):
        pixels = log_bin(levels, decode(theta, z), theta["log_scale"]).sum((1, 2, 3))
        prior = -0.5 * ((z / model.prior.scale) ** 2 + LOG_2PI + 2 * jnp.log(model.prior.scale)).sum(1)
        return pixels + prior

    def total(z, theta, levels):
        values = log_joint(z, theta, levels)
        return values.sum(), values

    gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)

    def chain(theta, levels, z, key, noise):
        def step(carry, t):
            z, moment, sums, first, second = carry
            (_, values), (drift, theta_gradient) = gradient(z, theta, levels)
            moment = BETA * moment + (1 - BETA) * drift**2
            scale = 1 / (jnp.sqrt(moment / (1 - BETA ** (t + 1.0))) + EPS)
            xi = jax.random.normal(jax.random.fold_in(key, t), shape) if noise is None else noise[t]
            z = z + STEP_SIZE * scale * drift + jnp.sqrt(2 * STEP_SIZE * scale) * xi
            sums = jax.tree.map(jnp.add, sums, theta_gradient)
            return (z, moment, sums, first + z, second + z**2), (values.mean(), jnp.linalg.norm(drift, axis=1).mean())

        zero = jnp.zeros(shape)
        carry = (z, zero, jax.tree.map(jnp.zeros_like, theta), zero, zero)
        (z, _, sums, first, second), trace = jax.lax.scan(step, carry, jnp.arange(num_steps))
        return z, sums, first, second, trace[0]

    compiled = jax.jit(chain)

    def update(number: int, z: Tensor | None = None, noise: Tensor | None = None) -> Any:
        key = jax.random.key(number)
        start = jax.random.normal(key, shape) if z is None else jnp.asarray(z.numpy())
        fixed = None if noise is None else jnp.asarray(noise.numpy())
        with jax.default_matmul_precision(precision):
            return jax.block_until_ready(compiled(theta, levels, jax.device_put(start, place), key, fixed))

    return update, jax.__version__


def _jax_decoder(model: Conv, jax: Any, jnp: Any, on_cpu: bool) -> tuple[dict[str, Any], Callable]:
    """The decoder's weights and function, channels last."""
    theta, layers = {}, []
    for number, layer in enumerate(model.decoder):
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            assert layer.bias is not None
            weight, apply = layer.weight.detach().cpu(), _jax_layer(layer, jax, jnp, on_cpu)
            if isinstance(layer, nn.Linear):
                weight = weight.T
            else:
                weight = weight.permute(2, 3, 0, 1) if layer.transposed else weight.permute(2, 3, 1, 0)
            theta[f"weight{number}"] = jnp.asarray(weight.contiguous().numpy())
            theta[f"bias{number}"] = jnp.asarray(layer.bias.detach().cpu().numpy())
            layers.append((number, apply))

    def decode(theta, z):
        hidden = z
        for number, apply in layers:
            hidden = apply(hidden, theta[f"weight{number}"]) + theta[f"bias{number}"]
            hidden = hidden[:, None, None, :] if hidden.ndim == 2 else hidden
            hidden = jax.nn.silu(hidden) if number != layers[-1][0] else hidden
        return hidden

    return theta, decode


def _jax_layer(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, jax: Any, jnp: Any, on_cpu: bool) -> Callable:
    """(hidden, weight) -> the layer without its bias; weights of convolutions are (height, width, in, out).

    A transposed convolution of stride 2 is a convolution of the dilated input. On a CPU, where XLA's convolutions and
    their gradients are slow, all are matrix products of shifted copies.
    """
    if isinstance(layer, nn.Linear):
        return lambda hidden, weight: hidden @ weight

    def convolve(hidden, weight, stride, dilation, border):
        numbers, padding = ("NHWC", "HWIO", "NHWC"), [(border, border)] * 2
        return jax.lax.conv_general_dilated(
            hidden, weight, stride, padding, lhs_dilation=dilation, dimension_numbers=numbers
        )

    if not layer.transposed and not on_cpu:
        return lambda hidden, weight: convolve(hidden, weight, layer.stride, (1, 1), layer.padding[0])
    if not layer.transposed:  # of stride 1: one matrix product of shifted copies

        def shifted(hidden, weight):
            rows, columns = weight.shape[:2]
            border = layer.padding[0]
            padded = jnp.pad(hidden, [(0, 0), (border, border), (border, border), (0, 0)])
            height, width = padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
            copies = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
            return jnp.concatenate(copies, -1) @ weight.reshape(-1, weight.shape[-1])

        return shifted
    if layer.stride == (1, 1):  # of a 1x1 image
        return lambda hidden, weight: jnp.einsum("bi,hwio->bhwo", hidden[:, 0, 0], weight)
    if not on_cpu:
        border = layer.kernel_size[0] - 1 - int(layer.padding[0])
        return lambda hidden, weight: convolve(hidden, weight[::-1, ::-1], (1, 1), layer.stride, border)

    def overlap(hidden, weight):  # kernel 4, stride 2, padding 1: output 2 (i + q) + r - 1 takes tap 2 q + r of input i
        batch, height, width, _ = hidden.shape
        taps = weight.reshape(2, 2, 2, 2, *weight.shape[2:])
        patches = jnp.einsum("byxi,qrstio->qsbyrxto", hidden, taps)
        parts = [
            jnp.pad(patches[q, s], [(0, 0), (q, 1 - q), (0, 0), (s, 1 - s), (0, 0), (0, 0)])
            for q in (0, 1)
            for s in (0, 1)
        ]
        return reduce(jnp.add, parts).reshape(batch, 2 * height + 2, 2 * width + 2, -1)[:, 1:-1, 1:-1]

    return overlap


def _jax_log_bin(jax: Any, jnp: Any) -> Callable:
    """`bins.log_bin_probability` with the same arithmetic and the same derivatives."""
    start, root_half = TAIL_START[torch.float32], 0.5**0.5

    def tail_series(y):
        r = 1 / (y * y)
        series = jnp.ones_like(r)
        for n in range(7, 0, -1):
            series = 1 - (2 * n - 1) * r * series
        return series

    def parts(x, mean, log_scale):
        inverse = jnp.exp(-log_scale)
        t = (x - mean) * inverse
        u, h = jnp.abs(t), BIN_HALF_WIDTH * inverse
        near, far = u - h, u + h
        outward = jnp.where(t < 0, -x, x)
        closed_far = (outward < 1 - BIN_HALF_WIDTH).astype(x.dtype)
        closed_near = outward > -1 + BIN_HALF_WIDTH
        upper = jnp.where(closed_near, jax.lax.erfc(near * root_half), 2.0)
        probability = (upper - jax.lax.erfc(far * root_half) * closed_far) / 2
        ratio = jnp.exp(-0.5 * (near * near + LOG_2PI)) / probability
        far_ratio = jnp.exp(-0.5 * (far * far + LOG_2PI)) * closed_far / probability
        is_tail = (near > start) & closed_near
        y = jnp.maximum(near, start)
        y_far = jnp.maximum(far, y)
        decay, series = jnp.exp(-2 * u * h) * closed_far, tail_series(y)
        kept = jnp.where(is_tail, 1 - decay * (y / y_far) * (tail_series(y_far) / series), 1.0)
        tail = jnp.log(series * kept / y) - 0.5 * (y * y + LOG_2PI)
        ratio = jnp.where(is_tail, y / (series * kept), ratio)
        far_ratio = jnp.where(is_tail, ratio * decay, far_ratio)
        near_ratio = jnp.where(closed_near, ratio, 0.0)
        slope = (far_ratio - near_ratio) * jnp.where(t < 0, -1.0, 1.0)
        value = jnp.where(is_tail, tail, jnp.log(probability))
        return value, slope * inverse, slope * t + (far_ratio + near_ratio) * h

    @jax.custom_vjp
    def log_bin(x, mean, log_scale):
        return parts(x, mean, log_scale)[0]

    def forward(x, mean, log_scale):
        value, to_mean, to_log_scale = parts(x, mean, log_scale)
        return value, (to_mean, to_log_scale)

    def backward(saved, gradient):
        return jnp.zeros_like(gradient), -gradient * saved[0], -(gradient * saved[1]).sum()

    log_bin.defvjp(forward, backward)
    return log_bin
