"""log P of an 8-bit pixel's level under a Gaussian cut into bins, with its exact derivatives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

BIN_HALF_WIDTH = 1 / 255  # 256 levels on [-1, 1]: bins of width 2/255
# Beyond this many standard deviations erfc nears underflow, and erfcx(y) = exp(y²) erfc(y) takes its place.
TAIL_START = {torch.float32: 10.0, torch.float64: 25.0}
EDGE = -2 / math.sqrt(math.pi)  # d erfc(y)/dy = EDGE exp(-y²)


def log_bin_probability(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P(level of x) under a Gaussian cut into 256 bins on [-1, 1], end bins open; nats, elementwise.

    x: levels l/127.5 - 1, any shape. mean: same shape. log_scale: log σ, a scalar tensor. Differentiable once in
    mean and log_scale; value and gradient keep their precision at any distance from the mean, in float32 for σ up to
    about 30, a bin then being 1/4,000 of it.
    """
    return _LogBinProbability.apply(x, mean, log_scale)


class _LogBinProbability(torch.autograd.Function):
    """By one kernel on CUDA, by torch's operators elsewhere and where torch.compile fuses them."""

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        if mean.is_cuda and not torch.compiler.is_compiling():
            # The first argument's layout is that of the results: the mean's, for x may come in another.
            value, *slopes = _kernel()(mean, x, log_scale, tail_start=TAIL_START[x.dtype] * math.sqrt(0.5))
        else:
            value, *slopes = _by_operators(x, mean, log_scale)
        ctx.save_for_backward(*slopes)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        to_mean, to_log_scale = ctx.saved_tensors
        for_mean = gradient * to_mean if ctx.needs_input_grad[1] else None
        for_scale = (gradient * to_log_scale).sum() * EDGE if ctx.needs_input_grad[2] else None
        return None, for_mean, for_scale


def _by_operators(x: Tensor, mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log P, its derivative by the mean, and that by log σ over EDGE.

    Lengths are in units of √2 σ. With u = |x - mean| and a bin's half width h, reflection puts the bin into the upper
    tail: P = (erfc(u - h) - erfc(u + h))/2, which keeps full relative precision; an end bin is open on its outer side.
    Beyond TAIL_START the same difference is taken of erfcx.
    """
    # In place where a value is not needed again: passes over memory take this function's time.
    unit = torch.exp(-log_scale) * math.sqrt(0.5)
    t = (mean - x).mul_(unit)  # in the mean's layout, for x may come in another
    sign = torch.ones_like(t).copysign_(t)
    u, h = t.abs_(), BIN_HALF_WIDTH * unit
    near, far = u - h, u + h
    # The outer side of the two end bins, seen after the reflection that makes t positive.
    inward = sign * x
    closed_near, closed_far = inward < 1 - BIN_HALF_WIDTH, inward > -1 + BIN_HALF_WIDTH

    twice = torch.where(closed_near, near.erfc(), 2.0).sub_(torch.where(closed_far, far.erfc(), 0.0))  # 2 P
    at_near = near.square().neg_().exp_().div_(twice)  # exp(-near²)/2P
    decay = torch.where(closed_far, u.mul_(-4 * h).exp_(), 0.0)  # exp(near² - far²), 0 where there is no far edge
    log_twice = twice.log_()

    start = TAIL_START[x.dtype] * math.sqrt(0.5)
    is_tail = (near > start) & closed_near
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        # Both forms of every element, one of which is discarded: asking where the tail is waits for the device.
        tail, tail_at_near = _tail(near.clamp_min(start), far.clamp_min(start), decay)
        log_twice, at_near = torch.where(is_tail, tail, log_twice), torch.where(is_tail, tail_at_near, at_near)
    elif bool(is_tail.any()):  # on a CPU asking does not wait, and mostly no element is in the tail
        where = is_tail.nonzero(as_tuple=True) if is_tail.ndim else ...
        log_twice[where], at_near[where] = _tail(near[where], far[where], decay[where])

    at_far = at_near * decay
    at_near = torch.where(closed_near, at_near, 0.0)
    to_log_scale = (at_far * far).addcmul_(at_near, near, value=-1)
    to_mean = at_far.sub_(at_near).mul_(sign).mul_(unit * -EDGE)
    # The value not in place: Dynamo 2.11 takes an output written in place for a constant.
    return log_twice - math.log(2), to_mean, to_log_scale


def _tail(near: Tensor, far: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """log(erfc near - erfc far) and exp(-near²) over that difference; decay: exp(near² - far²)."""
    scaled = torch.special.erfcx(near).addcmul_(torch.special.erfcx(far), decay, value=-1)
    return torch.log(scaled).addcmul_(near, near, value=-1), scaled.reciprocal_()


# `_by_operators` of one element, in each of which only its own form is evaluated.
KERNEL = """
template <typename T> void log_bin_probability(
    T mean, T x, T log_scale, T half_width, T edge, T tail_start, T& value, T& to_mean, T& to_log_scale) {
  T unit = exp(-log_scale) * sqrt(T(0.5)), t = (mean - x) * unit, sign = copysign(T(1), t);
  T u = fabs(t), h = half_width * unit, near = u - h, far = u + h;
  bool closed_near = sign * x < 1 - half_width, closed_far = half_width - 1 < sign * x;
  bool in_tail = closed_near && tail_start < near;
  T decay = closed_far ? exp(-4 * h * u) : T(0);
  T twice = in_tail ? erfcx(near) - erfcx(far) * decay
                    : (closed_near ? erfc(near) : T(2)) - (closed_far ? erfc(far) : T(0));
  T at_near = (in_tail ? T(1) : exp(-near * near)) / twice, at_far = at_near * decay;
  at_near = closed_near ? at_near : T(0);
  value = log(twice) - (in_tail ? near * near : T(0)) - log(T(2));
  to_mean = (at_near - at_far) * sign * unit * edge;
  to_log_scale = at_far * far - at_near * near;
}
"""


@functools.cache
def _kernel() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """KERNEL of tensors on CUDA, which torch compiles by NVRTC at its first use and keeps in its cache of kernels."""
    constants = {"half_width": BIN_HALF_WIDTH, "edge": EDGE, "tail_start": math.nan}
    return torch.cuda.jiterator._create_multi_output_jit_fn(KERNEL, num_outputs=3, **constants)
