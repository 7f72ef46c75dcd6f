"""Importance-weighted bounds on log p(x) for any model and any proposal q(z|x) (Burda et al. 2016)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.randomness import generator
from lpc_runner.models.latent import LatentVariableModel

ROWS = 4096  # examples decoded at once; changes no number


@dataclass(frozen=True)
class Importance:
    """What K weights w_k = p(x, z_k) / q(z_k|x), z_k ~ q, say of every example, each (B,) float64, in nats.

    iwae: log (1/K) Σ w_k, in expectation below log p(x) and non-decreasing in K. elbo: (1/K) Σ log w_k.
    effective_samples: (Σ w_k)² / Σ w_k², between 1 and K; near 1 the bound hangs on one sample.
    """

    iwae: Tensor
    elbo: Tensor
    effective_samples: Tensor


@torch.no_grad()
def importance_bound(
    model: LatentVariableModel, x: Tensor, q: DiagonalGaussian, num_samples: int, seed: int, rows: int = ROWS
) -> Importance:
    """IWAE-K with K = num_samples of x (B, ...), proposal q over (B, d).

    seed names the noise, which is the same for every q of that shape: differences between two proposals are then those
    of common random numbers. rows: decoded at once.
    """
    source = generator(seed, "importance", device=x.device)
    weights = torch.empty(num_samples, len(x), dtype=torch.float64, device=x.device)
    at_once = max(1, rows // len(x))
    for start in range(0, num_samples, at_once):
        count = min(at_once, num_samples - start)
        # One draw per sample, so that its noise does not depend on how many are decoded at once.
        noise = [torch.randn(q.mean.shape, generator=source, device=x.device, dtype=x.dtype) for _ in range(count)]
        repeated = repeat(q, count)
        z = repeated.rsample(torch.cat(noise))
        log_weight = model.log_joint(x.repeat(count, *[1] * (x.ndim - 1)), z).double() - repeated.log_prob(z).double()
        weights[start : start + count] = log_weight.view(count, len(x))
    iwae = torch.logsumexp(weights, 0) - math.log(num_samples)
    effective = torch.exp(2 * torch.logsumexp(weights, 0) - torch.logsumexp(2 * weights, 0))
    return Importance(iwae, weights.mean(0), effective)


def repeat(q: DiagonalGaussian, count: int) -> DiagonalGaussian:
    """q of `count` copies of the batch, one after another: (count B, d)."""
    return DiagonalGaussian(q.mean.repeat(count, 1), q.variance.repeat(count, 1))
