"""Bounds on log p(x): any proposal's (Burda et al. 2016), a free q's per example (Cremer et al. 2018), an encoder's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.tensors import generator
from lpc_runner.data.dataset import Batch, Dataset, Split
from lpc_runner.evaluation import linear_gaussian
from lpc_runner.models.latent import LatentVariableModel

COLD = 10  # times the learning rate of a free q, in a first fit from the prior
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
    model: LatentVariableModel,
    x: Tensor,
    q: DiagonalGaussian,
    num_samples: int,
    seed: int,
    stream: str = "importance",
    rows: int = ROWS,
) -> Importance:
    """IWAE-K with K = num_samples of x (B, ...), proposal q over (B, d).

    seed and stream name the noise, which is the same for every q of that shape: differences between two proposals are
    then those of common random numbers. rows: decoded at once.
    """
    source = generator(seed, stream, device=x.device)
    weights = torch.empty(num_samples, len(x), dtype=torch.float64, device=x.device)
    at_once = max(1, rows // len(x))
    for start in range(0, num_samples, at_once):
        count = min(at_once, num_samples - start)
        # One draw per sample, so that its noise does not depend on how many are decoded at once.
        noise = [torch.randn(q.mean.shape, generator=source, device=x.device, dtype=x.dtype) for _ in range(count)]
        repeated = q.repeat(count)
        z = repeated.rsample(torch.cat(noise))
        log_weight = model.log_joint(x.repeat(count, *[1] * (x.ndim - 1)), z).double() - repeated.log_prob(z).double()
        weights[start : start + count] = log_weight.view(count, len(x))
    iwae, effective_samples = mean_weight(weights)
    return Importance(iwae, weights.mean(0), effective_samples)


def mean_weight(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """log (1/K) Σ w and (Σ w)² / Σ w² of log weights (K, B), each (B,)."""
    total = torch.logsumexp(log_w, 0)
    return total - math.log(len(log_w)), torch.exp(2 * total - torch.logsumexp(2 * log_w, 0))


_LATE = 0.8  # the part of the steps after which convergence is asked about
NUM_DRIFT_SAMPLES = 200  # z per example of the two bounds whose difference is the drift
_LOG_VARIANCE_RATE = 2.0  # learning rate of log variances, in units of that of the means


@dataclass(frozen=True)
class FreePosterior:
    """q: the fitted diagonal Gaussian over (B, d). drift: what the ELBO still gained in the last fifth of the steps,
    nats per example, (B,) float64. A large one says that the fit has not converged; since the steps shrink to 0, a
    small one does not say that it has."""

    q: DiagonalGaussian
    drift: Tensor


def prior_of(model: LatentVariableModel, num_examples: int) -> DiagonalGaussian:
    """p(z) as the q(z|x) of so many examples, in the model's dtype and on its device."""
    zero = next(model.parameters()).new_zeros(num_examples, model.latent_dim).detach()
    return DiagonalGaussian(zero, torch.full_like(zero, model.prior.scale**2))


@dataclass(frozen=True)
class FreeFit:
    """How a free q is found: num_steps of Adam, num_samples z per step and example, learning_rate of the mean.

    Raises ValueError (one line) for an odd number of samples.
    """

    num_steps: int
    num_samples: int
    learning_rate: float

    def __post_init__(self) -> None:
        if self.num_samples % 2:
            raise ValueError(f"free_samples must be even: they are drawn in antithetic pairs, got {self.num_samples}")

    def __call__(
        self, model: LatentVariableModel, x: Tensor, start: DiagonalGaussian | None, seed: int
    ) -> FreePosterior:
        """The best factorised q of every example: in closed form where there is one, else fitted."""
        if linear_gaussian.is_linear_gaussian(model):
            no_drift = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            return FreePosterior(linear_gaussian.best_factorised(model, x), no_drift)
        return fit_free_posterior(model, x, start, seed, self)

    def way(self, model: LatentVariableModel) -> str:
        """How that q is found, in words."""
        closed = linear_gaussian.is_linear_gaussian(model)
        return "in closed form" if closed else f"by {self.num_steps:,} steps"


def fit_free_posterior(
    model: LatentVariableModel, x: Tensor, start: DiagonalGaussian | None, seed: int, fit: FreeFit
) -> FreePosterior:
    """About max_q ELBO(q) over N(mean, diag(variance)) of every example of x (B, ...), from `start`: never above it.

    Adam on mean and log variance with a cosine decay to 0; z in antithetic pairs. The gradient goes through z alone
    (Roeder et al. 2017): where q is the posterior it has no variance. Examples do not interact, but every step visits
    all of them. Without a start, larger steps lead from the prior into the neighbourhood first.
    """
    if start is None:
        cold = replace(fit, learning_rate=COLD * fit.learning_rate)
        _, start = descend(model, x, prior_of(model, len(x)), seed, cold)
    late, fitted = descend(model, x, start, seed, fit)
    bounds = [importance_bound(model, x, q, NUM_DRIFT_SAMPLES, seed).elbo for q in (late, fitted)]
    return FreePosterior(fitted, bounds[1] - bounds[0])


def descend(
    model: LatentVariableModel, x: Tensor, start: DiagonalGaussian, seed: int, fit: FreeFit
) -> tuple[DiagonalGaussian, DiagonalGaussian]:
    """A fit's q before the last fifth of its steps, and after all of them."""
    mean = start.mean.detach().clone().requires_grad_()
    log_variance = start.variance.detach().log().clone().requires_grad_()
    rates = (fit.learning_rate, _LOG_VARIANCE_RATE * fit.learning_rate)
    optimizer = torch.optim.Adam([{"params": [p], "lr": lr} for p, lr in zip((mean, log_variance), rates)])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, fit.num_steps)
    source = generator(seed, "free posterior", device=x.device)
    repeated = x.repeat(fit.num_samples, *[1] * (x.ndim - 1))
    current = lambda: DiagonalGaussian(mean.detach().clone(), log_variance.detach().exp())
    late = current()
    with gradients_through_rnns(model):
        for step in range(fit.num_steps):
            if step == math.floor(_LATE * fit.num_steps):
                late = current()
            half = torch.randn(fit.num_samples // 2, *mean.shape, generator=source, device=x.device, dtype=mean.dtype)
            noise = torch.cat([half, -half]).flatten(0, 1)
            q = DiagonalGaussian(mean, log_variance.exp()).repeat(fit.num_samples)
            z = q.rsample(noise)
            loss = -(model.log_joint(repeated, z) - q.detach().log_prob(z)).sum() / fit.num_samples
            mean.grad, log_variance.grad = torch.autograd.grad(loss, [mean, log_variance])
            optimizer.step()
            schedule.step()
    return late, current()


@contextmanager
def gradients_through_rnns(model: nn.Module) -> Iterator[None]:
    """cuDNN's recurrent networks have a backward pass in training mode only; torch's own have one always.

    A model without one keeps cuDNN.
    """
    before = torch.backends.cudnn.enabled
    try:
        torch.backends.cudnn.enabled = before and not any(isinstance(part, nn.RNNBase) for part in model.modules())
        yield
    finally:
        torch.backends.cudnn.enabled = before


BY_BLOCK = ("kl", "active_units")  # what stands for each named block of z as well, as kl_<block>
ACTIVE = 0.01  # variance over x of E_q[z|x] above which a latent counts as used (Burda et al. 2016)


@torch.no_grad()
def encoder_bound(
    model: LatentVariableModel, encoder: nn.Module, dataset: Dataset, split: Split, seed: int, chunk: int = 500
) -> dict[str, float]:
    """ELBO and KL in nats per example (one z ~ q each), active units; bits per dimension where p(x|z) is a probability.

    The KL is analytic, of a q that is not factorised that of its conditionals at z; every example of the split is used.
    KL and active units stand for each named block of z, too.
    """
    device = next(model.parameters()).device
    rows, means = [], []
    for number, values in enumerate(split.values.split(chunk)):
        index = torch.arange(number * chunk, number * chunk + len(values), device=device)
        batch = Batch(dataset.to_model(values.to(device)), index)
        q = encoder(batch)
        source = generator(seed, "bound", number, device=device)
        z = q.rsample(torch.randn(q.mean.shape, generator=source, device=device))
        terms = q.at(z).kl_per_dimension(model.prior)
        divergence = terms.sum(1)
        log_likelihood = model.log_joint(batch.x, z) - model.prior.log_prob(z)
        by_block = [terms[:, block].double().sum(1) for block in model.blocks.values()]
        rows.append(torch.stack([(log_likelihood - divergence).double(), divergence.double(), *by_block]))
        means.append(q.mean)
    active = torch.cat(means).var(0) > ACTIVE
    elbo, kl, *of_blocks = torch.cat(rows, 1).mean(1).tolist()
    numbers = {"elbo": elbo, "kl": kl, "active_units": float(active.sum())}
    for (name, block), value in zip(model.blocks.items(), of_blocks):
        numbers |= {f"kl_{name}": value, f"active_units_{name}": float(active[block].sum())}
    if is_probability(dataset, model):
        dimensions = math.prod(split.values.shape[1:])
        numbers["bits_per_dim"] = -numbers["elbo"] / (dimensions * math.log(2))
    return numbers


def is_probability(dataset: Dataset, model: LatentVariableModel) -> bool:
    """Whether p(x|z) is a probability of this dataset's values, so that bits per dimension have a meaning."""
    return bool(dataset.num_levels and dataset.num_levels <= (model.likelihood.num_levels or 0))
