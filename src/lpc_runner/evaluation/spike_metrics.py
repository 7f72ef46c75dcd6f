"""Numbers about predicted rates, given spikes, true rates, latents or behaviour; all arrays (trials, T, ...)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

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
    counts, rates = counts.double(), rates.double()
    return (torch.xlogy(counts, rates) - rates - torch.lgamma(counts + 1)).sum((1, 2))


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
