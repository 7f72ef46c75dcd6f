"""What a posterior over z says of trials: rates, factors and inputs averaged over its samples, and numbers about them.

Arrays are (trials, T, ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.tensors import generator
from lpc_runner.evaluation.bounds import gradients_through_rnns
from lpc_runner.inference.chain import ChainNoise, run_chain, to_the_end

CHUNK = 260  # trials that share one draw of noise; results depend on it, so it is no setting


class Means(NamedTuple):
    """Posterior means: rates (B, T, N), factors (B, T, F), inputs (B, T, Du) or None."""

    rates: Tensor
    factors: Tensor
    inputs: Tensor | None = None


class _Mean:
    """The running mean of what the model makes of each z."""

    def __init__(self, model: Any) -> None:
        self.model, self.count = model, 0
        self.sums: list[Tensor] = []

    @torch.no_grad()
    def add(self, z: Tensor) -> None:
        run = self.model.run(z)
        parts = [self.model.decode(z), run.factors, *([] if run.inputs is None else [run.inputs])]
        self.sums = [total + part for total, part in zip(self.sums, parts)] if self.sums else parts
        self.count += 1

    def value(self) -> Means:
        return Means(*(total / self.count for total in self.sums))


def _joined(parts: Iterable[Means]) -> Means:
    """Means of consecutive trials as one."""
    rates, factors, inputs = zip(*parts)
    return Means(torch.cat(rates), torch.cat(factors), None if inputs[0] is None else torch.cat(inputs))


def _chunks(q: DiagonalGaussian) -> Iterator[tuple[int, DiagonalGaussian]]:
    parts = zip(q.mean.split(CHUNK), q.variance.split(CHUNK))
    return ((number, DiagonalGaussian(*part)) for number, part in enumerate(parts))


@torch.no_grad()
def posterior_means(model: Any, q: DiagonalGaussian, num_samples: int, seed: int) -> Means:
    """Means over num_samples draws z ~ q."""
    parts = []
    for number, part in _chunks(q):
        source, mean = generator(seed, "posterior", number, device=q.mean.device), _Mean(model)
        for _ in range(num_samples):
            shape, like = part.mean.shape, part.mean
            mean.add(part.rsample(torch.randn(shape, generator=source, device=like.device, dtype=like.dtype)))
        parts.append(mean.value())
    return _joined(parts)


def chain_means(model: Any, x: Tensor, start: DiagonalGaussian, sampler: Any, num_states: int, seed: int) -> Means:
    """Means over all states z(1) .. z(T) of chains on log p(x, z) from z(0) ~ start, at least num_states per trial.

    All T, whatever sampler.stop says.
    """
    sampler, parts = to_the_end(sampler), []
    num_chains = -(-num_states // sampler.num_steps)
    with gradients_through_rnns(model):
        for rows, (number, q) in zip(x.split(CHUNK), _chunks(start)):
            mean = _Mean(model)
            for draw in range(number * num_chains, (number + 1) * num_chains):
                source = generator(seed, "posterior chain", draw, device=x.device)
                z = q.rsample(torch.randn(q.mean.shape, generator=source, device=x.device, dtype=x.dtype))
                noise = ChainNoise(seed, draw, tuple(z.shape), x.device, x.dtype, stream="posterior chain noise")
                keep = lambda state, info, mean=mean: mean.add(state.z)
                run_chain(partial(model.log_joint, rows), z, sampler, noise, centre=q.mean, q=q, on_step=keep)
            parts.append(mean.value())
    return _joined(parts)


RIDGE = 1e-3  # penalty of the linear readouts, in units of the features' mean variance


def r_squared(estimate: Tensor, truth: Tensor) -> float:
    """1 - Σ (truth - estimate)² / Σ (truth - mean)², pooled over trials, bins and neurons.

    The mean is each neuron's own over trials and bins, so that a neuron's mean rate alone gives 0. Float64.
    """
    truth, estimate = truth.double(), estimate.double()
    scatter = (truth - truth.mean((0, 1))).square().sum()
    return float(1 - (truth - estimate).square().sum() / scatter)


def linear_r_squared(features: Tensor, target: Tensor) -> float:
    """R² of a ridge regression from features (trials, T, F) to target (trials, T, D), fitted on one half of the trials.

    Even trials fit, odd ones are predicted, time bins are examples; penalty RIDGE times the mean variance of a feature
    per example. At least 2 trials.
    """
    fit, held = slice(0, None, 2), slice(1, None, 2)
    return r_squared(linear_readout(features[fit], target[fit])(features[held]), target[held])


def linear_readout(features: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression from features (trials, T, F) to target (trials, T, D), as a function of features; float64."""
    features, target = features.double(), target.double()
    centre, offset = features.mean((0, 1)), target.mean((0, 1))
    x, y = (features - centre).flatten(0, 1), (target - offset).flatten(0, 1)
    gram = x.T @ x
    penalty = RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    weights = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), x.T @ y)
    return lambda new: (new.double() - centre) @ weights + offset


def poisson_log_likelihood(counts: Tensor, rates: Tensor) -> Tensor:
    """Σ log Poisson(count; rate) over bins and neurons in nats, (trials,) float64; rates in expected counts per bin."""
    return torch.distributions.Poisson(rates.double(), validate_args=False).log_prob(counts.double()).sum((1, 2))


def bits_per_spike(counts: Tensor, rates: Tensor) -> float:
    """(log-likelihood of the rates - that of each neuron's mean rate) / (number of spikes · log 2); 0 for mean rates.

    The mean rates are those of these very counts, as in the Neural Latents Benchmark (Pei et al. 2021).
    """
    mean = counts.double().mean((0, 1)).expand(counts.shape)
    gain = poisson_log_likelihood(counts, rates) - poisson_log_likelihood(counts, mean)
    return float(gain.sum() / (counts.double().sum() * math.log(2)))


def pulse_timing(inputs: Tensor, pulse_bin: Tensor) -> float:
    """Share of trials whose inferred input (trials, T, Du) has its largest norm within a bin of the pulse (trials,)."""
    peak = inputs.norm(dim=2).argmax(1)
    return float(((peak - pulse_bin).abs() <= 1).double().mean())
