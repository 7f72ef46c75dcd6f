"""Why a variational bound is loose: a free q per example, and the two gaps (Cremer et al. 2018).

    log p(x) - ELBO(q_φ) = [log p(x) - max_q ELBO(q)] + [max_q ELBO(q) - ELBO(q_φ)]
                              approximation gap             amortisation gap

with the maximum over all diagonal Gaussians, fitted per example.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.randomness import generator
from lpc_runner.evaluation.importance import importance_bound, repeat
from lpc_runner.models.latent import LatentVariableModel

_LATE = 0.8  # the part of the steps after which convergence is asked about
_LOG_VARIANCE_RATE = 2.0  # learning rate of log variances, in units of that of the means


@dataclass(frozen=True)
class FreePosterior:
    """q: the fitted diagonal Gaussian over (B, d). drift: what the ELBO still gained in the last fifth of the steps,
    nats per example, (B,) float64. A large one says that the fit has not converged; since the steps shrink to 0, a
    small one does not say that it has."""

    q: DiagonalGaussian
    drift: Tensor


def fit_free_posterior(
    model: LatentVariableModel,
    x: Tensor,
    start: DiagonalGaussian,
    seed: int,
    *,
    num_steps: int,
    num_samples: int,
    learning_rate: float,
    num_drift_samples: int = 200,
) -> FreePosterior:
    """About max_q ELBO(q) over N(mean, diag(variance)) of every example of x (B, ...), from `start`: never above it.

    Adam on mean and log variance with a cosine decay to 0; num_samples z per step (even: in antithetic pairs). The
    gradient goes through z alone (Roeder et al. 2017): where q is the posterior it has no variance. Examples do not
    interact, but every step visits all of them.
    """
    assert num_samples % 2 == 0
    mean = start.mean.detach().clone().requires_grad_()
    log_variance = start.variance.detach().log().clone().requires_grad_()
    rates = {id(mean): learning_rate, id(log_variance): _LOG_VARIANCE_RATE * learning_rate}
    optimizer = torch.optim.Adam([{"params": [part], "lr": rates[id(part)]} for part in (mean, log_variance)])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    source = generator(seed, "free posterior", device=x.device)
    repeated = x.repeat(num_samples, *[1] * (x.ndim - 1))
    current = lambda: DiagonalGaussian(mean.detach().clone(), log_variance.detach().exp())
    late = current()
    with gradients_through_rnns():
        for step in range(num_steps):
            if step == math.floor(_LATE * num_steps):
                late = current()
            half = torch.randn(num_samples // 2, *mean.shape, generator=source, device=x.device, dtype=mean.dtype)
            noise = torch.cat([half, -half]).flatten(0, 1)
            q = repeat(DiagonalGaussian(mean, log_variance.exp()), num_samples)
            z = q.rsample(noise)
            loss = -(model.log_joint(repeated, z) - q.detach().log_prob(z)).sum() / num_samples
            mean.grad, log_variance.grad = torch.autograd.grad(loss, [mean, log_variance])
            optimizer.step()
            schedule.step()
    fitted = current()
    bounds = [importance_bound(model, x, q, num_drift_samples, seed).elbo for q in (late, fitted)]
    return FreePosterior(fitted, bounds[1] - bounds[0])


@contextmanager
def gradients_through_rnns() -> Iterator[None]:
    """cuDNN's recurrent networks have a backward pass in training mode only; torch's own have one always."""
    before = torch.backends.cudnn.enabled
    try:
        torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = before
