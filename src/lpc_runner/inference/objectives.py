"""Algorithm 1; its encoder learns by reverse KL at the start, forward KL from the states (Section 3.2); and IWAE-K."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from typing import Annotated, Any

import torch
from torch import Tensor

from lpc_runner.base.distributions import LOG_2PI, DiagonalGaussian, Prior
from lpc_runner.base.schema import PositiveInt, at_least, checked, declared
from lpc_runner.inference import interfaces
from lpc_runner.inference.chain import Chain, FusedPotential, Moments, ShadowMetropolis, constant
from lpc_runner.inference.context import Context, Gradients
from lpc_runner.inference.interfaces import Objective

Weight = Annotated[float, at_least(0)]


def forward_kl(q: DiagonalGaussian, moments: Moments) -> Tensor:
    """L_F = -(1/T) Σ_t log q(z(t)|x; φ) in nats, (B,): KL(p(z|x) ‖ q) up to the posterior's entropy.

    For a diagonal Gaussian the sum over t depends on the states through two sums only, so the encoder is
    differentiated once per batch: Σ(z - m)² = Σ(z - c)² - 2(m - c) Σ(z - c) + T (m - c)², c the moments' centre.
    """
    shift = q.mean - moments.centre
    square = (moments.second - 2 * shift * moments.first) / moments.count + shift.square()
    return 0.5 * (square / q.variance + q.variance.log() + LOG_2PI).sum(1)


def forward_kl_of(q: Any, states: Tensor) -> Tensor:
    """`forward_kl` of k states of the chain, (k, B, d), one by one, for every q that has a log-density; nats, (B,)."""
    return -q.repeat(len(states)).log_prob(states.flatten(0, 1)).view(states.shape[:2]).mean(0)


def reverse_kl(q: DiagonalGaussian, prior: Prior, z: Tensor, log_joint: Tensor, drift: Tensor) -> Tensor:
    """L_R = -ELBO = -log p(x|z) + KL(q ‖ p(z)) in nats, (B,), z = q.rsample(noise): KL(q ‖ p(z|x)) up to log p(x).

    The gradient through z is the drift ∇z log p(x, z) less the prior's score, both already known, so neither the
    decoder is run again nor can a gradient reach θ. log_joint: log p(x, z) (B,). drift: (B, d). Where q is not
    factorised, its KL is that of its conditionals at z, whose mean over z ~ q it is.
    """
    point = z.detach()
    log_likelihood = log_joint - prior.log_prob(point)
    pathwise = ((drift - prior.score(point)) * (z - point)).sum(1)  # value 0, gradient ∇z log p(x|z) · dz/dφ
    return q.at(z).kl(prior) - (log_likelihood + pathwise)


class WeightedKL(interfaces.Objective):
    """w_f · forward KL + w_r · reverse KL; (1, 0) forward, (0, 1) reverse, (½, ½) Jeffreys, (0, 0) no encoder.

    num_kept_states: null takes forward KL from all states of a chain, by two sums, which a factorised q allows; a
    number keeps so many of them, evenly apart and the last one with them, and takes it from these, whatever q is.
    Without an encoder chains start from the prior.
    """

    allows_chain = True

    @checked
    def __init__(self, forward: Weight, reverse: Weight, num_kept_states: PositiveInt | None = None) -> None:
        if num_kept_states is not None and forward == 0:
            raise ValueError(
                f"num_kept_states is of forward KL, whose weight is 0: null would fit, got {num_kept_states}"
            )
        self.forward, self.reverse, self.num_kept_states = forward, reverse, num_kept_states
        self.uses_encoder = forward > 0 or reverse > 0
        # Forward KL is an average over the chain's states; without an encoder z(0) is no guess of the posterior.
        self.needs_chain = forward > 0 or not self.uses_encoder
        self.needs_factorised_q = forward > 0 and num_kept_states is None  # two sums over the states suffice then

    @property
    def capturable(self) -> bool:
        """A class made from this one says so for itself."""
        return type(self) is WeightedKL

    def loss(self, forward: Callable[[], Tensor], reverse: Callable[[], Tensor]) -> Tensor:
        """The encoder's loss, (B,); a term with weight 0 is never computed."""
        terms = [(self.forward, forward), (self.reverse, reverse)]
        loss: Any = sum(weight * term() for weight, term in terms if weight > 0)  # 0 where there is no encoder
        return loss

    def gradients(self, context: Context) -> Gradients:
        """Algorithm 1 for one batch, up to and without the optimisers' steps.

        From another start the encoder still learns, reverse KL from its own z ~ q (no effect without a chain). The
        acceptance that MALA would have had is logged, chain/mala_acceptance, where the engine shows every step.
        """
        model, sampler, noise, engine = context.model, context.sampler, context.noise, context.engine
        q = context.q()  # q(z|x; φ)
        warm = q.rsample(noise.normal("warm_start")) if q is not None else None
        start = context.start(warm)  # z(0), ~ q unless the sampler says otherwise
        shows_steps = engine.shows_steps or context.on_step is not None
        judge = context.judge and shows_steps and sampler.noisy and sampler.num_steps > 1
        judge = judge and declared(sampler, interfaces.Sampler, "energy_error_of") is None  # the chain judges itself
        shadow = ShadowMetropolis(start.detach()) if judge else None
        watchers = [each for each in (context.on_step, shadow) if each is not None]

        def on_step(*step: Any) -> None:
            for watch in watchers:
                watch(*step)

        chain = engine.run(
            model.log_joint,
            (context.batch.x,),
            start,
            sampler,
            noise.chain(),
            parameters=context.theta,
            centre=q.mean if q is not None else None,
            q=q,
            on_step=on_step if watchers else None,
            num_kept=self.num_kept_states or 0,
        )
        theta = [-gradient for gradient in chain.theta_gradient]  # θ ascends log p(x, z; θ)
        phi, (scalars, maxima), num_evaluations = [], _describe(chain, sampler), chain.num_evaluations
        if shadow is not None and (acceptance := shadow.means()[0]) is not None:
            scalars["chain/mala_acceptance"] = acceptance
        if q is not None and warm is not None:
            # Beside kept chains, forward KL alone needs no decoder at q's z: there is no ELBO then.
            has_elbo = self.reverse > 0 or context.kept is None
            at_warm = chain.first
            if start is not warm and has_elbo:
                with engine.autocast(), constant(context.theta):
                    at_warm = FusedPotential(partial(model.log_joint, context.batch.x), ())(warm, False)
                num_evaluations += len(warm)

            def negative_elbo() -> Tensor:
                return reverse_kl(q, model.prior, warm, *at_warm)

            def negative_log_q() -> Tensor:
                kept = chain.moments.kept
                return forward_kl_of(q, torch.stack(kept)) if kept else forward_kl(q, chain.moments)

            loss = self.loss(negative_log_q, negative_elbo).mean()
            phi = list(torch.autograd.grad(loss, context.phi))
            scalars["train/encoder_loss"] = loss.detach()
            if has_elbo:
                with torch.no_grad():
                    scalars["train/elbo"] = -negative_elbo().mean()
            scalars |= describe_encoder(model, q, warm)
        return Gradients(theta, phi, chain.z, num_evaluations, scalars, maxima, chain)


class VariationalEM(WeightedKL):
    """Reverse KL with E-steps: per batch, num_encoder_steps steps of φ alone, then the update of θ and φ together.

    num_samples: draws z ~ q that each E-step averages over.
    """

    @checked
    def __init__(self, num_encoder_steps: PositiveInt, num_samples: PositiveInt) -> None:
        super().__init__(0.0, 1.0)
        self.num_encoder_steps, self.num_samples = num_encoder_steps, num_samples

    def gradients(self, context: Context) -> Gradients:
        """The E-steps, as long as they are finite, then Algorithm 1."""
        spent, finite = 0, True
        for step in range(self.num_encoder_steps):
            phi, num_evaluations = self.e_step(replace(context, noise=context.noise.within("encoder_steps", step)))
            spent += num_evaluations
            finite = context.update_encoder(phi)
            if not finite:
                break
        gradients = super().gradients(context)
        return replace(gradients, finite=finite, num_evaluations=gradients.num_evaluations + spent)

    def e_step(self, context: Context) -> tuple[list[Tensor], int]:
        """φ's gradient of -ELBO, the mean over num_samples draws z ~ q, and the evaluations that it took."""
        model, q = context.model, context.q()
        potential = FusedPotential(partial(context.engine.potential_of(model.log_joint), context.batch.x), ())
        parts = []
        for sample in range(self.num_samples):
            z = q.rsample(context.noise.normal(f"encoder_step/{sample}"))
            parts.append(reverse_kl(q, model.prior, z, *potential(z, False)).mean() / self.num_samples)
        loss = reduce(torch.add, parts)
        return list(torch.autograd.grad(loss, context.phi)), potential.num_evaluations * len(z)


@torch.no_grad()
def describe_encoder(model: Any, q: DiagonalGaussian, z: Tensor) -> dict[str, Tensor]:
    """KL(q ‖ p) in nats per example, in all and per named block of z, and q's mean standard deviation.

    z: (B, d), drawn from q; where q is not factorised, both are those of its conditionals at z.
    """
    q = q.at(z)
    kl = q.kl_per_dimension(model.prior)
    blocks = {f"train/kl_{name}": kl[:, block].sum(1).mean() for name, block in model.blocks.items()}
    return {"train/kl": kl.sum(1).mean(), **blocks, "train/encoder_scale": q.variance.sqrt().mean()}


def _describe(chain: Chain, sampler: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logged means, and logged maxima."""
    scalars, trace = {"train/log_joint": chain.first[0].mean()}, chain.trace
    if len(trace["log_joint"]) == 0:
        return scalars, {}
    if declared(sampler, interfaces.Sampler, "stop") == "settled":
        scalars["chain/num_steps"] = torch.full_like(scalars["train/log_joint"], float(chain.moments.count))
    if chain.acceptance is not None and chain.energy_error is not None:
        scalars |= {"chain/acceptance": chain.acceptance, "chain/energy_error": chain.energy_error}
    scalars |= {
        "chain/log_joint_last": trace["log_joint"][-1],
        "chain/drift_norm_first": trace["drift_norm"][0],
        "chain/drift_norm_last": trace["drift_norm"][-1],
    }
    if len(trace["log_joint"]) > 1:  # of one step there is no difference to see
        scalars["chain/delta_log_joint"] = trace["log_joint"][-1] - trace["log_joint"][0]
    return scalars, {"chain/max_noise_variance": trace["noise_variance"].max()}


class ImportanceWeighted(Objective):
    """Objective of an importance-weighted autoencoder, -E log (1/K) Σ_k p(x, z_k) / q(z_k|x), K = num_samples.

    It has no chain: θ and φ both follow the gradient of this bound, ∇ log (1/K) Σ_k w_k = Σ_k w̃_k ∇ log w_k with
    w_k = p(x, z_k; θ) / q(z_k|x; φ), w̃ the weights divided by their sum, in one pass through the decoder. K = 1 is the
    negative ELBO with a sampled KL.
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
        q, noise = context.q(), context.noise.normal("importance", self.num_samples)  # (K, B, d)
        z = q.mean + q.variance.sqrt() * noise
        # At z_k itself mean and scale cancel inside log q: (z_k - mean)/scale is the noise; the normaliser remains.
        log_q = -0.5 * (noise.square() + LOG_2PI).sum(2) - 0.5 * q.variance.log().sum(1)
        point = z.detach().requires_grad_()
        log_joint = context.log_joint(point)
        log_weights = log_joint.detach() - log_q.detach()
        weights = log_weights.softmax(0)  # w̃
        drift, *theta = torch.autograd.grad((weights * log_joint).sum(), [point, *context.theta])
        point = point.detach()
        pathwise = (drift * (z - point)).sum((0, 2))  # value 0, gradient Σ w̃ ∇z log p · dz/dφ
        loss = ((weights * log_q).sum(0) - pathwise).mean()
        phi = list(torch.autograd.grad(loss, context.phi))
        scalars = describe_encoder(context.model, q, point[0]) | {
            "train/importance_bound": (log_weights.logsumexp(0) - math.log(self.num_samples)).mean(),
            "train/effective_sample_size": weights.square().sum(0).reciprocal().mean(),
            "train/log_joint": log_joint.detach().mean(),
        }
        count, size, _ = noise.shape
        return Gradients([-gradient / size for gradient in theta], phi, point[0], count * size, scalars)
