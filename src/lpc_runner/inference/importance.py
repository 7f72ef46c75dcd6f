"""The importance-weighted bound (Burda, Grosse, Salakhutdinov 2016) as a training signal: the baseline IWAE-K."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpc_runner.base.distributions import LOG_2PI, DiagonalGaussian
from lpc_runner.base.schema import PositiveInt, checked
from lpc_runner.inference.context import Context, Gradients
from lpc_runner.inference.interfaces import Objective
from lpc_runner.inference.objectives import describe_encoder


class ImportanceWeighted(Objective):
    """Objective of an importance-weighted autoencoder, -E log (1/K) Σ_k p(x, z_k) / q(z_k|x), K = num_samples.

    It has no chain: θ and φ both follow the gradient of this bound. K = 1 is the negative ELBO with a sampled KL.
    """

    needs_factorised_q = True

    @checked
    def __init__(self, num_samples: PositiveInt) -> None:
        self.num_samples = num_samples

    @property
    def capturable(self) -> bool:
        """A class made from this one says so for itself."""
        return type(self) is ImportanceWeighted

    def gradients(self, context: Context) -> Gradients:
        """One batch, up to and without the optimisers' steps."""
        q, count = context.q(), self.num_samples
        noise = context.noise.normal("importance", count)
        found = importance_gradients(context.log_joint, q, noise, context.theta)
        theta = [-gradient for gradient in found.theta]
        phi = list(torch.autograd.grad(found.loss.mean(), context.phi))
        scalars = describe_encoder(context.model, q) | {
            "train/importance_bound": found.bound.mean(),
            "train/effective_sample_size": found.weights.square().sum(0).reciprocal().mean(),
            "train/log_joint": found.log_joint.mean(),
        }
        return Gradients(theta, phi, found.z, count * len(found.z), scalars)


@dataclass
class ImportanceGradients:
    """bound: (B,) nats. log_joint: log p(x, z_k), (K, B). weights: w̃ (K, B), summing to 1 over K.

    z: z_1, (B, d). theta: mean over the batch of the bound's gradient, one tensor per parameter. loss: (B,), whose
    gradient with respect to φ is the negative bound's.
    """

    bound: Tensor
    log_joint: Tensor
    weights: Tensor
    z: Tensor
    theta: list[Tensor]
    loss: Tensor


def importance_gradients(
    log_joint: Callable[[Tensor], Tensor], q: DiagonalGaussian, noise: Tensor, parameters: Sequence[Tensor]
) -> ImportanceGradients:
    """∇ log (1/K) Σ_k w_k = Σ_k w̃_k ∇ log w_k, w_k = p(x, z_k; θ) / q(z_k|x; φ), in one pass through the decoder.

    log_joint: z (K, B, d) -> (K, B) nats. noise: (K, B, d) ~ N(0, I); z_k = mean + sqrt(variance) noise_k, through
    which φ is differentiated along with log q.
    """
    z = q.mean + q.variance.sqrt() * noise
    # At z_k itself mean and scale cancel inside log q: (z_k - mean)/scale is the noise; the normaliser remains.
    log_q = -0.5 * (noise.square() + LOG_2PI).sum(2) - 0.5 * q.variance.log().sum(1)
    point = z.detach().requires_grad_()
    with torch.enable_grad():
        value = log_joint(point)
        log_weights = value.detach() - log_q.detach()
        weights = log_weights.softmax(0)
        weighted_drift, *theta = torch.autograd.grad((weights * value).sum(), [point, *parameters])
    pathwise = (weighted_drift * (z - point.detach())).sum((0, 2))  # value 0, gradient Σ w̃ ∇z log p · dz/dφ
    bound = log_weights.logsumexp(0) - math.log(len(noise))
    loss = (weights * log_q).sum(0) - pathwise
    theta = [gradient / noise.shape[1] for gradient in theta]
    return ImportanceGradients(bound, value.detach(), weights, point[0].detach(), theta, loss)
