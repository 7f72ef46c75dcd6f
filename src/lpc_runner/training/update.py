"""One update of θ and φ from one batch: Algorithm 1, line by line."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lpc_runner.data.dataset import Batch
from lpc_runner.distributions import DiagonalGaussian
from lpc_runner.inference.chain import Chain, ChainNoise, FusedPotential, run_chain
from lpc_runner.inference.importance import ImportanceWeighted, importance_gradients
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

    def normal(self, stream: str, *more: int) -> Tensor:
        """N(0, I) of shape (*more, B, d) for the named purpose."""
        source = generator(self.seed, stream, self.update, device=self.device)
        return torch.randn((*more, *self.shape), generator=source, device=self.device, dtype=self.dtype)

    def chain(self) -> ChainNoise:
        """ξ(t) of the chain."""
        return ChainNoise(self.seed, self.update, self.shape, self.device, self.dtype)


@dataclass
class Gradients:
    """The result of one batch: gradients are set on the parameters' .grad, values are on the device, not yet read.

    z: (B, d), the last latents, z(T). chain: None where the objective has none. scalars: logged quantities, each a
    0-d tensor. finite: 0-d bool, whether every gradient is finite. num_evaluations: gradients of log p(x, z) of one
    example that this took.
    """

    z: Tensor
    chain: Chain | None
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
) -> Gradients:
    """Algorithm 1 for one batch, up to and without the optimisers' steps.

    start_from_prior: z(0) ~ p(z) instead of q; the encoder still learns, from its own z ~ q (no effect without a
    chain). observe: see run_chain.
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
    chain = run_chain(log_joint, start, sampler, noise.chain(), parameters=theta, centre=centre, observe=observe)
    scalars = _set_theta_gradient(model, chain.theta_gradient) | _describe(chain)
    num_evaluations = chain.num_evaluations
    if q is not None:
        at_warm = chain.first
        if start is not warm:
            at_warm = FusedPotential(log_joint, ())(warm, False)
            num_evaluations += len(warm)

        def negative_elbo() -> Tensor:
            return reverse_kl(q, model.prior, warm, *at_warm)

        loss = objective.loss(lambda: forward_kl(q, chain.moments), negative_elbo).mean()
        scalars["train/encoder_loss"] = loss
        scalars |= _set_encoder_gradient(encoder, loss) | _describe_encoder(model, q)
        with torch.no_grad():
            scalars["train/elbo"] = -negative_elbo().mean()
    return _gathered(chain.z, chain, scalars, num_evaluations)


def compute_importance_gradients(
    model: LatentVariableModel,
    encoder: nn.Module,
    objective: ImportanceWeighted,
    batch: Batch,
    noise: UpdateNoise,
) -> Gradients:
    """One batch of an importance-weighted autoencoder, up to and without the optimisers' steps."""
    count, (batch_size, dim) = objective.num_samples, noise.shape
    q = encoder(batch)
    repeated = batch.x.repeat(count, *[1] * (batch.x.ndim - 1))

    def log_joint(z: Tensor) -> Tensor:
        return model.log_joint(repeated, z.reshape(-1, dim)).reshape(count, batch_size)

    found = importance_gradients(log_joint, q, noise.normal("importance", count), list(model.parameters()))
    loss = found.loss.mean()
    scalars = _set_theta_gradient(model, found.theta) | _set_encoder_gradient(encoder, loss)
    scalars |= _describe_encoder(model, q) | {
        "train/importance_bound": found.bound.mean(),
        "train/effective_sample_size": found.weights.square().sum(0).reciprocal().mean(),
        "train/log_joint": found.log_joint.mean(),
    }
    return _gathered(found.z, None, scalars, count * batch_size)


def _set_theta_gradient(model: LatentVariableModel, gradient: list[Tensor]) -> dict[str, Tensor]:
    for parameter, ascent in zip(model.parameters(), gradient):
        parameter.grad = -ascent  # θ ascends log p(x, z; θ)
    sigma = model.likelihood.log_scale.detach().exp()
    return {"train/sigma": sigma, "train/theta_gradient_norm": _norm(gradient)}


def _set_encoder_gradient(encoder: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    phi = list(encoder.parameters())
    for parameter, gradient in zip(phi, torch.autograd.grad(loss, phi, retain_graph=True)):
        parameter.grad = gradient
    return {"train/encoder_gradient_norm": _norm([parameter.grad for parameter in phi])}


def _describe_encoder(model: LatentVariableModel, q: DiagonalGaussian) -> dict[str, Tensor]:
    q = q.detach()
    return {"train/kl": q.kl(model.prior).mean(), "train/encoder_scale": q.variance.sqrt().mean()}


def _gathered(z: Tensor, chain: Chain | None, scalars: dict[str, Tensor], num_evaluations: int) -> Gradients:
    # A sum is finite only if every term is: one number answers for all gradients.
    norms = [value for name, value in scalars.items() if name.endswith("gradient_norm")]
    finite = torch.isfinite(torch.stack([*norms, z.sum().to(norms[0].dtype)]).sum())
    return Gradients(z, chain, {name: value.detach() for name, value in scalars.items()}, finite, num_evaluations)


def _norm(gradients: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def _describe(chain: Chain) -> dict[str, Tensor]:
    scalars = {"train/log_joint": chain.first[0].mean()}
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
