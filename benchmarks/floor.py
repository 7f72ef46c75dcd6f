"""The least time a step can take on a device: its arithmetic and its traffic over rates measured there and then."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lpc_runner.inference.engine import Eager, Precision
from lpc_runner.models.conv import Conv

WIDTH = {"cuda": 8192, "cpu": 1536}  # of the matrices whose product is timed
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes of the tensor that is copied: far more than any cache


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """Median time of `work`, after one untimed call."""
    times = []
    for _ in range(rounds + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measured_rates(device: torch.device, precision: Precision) -> dict[str, float]:
    """flops: per second, of a square matrix product. bytes: per second, read and written by a copy."""
    width, dtype = WIDTH[device.type], torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    with Eager(precision, device).arithmetic():
        product = median_seconds(lambda: left @ right, device)
    source = torch.zeros(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device)
    return {"flops": 2 * width**3 / product, "bytes": 2 * COPIED[device.type] / copy}


@contextmanager
def torchs_layers(model: Conv) -> Iterator[None]:
    """Inside, transposed convolutions are torch's own layers; outside they give the same numbers in less time."""
    ours = {layer: type(layer) for layer in model.decoder if isinstance(layer, nn.ConvTranspose2d)}
    try:
        for layer in ours:
            layer.__class__ = nn.ConvTranspose2d
        yield
    finally:
        for layer, kind in ours.items():
            layer.__class__ = kind


def work_of_a_step(model: Conv, x: Tensor, precision: Precision) -> dict[str, float]:
    """flops: multiplications and additions of layers, forward and backward with θ. bytes: the least they can move.

    Counted as moved: the output of every layer and its gradient, written and read once each (an activation function
    and the likelihood cost nothing, as if fused), θ read twice, and the sum of its gradients read and written.
    """
    z, sizes, hooks = torch.randn(len(x), model.latent_dim, device=x.device, requires_grad=True), [], []
    for layer in model.decoder:
        if list(layer.parameters()):
            hooks.append(layer.register_forward_hook(lambda module, given, output: sizes.append(output.numel())))
    with torchs_layers(model), FlopCounterMode(display=False) as counter:
        model.log_joint(x, z).sum().backward()  # the counter cannot follow autograd.grad, whose products are the same
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    item, num_parameters = 2 if precision == "bf16" else 4, sum(p.numel() for p in model.parameters())
    moved = 4 * sum(sizes) * item + num_parameters * (2 * item + 2 * 4)
    return {"flops": float(counter.get_total_flops()), "bytes": float(moved)}


def floor_seconds(work: dict[str, float], rates: dict[str, float]) -> float:
    """The longer of arithmetic and traffic, as if they overlapped fully."""
    return max(work[name] / rates[name] for name in ("flops", "bytes"))
