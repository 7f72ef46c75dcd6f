"""Algorithm 1 read line by line, without any saving: the slow reference of the tests and of the benchmark.

Every step makes one backward pass for the drift, one for θ and one for the encoder, and keeps its state;
reverse KL runs the decoder once more. What it returns must equal that of
`WeightedKL.gradients` to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lpc_runner.inference.objectives import WeightedKL
from lpc_runner.inference.preconditioning import Identity, SharedAdam


@dataclass
class Literal:
    """theta, phi: gradients to descend, one tensor per parameter. states: z(0) .. z(T), each (B, d)."""

    theta: list[Tensor]
    phi: list[Tensor]
    states: list[Tensor]


def _precondition(metric: Any, second_moment: Tensor, drift: Tensor, t: int) -> tuple[Tensor, Any]:
    """m(t) = β m(t-1) + (1-β) g⊙g and m̂ = sqrt(m(t)/(1-β^t)) + eps; m̂ = 1 without preconditioning."""
    if isinstance(metric, Identity):
        return second_moment, 1.0
    square = drift * drift
    if isinstance(metric, SharedAdam):
        square = square.mean(0).expand_as(drift)
    count = t if metric.freeze_after is None else min(t, metric.freeze_after)
    if count == t:
        second_moment = metric.beta * second_moment + (1 - metric.beta) * square
    return second_moment, (second_moment / (1 - metric.beta**count)).sqrt() + metric.eps


def literal_gradients(
    model: Any,
    encoder: Any,
    sampler: Any,
    objective: WeightedKL,
    batch: Any,
    *,
    noise: Any,
    start_from_prior: bool,
) -> Literal:
    """Gradients of θ and φ for one batch by the corrected Algorithm 1; the arguments are those of the update.

    model: has log_joint(x, z) -> (B,), prior, parameters(). encoder: maps the batch to q, or None. noise: has
    normal(stream) -> (B, d) and chain() -> (t -> ξ(t)).
    """
    x, prior = batch.x, model.prior
    theta = list(model.parameters())
    theta_sum = [torch.zeros_like(parameter) for parameter in theta]
    phi = list(encoder.parameters()) if encoder is not None else []
    phi_sum = [torch.zeros_like(parameter) for parameter in phi]
    xi, num_steps = noise.chain(), sampler.num_steps

    def add_theta(z: Tensor) -> None:
        value = model.log_joint(x, z).sum()
        for total, gradient in zip(theta_sum, torch.autograd.grad(value, theta)):
            total.add_(gradient)

    def add_phi(loss: Tensor, weight: float) -> None:
        for total, gradient in zip(phi_sum, torch.autograd.grad(loss.mean(), phi, retain_graph=True)):
            total.add_(gradient, alpha=weight)

    # q = N(mean(x), var(x));  z(0) ~ q or ~ p(z)
    z = None
    if encoder is not None:
        q = encoder(batch)
        sample = q.mean + q.variance.sqrt() * noise.normal("warm_start")
        z = sample.detach()
        if objective.reverse > 0:  # g_φ = w_r ∇φ L_R
            log_likelihood = model.log_joint(x, sample) - prior.log_prob(sample)
            ratio = q.variance / prior.scale**2
            kl = 0.5 * (ratio + q.mean.square() / prior.scale**2 - 1 - ratio.log()).sum(1)
            add_phi(kl - log_likelihood, objective.reverse)
    if z is None or (start_from_prior and num_steps > 0):
        z = prior.scale * noise.normal("prior_start")

    states, second_moment = [z], torch.zeros_like(z)
    for t in range(1, num_steps + 1):
        # g = ∇z log p(x, z(t-1); θ)
        point = z.requires_grad_()
        (drift,) = torch.autograd.grad(model.log_joint(x, point).sum(), point)
        z = z.detach()
        second_moment, scale = _precondition(sampler.preconditioner, second_moment, drift, t)
        # g_θ += ∇θ log p(x, z(t-1); θ)
        if sampler.theta_states == "all" and (t - 1) % sampler.theta_every == 0:
            add_theta(z)
        # z(t) = z(t-1) + γ g/m̂ + sqrt(2γ/m̂) ξ
        step_size = sampler.step_size(t)
        z = z + step_size * drift / scale
        if sampler.noisy:
            z = z + (2 * step_size / scale) ** 0.5 * xi(t)
        # g_φ += w_f ∇φ L_F, L_F = -(1/T) Σ_t log q(z(t)|x; φ)
        if objective.forward > 0:
            square = (z - q.mean).square() / q.variance
            log_q = -0.5 * (square + (2 * torch.pi * q.variance).log()).sum(1)
            add_phi(-log_q / num_steps, objective.forward)
        states.append(z)
    if sampler.theta_states == "last":
        add_theta(z)
    count = len(range(0, num_steps, sampler.theta_every)) if sampler.theta_states == "all" else 1
    return Literal([-total / (count * len(x)) for total in theta_sum], phi_sum, states)
