"""What deferring weight gradients could save at most: k products over one batch each, or one over k batches.

A step's weight gradients need its layers' inputs and output gradients alone, so those of k steps could be kept and
reduced at once. Here both ways are timed on tensors of the decoder's own shapes, without the cost of keeping them;
what is saved, as a share of a whole step, is a bound on what an engine that does so could gain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.floor import median_seconds
from benchmarks.variants import Work, build_model, images
from lpc_runner.models.conv import Conv
from lpc_runner.models.upsampling import FromPoint


@dataclass
class _Seen:
    """A layer with what its weight gradient is made of: its input and its output's gradient, one batch."""

    layer: nn.Module
    given: Tensor
    gradient: Tensor

    def times(self, k: int) -> _Seen:
        """The same of k batches."""
        repeated = (value.repeat(k, *[1] * (value.ndim - 1)) for value in (self.given, self.gradient))
        return _Seen(self.layer, *repeated)


def _seen(model: Conv, x: Tensor) -> list[_Seen]:
    found: list[_Seen] = []

    def keep(layer: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(lambda gradient: found.append(_Seen(layer, given[0].detach(), gradient.detach())))

    hooks = [layer.register_forward_hook(keep) for layer in model.decoder if list(layer.parameters())]
    z = torch.randn(len(x), model.latent_dim, device=x.device, requires_grad=True)
    torch.autograd.grad(model.log_joint(x, z).sum(), [z])
    for hook in hooks:
        hook.remove()
    return found


def weight_gradient(seen: _Seen) -> Tensor:
    """∂/∂weight of the layer, summed over the batch, by the operator that autograd would call."""
    layer, given, gradient = seen.layer, seen.given, seen.gradient
    if isinstance(layer, FromPoint):  # one matrix product
        spread = gradient.permute(0, 2, 3, 1).flatten(1)
        product = given.flatten(1).T @ spread
        height, width = layer.kernel_size
        return product.view(layer.in_channels, height, width, layer.out_channels).permute(0, 3, 1, 2)
    if isinstance(layer, nn.Linear):
        return gradient.T @ given
    transposed = isinstance(layer, nn.ConvTranspose2d)
    return torch.ops.aten.convolution_backward(
        gradient, given, layer.weight, None, layer.stride, layer.padding, layer.dilation, transposed,
        layer.output_padding, layer.groups, [False, True, False],
    )[1]  # fmt: skip


def _replayed(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On CUDA a captured graph, so that launches do not hide what kernels take."""
    if device.type != "cuda":
        return work
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def deferred_bound(work: Work, device: torch.device, num_deferred: int = 8, rounds: int = 7) -> dict[str, float]:
    """ms per step: weight gradients `separate`, `joint` over num_deferred steps, and the whole `step` in fp32.

    share: (separate - joint) / step, the most that deferring could save.
    """
    model, x = build_model(work.side, device), images(work, device)
    seen = _seen(model, x)
    large = [part.times(num_deferred) for part in seen]
    z = torch.randn(len(x), model.latent_dim, device=device)
    parameters = list(model.parameters())

    def step() -> None:
        latent = z.detach().requires_grad_()
        torch.autograd.grad(model.log_joint(x, latent).sum(), [latent, *parameters])

    timed = {
        "separate": lambda: [weight_gradient(part) for part in seen],
        "joint": lambda: [weight_gradient(part) for part in large],
        "step": step,
    }
    found = {name: 1e3 * median_seconds(_replayed(run, device), device, rounds) for name, run in timed.items()}
    found["joint"] /= num_deferred
    return found | {"num_deferred": num_deferred, "share": (found["separate"] - found["joint"]) / found["step"]}


def markdown_of_deferred(found: dict[str, float]) -> str:
    """In one sentence."""
    return (
        f"Weight gradients of one step: {found['separate']:.3f} ms; as a part of one reduction over "
        f"{found['num_deferred']} steps: {found['joint']:.3f} ms; a whole step: {found['step']:.3f} ms. Deferring "
        f"could save at most {found['share']:.1%} of a step, less what keeping the tensors costs."
    )
