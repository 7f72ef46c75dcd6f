"""The linear Gaussian system against its exact answers: Kalman filter, smoother, ULA's moments, both gaps, EM."""

import math
from itertools import pairwise

import kalman
import pytest
import torch
from series import lds, lfads
from torch.distributions import MultivariateNormal, kl_divergence

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.data.dataset import Batch
from lpc_runner.evaluation import linear_gaussian
from lpc_runner.inference.chain import ChainNoise, run_chain
from lpc_runner.inference.objectives import VariationalEM
from lpc_runner.inference.preconditioning import EncoderVariance, Identity
from lpc_runner.inference.samplers import Langevin, NoSteps
from lpc_runner.inference.step_sizes import Constant
from lpc_runner.training.learner import AdamOptimizer, Learner

F64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def series(model, num_trials=3):
    """Trials sampled from the model itself."""
    with torch.no_grad():
        mean = model.decode(torch.randn(num_trials, model.latent_dim, **F64))
        return mean + model.likelihood.log_scale.exp() * torch.randn_like(mean)


def linear_maps(model):
    """States and mean as z ↦ F z + f and M z + c, read off one unit vector at a time; rows flat over (T, ·)."""
    basis = torch.cat([torch.zeros(1, model.latent_dim, **F64), torch.eye(model.latent_dim, **F64)])
    with torch.no_grad():
        states, mean = model.run(basis).states.flatten(1), model.decode(basis).flatten(1)
    return (states[1:] - states[0]).T, states[0], (mean[1:] - mean[0]).T, mean[0]


VARIANTS = {
    "lds": {},
    "factors": {"num_factors": 3},
    "wide": {"state_dim": 3, "input_dim": 1, "initial_dim": 2},
    "no_inputs": {"inputs": "none"},
    "no_inputs_long": {"inputs": "none", "num_steps": 50, "state_dim": 6},
}


def variant(name):
    """The long one is stable and without process noise: its states' covariances become singular."""
    model = lds(**VARIANTS[name])
    if name == "no_inputs_long":
        with torch.no_grad():
            transition = model.generator.transition.weight
            transition.mul_(0.7 / torch.linalg.eigvals(transition).abs().max())
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_kalman_log_likelihood_is_that_of_the_dense_gaussian(name):
    """All of y is N(c, M Mᵀ + σ²I) with M from the model's own decoder."""
    model = variant(name)
    x = series(model)
    _, _, map_, mean = linear_maps(model)
    variance = torch.exp(2 * model.likelihood.log_scale.detach())
    dense = MultivariateNormal(mean, map_ @ map_.T + variance * torch.eye(len(mean), **F64))
    for exact in (linear_gaussian.log_likelihood(model, x), linear_gaussian.evidence(model).log_prob(x.flatten(1))):
        torch.testing.assert_close(exact, dense.log_prob(x.flatten(1)))


def test_the_filter_starts_at_the_first_states_own_prior():
    """x_1 ~ N(A m0 + b, A L0 L0ᵀ Aᵀ + L Lᵀ): the moments of the model's first state over z."""
    model = lds()
    system = linear_gaussian.linear_gaussian(model)
    filtered = linear_gaussian.kalman_filter(system, series(model))
    to_states, offset, _, _ = linear_maps(model)
    torch.testing.assert_close(filtered.predicted_mean[0, 0], offset[:2])
    torch.testing.assert_close(filtered.predicted_covariance[0], to_states[:2] @ to_states[:2].T)


@pytest.mark.parametrize("name", VARIANTS)
def test_smoother_and_posterior_of_z_agree(name):
    """Moments of x_t given y: by the smoother, and as a linear map of the dense posterior of z."""
    model = variant(name)
    x, dim = series(model), model.generator.initial_size
    system = linear_gaussian.linear_gaussian(model)
    means, covariances = kalman.smooth(system, linear_gaussian.kalman_filter(system, x))
    exact = linear_gaussian.posterior(model, x)
    to_states, offset, _, _ = linear_maps(model)
    torch.testing.assert_close(means.flatten(1), exact.mean @ to_states.T + offset)
    dense = to_states @ exact.covariance_matrix[0] @ to_states.T
    for t, covariance in enumerate(covariances):
        block = slice(t * dim, (t + 1) * dim)
        torch.testing.assert_close(covariance, dense[block, block])


def test_bayes_rule():
    """log p(x, z) - log p(z|x) = Kalman's log p(x) at every z: log_joint is the exact joint density."""
    model = lds()
    x = series(model)
    for scale in (0.1, 1.0, 4.0):
        z = scale * torch.randn(3, model.latent_dim, **F64)
        evidence = model.log_joint(x, z) - linear_gaussian.posterior(model, x).log_prob(z)
        torch.testing.assert_close(evidence, linear_gaussian.log_likelihood(model, x))


def test_held_out_neurons_are_not_part_of_the_exact_answer():
    model = lds(num_held_out=2).eval()
    x = series(model)
    x[..., -2:] = math.nan
    z = torch.randn(3, model.latent_dim, **F64)
    evidence = model.log_joint(x, z) - linear_gaussian.posterior(model, x).log_prob(z)
    torch.testing.assert_close(evidence, linear_gaussian.log_likelihood(model, x))


def test_only_linear_gaussian_systems_have_exact_answers():
    assert linear_gaussian.is_linear_gaussian(lds())
    assert not linear_gaussian.is_linear_gaussian(lfads(generator="linear"))  # Poisson
    assert not linear_gaussian.is_linear_gaussian(lds(generator="gru"))
    assert not linear_gaussian.is_linear_gaussian(lds(input_prior="ar1"))


def exact_elbo(model, x, q):
    """E_q[log p(x, z)] + entropy, in closed form: log p(x, z) is quadratic in z."""
    posterior = linear_gaussian.posterior(model, x)
    precision = posterior.precision_matrix[0]
    shift = q.mean - posterior.mean
    trace = (q.variance * precision.diagonal()).sum(1) + (shift @ precision * shift).sum(1)
    divergence = 0.5 * (trace - model.latent_dim - torch.logdet(precision) - q.variance.log().sum(1))
    return linear_gaussian.log_likelihood(model, x) - divergence  # log p - KL(q ‖ p(z|x))


def test_the_approximation_gap_is_what_the_best_factorised_q_lacks():
    """At mean μ and variances 1/Λ_ii the ELBO is log p - gap, and any other diagonal q is below."""
    model = lds()
    x = series(model)
    exact = linear_gaussian.posterior(model, x)
    best = linear_gaussian.best_factorised(model, x)
    torch.testing.assert_close(best.variance, 1 / exact.precision_matrix.diagonal(dim1=1, dim2=2))
    gap = kalman.approximation_gap(model)
    assert gap > 0.1
    torch.testing.assert_close(exact_elbo(model, x, best), linear_gaussian.log_likelihood(model, x) - gap)
    marginal = DiagonalGaussian(exact.mean, exact.covariance_matrix.diagonal(dim1=1, dim2=2))
    for other in (marginal, DiagonalGaussian(exact.mean + 0.1, best.variance)):
        assert (exact_elbo(model, x, other) < exact_elbo(model, x, best)).all()


@pytest.mark.parametrize("metric", [pytest.param("none", marks=pytest.mark.slow), "encoder"])
def test_the_chains_moments_against_the_smoother(metric):
    """Plain Langevin of step γ ends at mean μ and covariance 2 (Λ(2I - γΛ))⁻¹; with constant G in coordinates z/√G.

    20 000 chains of one trial; γ at most half of 2/λmax; 5 standard errors, sqrt(2/20 000) relative for a variance.
    """
    model = lds(num_steps=4)
    x, num_chains, num_steps = series(model, 1), 20_000, 150
    exact = linear_gaussian.posterior(model, x)
    precision, dim = exact.precision_matrix[0], model.latent_dim
    q = DiagonalGaussian(exact.mean, 1 / precision.diagonal()[None])
    root = q.variance[0].sqrt() if metric == "encoder" else torch.ones(dim, **F64)
    scaled = root[:, None] * precision * root
    step_size = 1 / float(torch.linalg.eigvalsh(scaled)[-1])
    assert (1 - step_size * torch.linalg.eigvalsh(scaled)[0]) ** num_steps < 1e-2
    system = linear_gaussian.linear_gaussian(model)
    means, _ = kalman.smooth(system, linear_gaussian.kalman_filter(system, x))

    sampler = Langevin(
        num_steps, "all", Constant(step_size), EncoderVariance(1.0) if metric == "encoder" else Identity()
    )
    start = torch.linalg.solve(precision, torch.randn(dim, num_chains, **F64)).T + exact.mean
    noise = ChainNoise(0, 0, (num_chains, dim), "cpu", torch.float64)
    chain = run_chain(lambda z: model.log_joint(x.expand(len(z), -1, -1), z), start, sampler, noise, q=q)
    covariance = root[:, None] * torch.linalg.inv(scaled @ (2 * torch.eye(dim, **F64) - step_size * scaled)) * 2 * root
    torch.testing.assert_close(chain.z.var(0), covariance.diagonal(), rtol=5 * math.sqrt(2 / num_chains), atol=0)
    states = model.run(chain.z).states.detach()
    to_states, _, _, _ = linear_maps(model)
    error = (to_states @ covariance @ to_states.T).diagonal().div(num_chains).sqrt().view(4, -1)
    assert ((states.mean(0) - means[0]).abs() < 5 * error).all()
    assert (covariance.diagonal() > 1.05 * exact.covariance_matrix[0].diagonal()).any()  # the bias is really tested


def test_free_q_reaches_the_best_factorised_q_on_every_trial():
    """E-steps alone: each trial's ELBO comes within 0.02 nats of log p - gap, and above an amortised q's."""
    model = lds(encoder="free", num_train=4)
    x = series(model, 4)
    batch = Batch(x, torch.arange(4))
    table = model.build_encoder().double()
    learner = Learner(model, table, NoSteps(None, None), VariationalEM(30, 4), AdamOptimizer(1e-3, [0.9, 0.999], 1e-8))
    before = [parameter.clone() for parameter in model.parameters()]
    for update, rate in enumerate([0.05] * 5 + [0.01] * 5 + [0.001] * 5):
        learner.phi_optimizer.param_groups[0]["lr"] = rate
        learner.gradients(batch, 0, update, False)  # the E-steps; θ's step is never applied
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))
    best = linear_gaussian.log_likelihood(model, x) - kalman.approximation_gap(model)
    with torch.no_grad():
        free = exact_elbo(model, x, table(batch))
    assert (free <= best + 1e-9).all() and (free > best - 0.02).all()

    amortised = lds().build_encoder().double()
    learner = Learner(
        model, amortised, NoSteps(None, None), VariationalEM(20, 1), AdamOptimizer(1e-2, [0.9, 0.999], 1e-8)
    )
    for update in range(5):
        learner.gradients(batch, 1, update, False)
    with torch.no_grad():
        assert (exact_elbo(model, x, amortised(batch)) < free).all()


@pytest.mark.slow
def test_a_table_with_block_covariances_reaches_the_best_of_its_family():
    """Its gap is ½ (Σ log det Λ_bb - log det Λ) over blocks b, less than the factorised one; within 0.03 nats."""
    model = lds(encoder="free_block", num_train=4)
    with torch.no_grad():  # the two states are seen almost as their sum, so that u_t is strongly correlated
        model.readout.weight.mul_(2)[:, 1] = 0.8 * model.readout.weight[:, 0]
    x = series(model, 4)
    batch, table = Batch(x, torch.arange(4)), model.build_encoder().double()
    learner = Learner(model, table, NoSteps(None, None), VariationalEM(60, 4), AdamOptimizer(1e-3, [0.9, 0.999], 1e-8))
    for update, rate in enumerate([0.05] * 5 + [0.01] * 5 + [0.001] * 5):
        learner.phi_optimizer.param_groups[0]["lr"] = rate
        learner.gradients(batch, 0, update, False)
    posterior = linear_gaussian.posterior(model, x)
    precision = posterior.precision_matrix[0]
    blocks = [slice(t, t + 2) for t in range(0, model.latent_dim, 2)]  # z_0 and every u_t have two coordinates
    gap = 0.5 * (sum(torch.logdet(precision[b, b]) for b in blocks) - torch.logdet(precision))
    best = linear_gaussian.log_likelihood(model, x) - gap
    with torch.no_grad():
        q = table(batch)
        factor = torch.stack([torch.block_diag(*q.factors[0][i], *q.factors[1][i]) for i in range(4)])
        dense = MultivariateNormal(q.mean, scale_tril=factor)
        elbo = linear_gaussian.log_likelihood(model, x) - kl_divergence(dense, posterior)
        z = torch.randn(4, model.latent_dim, **F64)
        torch.testing.assert_close(q.log_prob(z), dense.log_prob(z))
        torch.testing.assert_close(q.variance, dense.variance)
        torch.testing.assert_close(q.rsample(z), q.mean + (factor @ z[..., None])[..., 0])
        prior = MultivariateNormal(torch.zeros_like(z), torch.eye(model.latent_dim, **F64))
        torch.testing.assert_close(q.kl(model.prior), kl_divergence(dense, prior))
    assert (elbo <= best + 1e-9).all() and (elbo > best - 0.03).all()
    assert gap < kalman.approximation_gap(model) - 0.3


def posterior_of_states(model, x):
    """p(x_0, ..., x_T | y): the dense posterior of z through the model's own map from z to states."""
    exact = linear_gaussian.posterior(model, x)
    to_states, offset, _, _ = linear_maps(model)
    spread, start = model.initial_map.weight.detach(), model.initial_map.bias.detach()
    first = torch.cat([spread, torch.zeros(len(start), model.latent_dim - len(start), **F64)], 1)
    to_states, offset = torch.cat([first, to_states]), torch.cat([start, offset])
    return MultivariateNormal(exact.mean @ to_states.T + offset, to_states @ exact.covariance_matrix @ to_states.T)


@torch.no_grad()
def exact_m_step(model, x, posterior):
    """θ that maximises E_q[log p(x_0, ..., x_T, y)]: regressions on expected second moments."""
    num_trials, num_steps, _ = x.shape
    mean, covariance, dim = posterior.mean, num_trials * posterior.covariance_matrix[0], 2
    at = [slice(t * dim, (t + 1) * dim) for t in range(num_steps + 1)]
    ones = torch.ones(num_trials, 1, **F64)

    def moment(t):  # Σ E[(x_t, 1)(x_t, 1)ᵀ]
        point = torch.cat([mean[:, at[t]], ones], 1)
        total = point.T @ point
        total[:dim, :dim] += covariance[at[t], at[t]]
        return total

    centre = mean[:, at[0]].mean(0)
    difference = mean[:, at[0]] - centre
    scatter = (covariance[at[0], at[0]] + difference.T @ difference) / num_trials
    model.initial_map.bias.copy_(centre)
    model.initial_map.weight.copy_(torch.linalg.cholesky(scatter))

    # Dynamics: regression of x_t on (x_{t-1}, 1).
    cross = torch.zeros(dim, dim + 1, **F64)
    for t in range(1, num_steps + 1):
        cross += mean[:, at[t]].T @ torch.cat([mean[:, at[t - 1]], ones], 1)
        cross[:, :dim] += covariance[at[t], at[t - 1]]
    solution = torch.linalg.solve(sum(map(moment, range(num_steps))), cross.T).T
    model.generator.transition.weight.copy_(solution[:, :dim])
    model.generator.transition.bias.copy_(solution[:, dim])
    later = sum(map(moment, range(1, num_steps + 1)))
    noise = (later[:dim, :dim] - solution @ cross.T) / (num_trials * num_steps)
    model.generator.input_map.weight.copy_(torch.linalg.cholesky((noise + noise.T) / 2))

    # Emission: regression of y_t on (x_t, 1), and σ².
    cross = sum(x[:, t - 1].T @ torch.cat([mean[:, at[t]], ones], 1) for t in range(1, num_steps + 1))
    solution = torch.linalg.solve(later, cross.T).T
    model.readout.weight.copy_(solution[:, :dim])
    model.readout.bias.copy_(solution[:, dim])
    model.likelihood.log_scale.copy_(0.5 * ((x.square().sum() - (solution * cross).sum()) / x.numel()).log())


def test_exact_em_raises_the_bound_monotonically():
    """log p before <= the bound after the M-step <= log p after, whose E-step closes the bound again."""
    truth, model = lds(num_steps=8), lds(num_steps=8)
    x = series(truth, 40)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    values = [linear_gaussian.log_likelihood(model, x).sum().item()]
    for _ in range(15):
        q = posterior_of_states(model, x)
        exact_m_step(model, x, q)
        after = linear_gaussian.log_likelihood(model, x).sum()
        divergence = kl_divergence(q, posterior_of_states(model, x)).sum()
        values += [(after - divergence).item(), after.item()]
    assert all(after > before - 1e-7 for before, after in pairwise(values))
    assert values[-1] > values[0] + 100
