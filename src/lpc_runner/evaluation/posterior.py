"""What a posterior over z says of each trial: rates, factors and inputs averaged over its samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.tensors import generator
from lpc_runner.evaluation.bounds import gradients_through_rnns
from lpc_runner.inference.chain import ChainNoise, run_chain, to_the_end


@dataclass(frozen=True)
class Means:
    """Posterior means: rates (B, T, N), factors (B, T, F), inputs (B, T, Du) or None."""

    rates: Tensor
    factors: Tensor
    inputs: Tensor | None

    def __getitem__(self, rows: Any) -> Means:
        return Means(self.rates[rows], self.factors[rows], None if self.inputs is None else self.inputs[rows])


class _Average:
    """Running means of what the model makes of z."""

    def __init__(self, model: Any) -> None:
        self.model, self.count = model, 0
        self.sums: list[Any] = []

    @torch.no_grad()
    def add(self, z: Tensor) -> None:
        run = self.model.run(z)
        parts = [self.model.decode(z), run.factors, run.inputs]
        self.sums = [
            None if part is None else total + part for total, part in zip(self.sums or [0.0] * len(parts), parts)
        ]
        self.count += 1

    def means(self) -> Means:
        means: list[Any] = [None if total is None else total / self.count for total in self.sums]
        return Means(*means)


def joined(parts: Iterable[Means]) -> Means:
    """Means of consecutive trials as one."""
    parts = list(parts)
    inputs = [part.inputs for part in parts if part.inputs is not None]
    rates, factors = (torch.cat([getattr(part, name) for part in parts]) for name in ("rates", "factors"))
    return Means(rates, factors, torch.cat(inputs) if inputs else None)


@torch.no_grad()
def posterior_means(model: Any, q: DiagonalGaussian, num_samples: int, seed: int, chunk: int) -> Means:
    """Means over num_samples draws z ~ q."""
    source = generator(seed, "posterior", chunk, device=q.mean.device)
    average = _Average(model)
    for _ in range(num_samples):
        noise = torch.randn(q.mean.shape, generator=source, device=q.mean.device, dtype=q.mean.dtype)
        average.add(q.rsample(noise))
    return average.means()


def chain_means(
    model: Any, x: Tensor, start: DiagonalGaussian, sampler: Any, num_states: int, seed: int, chunk: int
) -> Means:
    """Means over all states z(1) .. z(T) of chains on log p(x, z) from z(0) ~ start, at least num_states per trial.

    All T, whatever sampler.stop says.
    """
    average = _Average(model)
    sampler = to_the_end(sampler)
    num_chains = -(-num_states // sampler.num_steps)
    with gradients_through_rnns():
        for number in range(num_chains):
            draw = chunk * num_chains + number
            source = generator(seed, "posterior chain", draw, device=x.device)
            z = start.rsample(torch.randn(start.mean.shape, generator=source, device=x.device, dtype=x.dtype))
            noise = ChainNoise(seed, draw, tuple(z.shape), x.device, x.dtype, stream="posterior chain noise")
            keep = lambda state, info: average.add(state.z)
            run_chain(partial(model.log_joint, x), z, sampler, noise, centre=start.mean, q=start, on_step=keep)
    return average.means()
