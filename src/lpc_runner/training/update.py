"""One update of θ and φ from one batch: Algorithm 1, line by line."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lpc_runner.data.dataset import Batch
from lpc_runner.inference.chain import Chain, ChainNoise, FusedPotential
from lpc_runner.inference.engine import Eager
from lpc_runner.inference.objectives import Objective, forward_kl, reverse_kl
from lpc_runner.models.latent import LatentVariableModel
from lpc_runner.randomness import generator

STEP_BY_STEP = Eager()


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
    engine: Eager = STEP_BY_STEP,
) -> Gradients:
    """Algorithm 1 for one batch, up to and without the optimisers' steps.

    start_from_prior: z(0) ~ p(z) instead of q; the encoder still learns, from its own z ~ q (no effect without a
    chain). observe: see run_chain. engine: runs the chain.
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
    chain = engine.run(
        model.log_joint, (batch.x,), start, sampler, noise.chain(), parameters=theta, centre=centre, observe=observe
    )
    for parameter, gradient in zip(theta, chain.theta_gradient):
        parameter.grad = -gradient  # θ ascends log p(x, z; θ)

    scalars, num_evaluations = _describe(model, chain), chain.num_evaluations
    if q is not None:
        at_warm = chain.first
        if start is not warm:
            with engine.autocast():
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
                "train/kl": q.kl(model.prior).mean(),
                "train/encoder_scale": q.variance.sqrt().mean(),
                "train/encoder_gradient_norm": _norm([parameter.grad for parameter in phi]),
            }
        scalars = {name: value.detach() for name, value in scalars.items()}
    # A sum is finite only if every term is: one number answers for all gradients.
    norms = [value for name, value in scalars.items() if name.endswith("gradient_norm")]
    finite = torch.isfinite(torch.stack([*norms, chain.z.sum().to(norms[0].dtype)]).sum())
    return Gradients(chain, scalars, finite, num_evaluations)


def _norm(gradients: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def _describe(model: LatentVariableModel, chain: Chain) -> dict[str, Tensor]:
    scalars = {
        "train/log_joint": chain.first[0].mean(),
        "train/sigma": model.likelihood.log_scale.detach().exp(),
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
