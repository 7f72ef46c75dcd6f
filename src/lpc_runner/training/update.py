"""One update of θ and φ from one batch: Algorithm 1, line by line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lpc_runner.data.dataset import Batch
from lpc_runner.distributions import DiagonalGaussian
from lpc_runner.inference.acceptance import ShadowMetropolis
from lpc_runner.inference.chain import Chain, ChainNoise, FusedPotential, run_chain
from lpc_runner.inference.objectives import Objective, forward_kl, reverse_kl
from lpc_runner.models.latent import LatentVariableModel
from lpc_runner.randomness import generator


@dataclass
class UpdateNoise:
    """Every random number of one update, named by (seed, update): warm start, prior start, and ξ(1) .. ξ(T)."""

    seed: int
    update: int
    shape: tuple[int, int]
    device: torch.device | str
    dtype: torch.dtype = torch.float32

    def normal(self, stream: str) -> Tensor:
        """N(0, I) of shape (B, d) for the named purpose."""
        source = generator(self.seed, stream, self.update, device=self.device)
        return torch.randn(self.shape, generator=source, device=self.device, dtype=self.dtype)

    def chain(self) -> ChainNoise:
        """ξ(t) of the chain."""
        return ChainNoise(self.seed, self.update, self.shape, self.device, self.dtype)


@dataclass
class Gradients:
    """The result of one batch: gradients are set on the parameters' .grad, values are on the device, not yet read.

    scalars: logged quantities, each a 0-d tensor. finite: 0-d bool, whether every gradient is finite.
    num_evaluations: gradients of log p(x, z) of one example that this took.
    """

    chain: Chain
    scalars: dict[str, Tensor]
    finite: Tensor
    num_evaluations: int


def compute_gradients(
    model: LatentVariableModel,
    encoder: nn.Module | None,
    sampler,
    objective: Objective,
    batch: Batch,
    noise: UpdateNoise,
    start_from_prior: bool,
    observe=None,
    judge: bool = False,
) -> Gradients:
    """Algorithm 1 for one batch, up to and without the optimisers' steps.

    start_from_prior: z(0) ~ p(z) instead of q; the encoder still learns, from its own z ~ q (no effect without a
    chain). observe: see run_chain. judge: log the acceptance that MALA would have had, chain/mala_acceptance.
    """
    log_joint = partial(model.log_joint, batch.x)
    theta = list(model.parameters())
    q = encoder(batch) if encoder is not None else None  # q(z|x; φ)
    warm = q.rsample(noise.normal("warm_start")) if q is not None else None
    if q is None or (start_from_prior and sampler.num_steps > 0):
        start = model.prior.scale * noise.normal("prior_start")
    else:
        start = warm  # z(0) ~ q
    centre = q.mean if q is not None else None
    shadow = ShadowMetropolis(start.detach()) if judge and sampler.noisy and sampler.num_steps > 1 else None
    observers = [watch for watch in (observe, shadow) if watch is not None]
    chain = run_chain(
        log_joint, start, sampler, noise.chain(), parameters=theta, centre=centre, q=q, observe=_all_of(observers)
    )
    for parameter, gradient in zip(theta, chain.theta_gradient):
        parameter.grad = -gradient  # θ ascends log p(x, z; θ)

    scalars, num_evaluations = _describe(model, chain), chain.num_evaluations
    if shadow is not None:
        scalars["chain/mala_acceptance"] = shadow.mean()
    if q is not None:
        at_warm = chain.first
        if start is not warm:
            at_warm = FusedPotential(log_joint, ())(warm, False)
            num_evaluations += len(warm)

        def negative_elbo() -> Tensor:
            return reverse_kl(q, model.prior, warm, *at_warm)

        loss = objective.loss(lambda: forward_kl(q, chain.moments), negative_elbo).mean()
        phi = list(encoder.parameters())
        for parameter, gradient in zip(phi, torch.autograd.grad(loss, phi)):
            parameter.grad = gradient
        with torch.no_grad():
            scalars |= {
                "train/encoder_loss": loss,
                "train/elbo": -negative_elbo().mean(),
                **_kl(q, model),
                "train/encoder_scale": q.variance.sqrt().mean(),
                "train/encoder_gradient_norm": _norm([parameter.grad for parameter in phi]),
            }
        scalars = {name: value.detach() for name, value in scalars.items()}
    # A sum is finite only if every term is: one number answers for all gradients.
    norms = [value for name, value in scalars.items() if name.endswith("gradient_norm")]
    finite = torch.isfinite(torch.stack([*norms, chain.z.sum().to(norms[0].dtype)]).sum())
    return Gradients(chain, scalars, finite, num_evaluations)


def encoder_gradients(
    model: LatentVariableModel, encoder: nn.Module, batch: Batch, noise: UpdateNoise, num_samples: int
) -> tuple[Tensor, int]:
    """An E-step's gradient: that of -ELBO, the mean over num_samples draws z ~ q, on φ's .grad; θ has no part.

    Returns whether all of it is finite, 0-d bool, and the evaluations that it took.
    """
    q, potential = encoder(batch), FusedPotential(partial(model.log_joint, batch.x), ())
    loss = 0.0
    for sample in range(num_samples):
        z = q.rsample(noise.normal(f"encoder_step/{sample}"))
        loss = loss + reverse_kl(q, model.prior, z, *potential(z, False)).mean() / num_samples
    phi = list(encoder.parameters())
    gradients = torch.autograd.grad(loss, phi)
    for parameter, gradient in zip(phi, gradients):
        parameter.grad = gradient
    return torch.isfinite(_norm(list(gradients))), potential.num_evaluations * len(batch.x)


def _norm(gradients: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def _all_of(observers: list[Callable]) -> Callable | None:
    def observe(state, info) -> None:
        for observer in observers:
            observer(state, info)

    return observe if observers else None


def _kl(q: DiagonalGaussian, model: LatentVariableModel) -> dict[str, Tensor]:
    """KL(q ‖ p) in nats per example, in all and per named block of z."""
    kl = q.kl_per_dimension(model.prior)
    blocks = {f"train/kl_{name}": kl[:, block].sum(1).mean() for name, block in model.blocks.items()}
    return {"train/kl": kl.sum(1).mean(), **blocks}


def _describe(model: LatentVariableModel, chain: Chain) -> dict[str, Tensor]:
    scalars = {
        "train/log_joint": chain.first[0].mean(),
        **{f"train/{name}": value for name, value in model.likelihood.scalars().items()},
        "train/theta_gradient_norm": _norm(chain.theta_gradient),
    }
    trace = chain.trace
    if len(trace["log_joint"]) > 0:
        scalars |= {
            "chain/delta_log_joint": trace["log_joint"][-1] - trace["log_joint"][0],
            "chain/log_joint_last": trace["log_joint"][-1],
            "chain/drift_norm_first": trace["drift_norm"][0],
            "chain/drift_norm_last": trace["drift_norm"][-1],
            "chain/max_noise_variance": trace["noise_variance"].max(),
        }
    return scalars
