"""One update of θ and φ from one batch: Algorithm 1, line by line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lpc_runner.data.dataset import Batch
from lpc_runner.distributions import DiagonalGaussian
from lpc_runner.inference.acceptance import ShadowMetropolis
from lpc_runner.inference.chain import Chain, ChainNoise, FusedPotential, constant
from lpc_runner.inference.engine import Eager
from lpc_runner.inference.importance import ImportanceWeighted, importance_gradients
from lpc_runner.inference.objectives import Objective, forward_kl, reverse_kl
from lpc_runner.models.latent import LatentVariableModel
from lpc_runner.randomness import generator
from lpc_runner.training.distributed import SINGLE

MAXIMA = ("chain/max_noise_variance",)  # logged values that are the largest of the batch; the others are means
Combine = Callable[..., tuple[list[Tensor], dict[str, Tensor], Tensor]]  # Ranks.combine
ALONE: Combine = partial(SINGLE.combine, stop=False)

STEP_BY_STEP = Eager()


@dataclass
class UpdateNoise:
    """Every random number of one update, named by (seed, update): warm start, prior start, and ξ(1) .. ξ(T).

    shape: (B, d) of the global batch; rows: the slice of it that this process works on.
    """

    seed: int
    update: int
    shape: tuple[int, int]
    device: torch.device | str
    dtype: torch.dtype = torch.float32
    rows: slice = field(default_factory=lambda: slice(None))

    def normal(self, stream: str, *more: int) -> Tensor:
        """N(0, I), this process's rows of (*more, B, d), for the named purpose."""
        source = generator(self.seed, stream, self.update, device=self.device)
        draw = torch.randn((*more, *self.shape), generator=source, device=self.device, dtype=self.dtype)
        return draw[..., self.rows, :]

    def chain(self) -> ChainNoise:
        """ξ(t) of the chain."""
        return ChainNoise(self.seed, self.update, self.shape, self.device, self.dtype, self.rows)


@dataclass
class Gradients:
    """The result of one batch: gradients are set on the parameters' .grad, values are on the device, not yet read.

    z: the last latents, (B, d). chain: None where the objective has none. scalars: logged quantities, each a 0-d
    tensor. finite: 0-d bool, whether every gradient is finite. num_evaluations: gradients of log p(x, z) of one example
    that this took, on all ranks. stop: 0-d, ranks that were signalled.
    """

    z: Tensor
    chain: Chain | None
    scalars: dict[str, Tensor]
    finite: Tensor
    num_evaluations: int
    stop: Tensor


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
    combine: Combine = ALONE,
    engine: Eager = STEP_BY_STEP,
) -> Gradients:
    """Algorithm 1 for one batch, up to and without the optimisers' steps.

    start_from_prior: z(0) ~ p(z) instead of q; the encoder still learns, from its own z ~ q (no effect without a
    chain). observe: see Eager.run. judge: log the acceptance that MALA would have had, chain/mala_acceptance, where
    the engine shows every step. combine: see Ranks.combine. engine: runs the chain.
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
    judge = judge and (engine.shows_steps or observe is not None) and sampler.noisy and sampler.num_steps > 1
    shadow = ShadowMetropolis(start.detach()) if judge else None
    chain = engine.run(
        model.log_joint,
        (batch.x,),
        start,
        sampler,
        noise.chain(),
        parameters=theta,
        centre=centre,
        q=q,
        observe=_all_of([watch for watch in (observe, shadow) if watch is not None]),
    )
    gradients = [-gradient for gradient in chain.theta_gradient]  # θ ascends log p(x, z; θ)
    scalars, num_evaluations = _describe(chain), chain.num_evaluations
    if shadow is not None:
        scalars["chain/mala_acceptance"] = shadow.mean()
    if q is not None:
        at_warm = chain.first
        if start is not warm:
            with engine.autocast(), constant(theta):
                at_warm = FusedPotential(log_joint, ())(warm, False)
            num_evaluations += len(warm)

        def negative_elbo() -> Tensor:
            return reverse_kl(q, model.prior, warm, *at_warm)

        loss = objective.loss(lambda: forward_kl(q, chain.moments), negative_elbo).mean()
        gradients += torch.autograd.grad(loss, list(encoder.parameters()))
        with torch.no_grad():
            scalars |= {"train/encoder_loss": loss, "train/elbo": -negative_elbo().mean()}
        scalars |= _describe_encoder(model, q)
    return _finish(model, encoder, gradients, scalars, chain.z, chain, num_evaluations, noise, combine)


def compute_importance_gradients(
    model: LatentVariableModel,
    encoder: nn.Module,
    objective: ImportanceWeighted,
    batch: Batch,
    noise: UpdateNoise,
    combine: Combine = ALONE,
    engine: Eager = STEP_BY_STEP,
) -> Gradients:
    """One batch of an importance-weighted autoencoder, up to and without the optimisers' steps."""
    q = encoder(batch)
    count, (batch_size, dim) = objective.num_samples, q.mean.shape
    repeated = batch.x.repeat(count, *[1] * (batch.x.ndim - 1))

    def log_joint(z: Tensor) -> Tensor:
        with engine.autocast():
            return model.log_joint(repeated, z.reshape(-1, dim)).reshape(count, batch_size)

    found = importance_gradients(log_joint, q, noise.normal("importance", count), list(model.parameters()))
    loss = found.loss.mean()
    gradients = [-gradient for gradient in found.theta]
    gradients += torch.autograd.grad(loss, list(encoder.parameters()))
    scalars = _describe_encoder(model, q) | {
        "train/importance_bound": found.bound.mean(),
        "train/effective_sample_size": found.weights.square().sum(0).reciprocal().mean(),
        "train/log_joint": found.log_joint.mean(),
    }
    return _finish(model, encoder, gradients, scalars, found.z, None, count * batch_size, noise, combine)


def _finish(
    model: LatentVariableModel,
    encoder: nn.Module | None,
    gradients: list[Tensor],
    scalars: dict[str, Tensor],
    z: Tensor,
    chain: Chain | None,
    num_evaluations: int,
    noise: UpdateNoise,
    combine: Combine,
) -> Gradients:
    """Gradients of θ, then of φ, made those of the global batch and set on the parameters."""
    scalars = {name: value.detach() for name, value in scalars.items()}
    scalars |= {f"train/{name}": value.detach() for name, value in model.likelihood.scalars().items()}
    maxima = {name: scalars.pop(name) for name in MAXIMA if name in scalars}
    gradients, scalars, stop = combine(gradients, {**scalars, "z": z.sum()}, maxima)
    theta = list(model.parameters())
    parameters = [*theta, *(encoder.parameters() if encoder is not None else ())]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    scalars["train/theta_gradient_norm"] = _norm(gradients[: len(theta)])
    norms = [scalars["train/theta_gradient_norm"]]
    if encoder is not None:
        scalars["train/encoder_gradient_norm"] = _norm(gradients[len(theta) :])
        norms.append(scalars["train/encoder_gradient_norm"])
    # A sum is finite only if every term is: one number answers for all gradients.
    finite = torch.isfinite(torch.stack([*norms, scalars.pop("z").to(norms[0].dtype)]).sum())
    num_ranks = noise.shape[0] // len(z)
    return Gradients(z, chain, scalars, finite, num_evaluations * num_ranks, stop)


@torch.no_grad()
def _describe_encoder(model: LatentVariableModel, q: DiagonalGaussian) -> dict[str, Tensor]:
    """KL(q ‖ p) in nats per example, in all and per named block of z, and q's mean standard deviation."""
    kl = q.kl_per_dimension(model.prior)
    blocks = {f"train/kl_{name}": kl[:, block].sum(1).mean() for name, block in model.blocks.items()}
    return {"train/kl": kl.sum(1).mean(), **blocks, "train/encoder_scale": q.variance.sqrt().mean()}


def encoder_gradients(
    model: LatentVariableModel,
    encoder: nn.Module,
    batch: Batch,
    noise: UpdateNoise,
    num_samples: int,
    combine: Combine = ALONE,
    engine: Eager = STEP_BY_STEP,
) -> tuple[Tensor, int]:
    """An E-step's gradient: that of -ELBO, the mean over num_samples draws z ~ q, on φ's .grad; θ has no part.

    Returns whether all of it is finite, 0-d bool, and the evaluations that it took on all ranks.
    """
    q, potential = encoder(batch), FusedPotential(partial(engine.potential_of(model.log_joint), batch.x), ())
    loss = 0.0
    for sample in range(num_samples):
        z = q.rsample(noise.normal(f"encoder_step/{sample}"))
        loss = loss + reverse_kl(q, model.prior, z, *potential(z, False)).mean() / num_samples
    phi = list(encoder.parameters())
    gradients, _, _ = combine(torch.autograd.grad(loss, phi), {}, {})
    for parameter, gradient in zip(phi, gradients):
        parameter.grad = gradient
    return torch.isfinite(_norm(gradients)), potential.num_evaluations * noise.shape[0]


def _norm(gradients: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def _all_of(observers: list[Callable]) -> Callable | None:
    def observe(state, info) -> None:
        for observer in observers:
            observer(state, info)

    return observe if observers else None


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
