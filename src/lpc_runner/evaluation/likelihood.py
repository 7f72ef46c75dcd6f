"""What the encoder's bound says of held-out data."""

from __future__ import annotations

import math

import torch
from torch import nn

from lpc_runner.base.randomness import generator
from lpc_runner.data.dataset import Batch, Dataset, Split
from lpc_runner.models.latent import LatentVariableModel

ACTIVE = 0.01  # variance over x of E_q[z|x] above which a latent counts as used (Burda et al. 2016)


@torch.no_grad()
def encoder_bound(
    model: LatentVariableModel, encoder: nn.Module, dataset: Dataset, split: Split, seed: int, chunk: int = 500
) -> dict[str, float]:
    """ELBO and KL in nats per example (one z ~ q each), active units; bits per dimension where p(x|z) is a probability.

    The KL is analytic; every example of the split is used.
    """
    device = next(model.parameters()).device
    elbo, kl, means = 0.0, 0.0, []
    for number, start in enumerate(range(0, len(split), chunk)):
        values = split.values[start : start + chunk].to(device)
        index = torch.arange(start, start + len(values), device=device)
        batch = Batch(dataset.to_model(values), index)
        q = encoder(batch)
        source = generator(seed, "bound", number, device=device)
        z = q.rsample(torch.randn(q.mean.shape, generator=source, device=device))
        divergence = q.kl(model.prior)
        log_likelihood = model.log_joint(batch.x, z) - model.prior.log_prob(z)
        elbo += float((log_likelihood - divergence).double().sum())
        kl += float(divergence.double().sum())
        means.append(q.mean)
    numbers = {"elbo": elbo / len(split), "kl": kl / len(split)}
    numbers["active_units"] = float((torch.cat(means).var(0) > ACTIVE).sum())
    if is_probability(dataset, model):
        dimensions = math.prod(split.values.shape[1:])
        numbers["bits_per_dim"] = -numbers["elbo"] / (dimensions * math.log(2))
    return numbers


def is_probability(dataset: Dataset, model: LatentVariableModel) -> bool:
    """Whether p(x|z) is a probability of this dataset's values, so that bits per dimension have a meaning."""
    return bool(dataset.num_levels and dataset.num_levels <= (model.likelihood.num_levels or 0))
