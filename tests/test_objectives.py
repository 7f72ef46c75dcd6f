"""What the encoder and θ learn, against the slow forms: per-step sums, the ELBO, a VAE, Algorithm 1."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal

from benchmarks.literal import literal_gradients
from lpc_runner.base.distributions import DiagonalGaussian, DiscretisedGaussian, Prior
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.chain import Moments
from lpc_runner.inference.context import Context
from lpc_runner.inference.objectives import ImportanceWeighted, WeightedKL, forward_kl, reverse_kl
from lpc_runner.inference.preconditioning import Adam, Identity, SharedAdam
from lpc_runner.inference.samplers import Langevin, Map, NoSteps
from lpc_runner.inference.step_sizes import Constant, Polynomial
from lpc_runner.models.dense import MLP
from lpc_runner.training.update import UpdateNoise, compute_gradients

OBJECTIVES = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "jeffreys": (0.5, 0.5), "prior": (0.0, 0.0)}
METRICS = {
    "none": Identity(),
    "adam": Adam(0.25, 1e-8, None),
    "adam_frozen": Adam(0.6, 1e-4, 3),
    "adam_shared": SharedAdam(0.25, 1e-8, None),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def model():
    return MLP((1, 3, 3), 4, 1.3, DiscretisedGaussian("learned", 0.3, 0.9), 0.3, [6]).double()


@pytest.fixture
def encoder(model):
    return model.build_encoder().double()


@pytest.fixture
def batch():
    levels = torch.randint(256, (5, 1, 3, 3))
    return Batch(levels.double() / 127.5 - 1, torch.arange(5))


NOISE = UpdateNoise(0, 3, (5, 4), "cpu", torch.float64)


def langevin(num_steps=7, theta_states="all", metric=None):
    return Langevin(num_steps, theta_states, Constant(0.02), metric or Identity())


def grads(module):
    return [parameter.grad for parameter in module.parameters()]


def random_q():
    mean = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    variance = (torch.rand(5, 4, dtype=torch.float64) + 0.1).requires_grad_()
    return DiagonalGaussian(mean, variance)


@pytest.mark.parametrize("detached", [True, False])
def test_forward_kl_from_two_sums(detached):
    """Value and gradient equal those of -(1/T) Σ_t log q(z(t)), about q's own mean or any other centre."""
    q, states = random_q(), torch.randn(9, 5, 4, dtype=torch.float64)
    moments = Moments(q.mean.detach() if detached else torch.randn(5, 4, dtype=torch.float64))
    for z in states:
        moments.add(z[None])
    slow = -torch.stack([Normal(q.mean, q.variance.sqrt()).log_prob(z).sum(1) for z in states]).mean(0)
    fast = forward_kl(q, moments)
    torch.testing.assert_close(fast, slow)
    weights = torch.rand(5, dtype=torch.float64)
    both = [torch.autograd.grad((weights * loss).sum(), [q.mean, q.variance]) for loss in (fast, slow)]
    torch.testing.assert_close(*both)


def test_reverse_kl_is_the_negative_elbo(model, encoder, batch):
    """Its value is -log p(x|z) + KL(q ‖ p); its gradient is the one through the decoder; θ is not touched."""
    q = encoder(batch)
    z = q.rsample(torch.randn(5, 4, dtype=torch.float64))
    slow = -model.likelihood(batch.x, model.decode(z)) + q.kl(model.prior)
    point = z.detach().requires_grad_()
    log_joint = model.log_joint(batch.x, point)
    (drift,) = torch.autograd.grad(log_joint.sum(), point)
    fast = reverse_kl(q, model.prior, z, log_joint.detach(), drift)
    torch.testing.assert_close(fast, slow)
    phi, weights = list(encoder.parameters()), torch.rand(5, dtype=torch.float64)
    both = [torch.autograd.grad((weights * loss).sum(), phi, retain_graph=True) for loss in (fast, slow)]
    torch.testing.assert_close(*both)
    fast.sum().backward()
    assert grads(model) == [None] * len(grads(model))


def test_objective_weights_and_skips():
    """w_f·forward + w_r·reverse, and a term of weight 0 is not even computed."""
    terms = {"forward": torch.tensor([3.0]), "reverse": torch.tensor([5.0])}
    for forward, reverse in OBJECTIVES.values():
        called = []

        def term(name, called=called):
            return lambda: called.append(name) or terms[name]

        objective = WeightedKL(forward, reverse)
        assert objective.uses_encoder == (forward + reverse > 0)
        loss = objective.loss(term("forward"), term("reverse"))
        assert loss == forward * 3 + reverse * 5
        assert called == [name for name, weight in zip(terms, (forward, reverse)) if weight > 0]


def hand_written_vae(model, encoder, batch):
    """Gradients of -ELBO by one backward pass: to φ through z, to θ from log p(x|z)."""
    mean, raw = encoder.body(batch.x).chunk(2, dim=1)
    sd = (torch.log1p(torch.exp(0.3 * raw)) / 0.3).sqrt()
    z = mean + sd * NOISE.normal("warm_start")
    pixels = model.likelihood(batch.x, model.decode(z))
    prior = Normal(torch.zeros_like(mean), 1.3)
    kl = torch.distributions.kl_divergence(Normal(mean, sd), prior).sum(1)
    loss = (kl - pixels).mean()
    parameters = [*model.parameters(), *encoder.parameters()]
    return torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize(
    "sampler, start_from_prior",
    [(NoSteps(None, None), False), (NoSteps(None, None), True), (langevin(1), False)],
)
def test_vae_is_a_special_case(model, encoder, batch, sampler, start_from_prior):
    """Without a chain, or with T = 1 whose z(1) is unused, reverse KL is a VAE's step, θ and φ."""
    result = compute_gradients(WeightedKL(0.0, 1.0), Context(model, encoder, sampler, batch, NOISE, start_from_prior))
    want = hand_written_vae(model, encoder, batch)
    torch.testing.assert_close([*grads(model), *grads(encoder)], list(want), rtol=1e-10, atol=1e-12)
    assert result.finite


CASES = list(itertools.product(OBJECTIVES, METRICS, ["all", "last"], [False, True]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_update_equals_literal_algorithm(model, encoder, batch, case):
    """Every saving (fused backward, two sums, no states, no decoder in reverse KL) changes rounding only."""
    objective, metric, theta_states, start_from_prior = case
    weights = WeightedKL(*OBJECTIVES[objective])
    used = encoder if weights.uses_encoder else None
    sampler = langevin(7, theta_states, METRICS[metric])
    result = compute_gradients(weights, Context(model, used, sampler, batch, NOISE, start_from_prior))
    want = literal_gradients(model, used, sampler, weights, batch, noise=NOISE, start_from_prior=start_from_prior)
    exactly = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(result.chain.z, want.states[-1], **exactly)
    torch.testing.assert_close(grads(model), want.theta, **exactly)
    if used is None:
        assert grads(encoder) == [None] * len(grads(encoder))
    else:
        torch.testing.assert_close(grads(encoder), want.phi, **exactly)
        assert all(gradient.abs().sum() > 0 for gradient in want.phi)
    assert result.finite


@pytest.mark.parametrize("sampler", [
    Map(9, "last", Constant(0.02), Identity()),
    Langevin(9, "all", Polynomial(0.05, 3.0, 0.7), Adam(0.9, 1e-8, None)),
], ids=["map", "polynomial"])  # fmt: skip
def test_other_samplers_equal_literal_algorithm(model, encoder, batch, sampler):
    """Predictive coding (no noise, θ at z(T)) and a decaying step size."""
    result = compute_gradients(WeightedKL(0.5, 0.5), Context(model, encoder, sampler, batch, NOISE))
    want = literal_gradients(model, encoder, sampler, WeightedKL(0.5, 0.5), batch, noise=NOISE, start_from_prior=False)
    torch.testing.assert_close(result.chain.z, want.states[-1], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close([*grads(model), *grads(encoder)], [*want.theta, *want.phi], rtol=1e-9, atol=1e-11)


def test_theta_does_not_see_the_encoder_loss(model, encoder, batch):
    """θ's gradient is bit for bit that of the chain, whatever the encoder learns from."""
    seen = []
    for weights in [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]:
        chain = compute_gradients(WeightedKL(*weights), Context(model, encoder, langevin(), batch, NOISE)).chain
        seen.append([gradient.clone() for gradient in grads(model)])
        assert all(torch.equal(-a, b) for a, b in zip(chain.theta_gradient, seen[-1]))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other))


def test_start_from_prior_moves_the_chain_and_not_the_reverse_kl(model, encoder, batch):
    """z(0) is the prior's draw; reverse KL stays at z ~ q."""
    starts, losses = [], []
    for start_from_prior in (False, True):
        seen = []
        context = Context(
            model, encoder, Map(1, "all", Constant(1e-12), Identity()), batch, NOISE, start_from_prior,
            on_step=lambda state, _, seen=seen: seen.append(state.z),
        )  # fmt: skip
        result = compute_gradients(WeightedKL(0.0, 1.0), context)
        starts.append(seen[0])
        losses.append(result.scalars["train/elbo"])
    q = encoder(batch)
    torch.testing.assert_close(starts[0], q.rsample(NOISE.normal("warm_start")).detach())
    torch.testing.assert_close(starts[1], 1.3 * NOISE.normal("prior_start"))
    torch.testing.assert_close(*losses)


def test_scalars_are_what_their_names_say(model, encoder, batch):
    """Encoder loss, ELBO, KL, gradient norms and the chain's trace, recomputed."""
    result = compute_gradients(WeightedKL(0.5, 0.5), Context(model, encoder, langevin(), batch, NOISE))
    scalars, q = result.scalars, encoder(batch)
    z = q.rsample(NOISE.normal("warm_start"))
    elbo = (model.likelihood(batch.x, model.decode(z)) - q.kl(model.prior)).mean()
    expected = {
        "train/elbo": elbo,
        "train/kl": q.kl(model.prior).mean(),
        "train/encoder_loss": 0.5 * forward_kl(q, result.chain.moments).mean() - 0.5 * elbo,
        "train/log_joint": model.log_joint(batch.x, z).mean(),
        "train/sigma": model.likelihood.log_scale.exp(),
        "train/theta_gradient_norm": torch.cat([gradient.flatten() for gradient in grads(model)]).norm(),
        "train/encoder_gradient_norm": torch.cat([gradient.flatten() for gradient in grads(encoder)]).norm(),
        "chain/max_noise_variance": torch.tensor(2 * 0.02),
    }
    for name, value in expected.items():
        torch.testing.assert_close(scalars[name], value.detach().to(scalars[name]))
    assert not any(value.requires_grad for value in scalars.values())
    assert "chain/delta_log_joint" in scalars
    one_step = Context(model, encoder, Langevin(1, "all", Constant(0.02), Identity()), batch, NOISE)
    assert "chain/delta_log_joint" not in compute_gradients(WeightedKL(0.5, 0.5), one_step).scalars


@pytest.mark.parametrize("where", ["decoder", "encoder", "log_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_finite_is_false_when_a_gradient_is_not(model, encoder, batch, where, value):
    """One number that is not finite, anywhere, is seen."""
    part = {"decoder": model.decoder, "encoder": encoder.body, "log_scale": model.likelihood}[where]
    with torch.no_grad():
        next(part.parameters()).view(-1)[0] = value
    result = compute_gradients(WeightedKL(0.5, 0.5), Context(model, encoder, langevin(), batch, NOISE))
    assert not result.finite


@pytest.mark.parametrize("which", ["theta", "phi"])
def test_finite_sees_the_gradients_themselves(model, encoder, batch, which):
    """A gradient that is NaN while every value and every state of the chain is finite."""
    parameter = list({"theta": model.decoder, "phi": encoder}[which].parameters())[-1]
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    result = compute_gradients(WeightedKL(0.5, 0.5), Context(model, encoder, langevin(), batch, NOISE))
    assert result.chain.z.isfinite().all() and result.scalars["train/encoder_loss"].isfinite()
    assert not result.finite


def test_prior_scale_in_kl_and_score():
    """With p = q both directions vanish: KL is 0, and ∇ of reverse KL at a likelihood that ignores z is 0."""
    prior = Prior(1.3)
    mean = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    variance = torch.full((5, 4), 1.69, dtype=torch.float64, requires_grad=True)
    q = DiagonalGaussian(mean, variance)
    z = q.rsample(torch.randn(5, 4, dtype=torch.float64))
    loss = reverse_kl(q, prior, z, prior.log_prob(z.detach()), prior.score(z.detach()))
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    for gradient in torch.autograd.grad(loss.sum(), [mean, variance]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("num_samples", [1, 6])
def test_importance_weighted_gradients_are_those_of_the_bound(model, encoder, batch, num_samples):
    """θ and φ against automatic differentiation of -log (1/K) Σ p(x, z_k) / q(z_k|x) written out."""
    result = compute_gradients(ImportanceWeighted(num_samples), Context(model, encoder, None, batch, NOISE))
    noise = NOISE.normal("importance", num_samples)
    mean, raw = encoder.body(batch.x).chunk(2, dim=1)
    sd = (torch.log1p(torch.exp(0.3 * raw)) / 0.3).sqrt()
    terms = []
    for xi in noise:
        z = mean + sd * xi
        terms.append(model.log_joint(batch.x, z) - Normal(mean, sd).log_prob(z).sum(1))
    bound = torch.stack(terms).logsumexp(0) - math.log(num_samples)
    want = torch.autograd.grad(-bound.mean(), [*model.parameters(), *encoder.parameters()])
    torch.testing.assert_close([*grads(model), *grads(encoder)], list(want))
    torch.testing.assert_close(result.scalars["train/importance_bound"], bound.mean().detach())
    assert result.num_evaluations == 5 * num_samples and bool(result.finite) and result.chain is None


def test_effective_sample_size_of_equal_weights_is_their_number(model, batch):
    """q equal to the posterior gives equal weights: here p(x|z) does not depend on z, and q is the prior."""
    model.predict = lambda z: 0 * model.decoder(z)
    encoder = torch.nn.Module()
    encoder.mean = torch.nn.Parameter(torch.zeros(5, 4).double())
    encoder.variance = torch.nn.Parameter(torch.full((5, 4), 1.3**2).double())
    encoder.forward = lambda batch: DiagonalGaussian(encoder.mean, encoder.variance)
    found = ImportanceWeighted(8).gradients(Context(model, encoder, NoSteps(None, None), batch, NOISE))
    assert found.scalars["train/effective_sample_size"].item() == pytest.approx(8)
