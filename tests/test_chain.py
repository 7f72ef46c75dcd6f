"""The chain against closed forms: stationary moments, the linear posterior, what a batch may share."""

import math
import weakref

import pytest
import torch

from lpc_runner.base.distributions import Gaussian
from lpc_runner.inference.chain import ChainNoise, FusedPotential, Moments, run_chain
from lpc_runner.inference.preconditioning import Adam, Fisher, Identity, SharedAdam
from lpc_runner.inference.samplers import NOISE_BLOCK, Langevin, Map, NoSteps
from lpc_runner.inference.step_sizes import Constant, Polynomial
from lpc_runner.models.dense import MLP, Linear


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def gaussian(curvatures):
    """log p = -½ Σ λ z², axis-aligned."""
    curvatures = torch.as_tensor(curvatures)
    return lambda z: -0.5 * (curvatures.to(z) * z.square()).sum(1)


def langevin(num_steps, step_size, preconditioner=None, theta_states="all"):
    return Langevin(num_steps, theta_states, Constant(step_size), preconditioner or Identity())


def run(log_joint, z, sampler, seed=0, on_step=None, **kwargs):
    noise = ChainNoise(seed, 0, tuple(z.shape), "cpu", z.dtype)
    return run_chain(log_joint, z, sampler, noise, on_step=on_step, **kwargs)


def ula_variance(curvature, step_size):
    """2 / (λ(2 - γλ)): the fixed point of v = (1 - γλ)² v + 2γ."""
    return 2 / (curvature * (2 - step_size * curvature))


# Relative standard error of a variance from N independent normals: sqrt(2/N). N = 100 000: 0.45 %.
NUM_CHAINS, FIVE_SIGMA = 100_000, 5 * math.sqrt(2 / 100_000)
CURVATURES = torch.tensor([1.0, 5.0, 10.0, 17.0])


def test_stationary_variance_of_plain_langevin():
    """Independent chains reach 2/(λ(2 - γλ)) and mean 0: |1 - γλ| <= 0.9 leaves 0.9^160 of the start."""
    chain = run(gaussian(CURVATURES), torch.zeros(NUM_CHAINS, 4), langevin(80, 0.1))
    want = ula_variance(CURVATURES, 0.1)
    torch.testing.assert_close(chain.z.var(0), want, rtol=FIVE_SIGMA, atol=0)
    assert (chain.z.mean(0).abs() < 5 * (want / NUM_CHAINS).sqrt()).all()


def test_stationary_distribution_is_invariant():
    """Started at its stationary distribution, every later step has the same variance."""
    sd = ula_variance(CURVATURES, 0.1).sqrt()
    seen = []
    run(
        gaussian(CURVATURES),
        torch.randn(NUM_CHAINS, 4) * sd,
        langevin(5, 0.1),
        on_step=lambda state, _: seen.append(state.z.var(0)),
    )
    for variance in seen:
        torch.testing.assert_close(variance, sd.square(), rtol=FIVE_SIGMA, atol=0)


def test_stability_bound():
    """Stable iff γλ < 2: at 1.99 the variance nears its limit 1/(λ·0.005), at 2.01 it grows as 1.01^2T."""
    chain = run(gaussian([1.99, 2.01]), torch.zeros(500, 2, dtype=torch.float64), langevin(1500, 1.0))
    inside, outside = chain.z.var(0).tolist()
    assert inside < 1.5 * ula_variance(1.99, 1.0)
    assert outside == pytest.approx(2 * (1.01**3000 - 1) / (1.01**2 - 1), rel=0.4)  # 500 chains: 6.3 % each sd


def test_shared_preconditioner_variance():
    """Variance s²/λ, s = (γ√λ + √(γ²λ + 16))/4: G = 1/(λ sd) in v = 2/(λ(2 - γGλ))."""
    curvatures = torch.tensor([1.0, 100.0, 1000.0])
    z = torch.randn(NUM_CHAINS, 3) / curvatures.sqrt()
    chain = run(gaussian(curvatures), z, langevin(80, 0.1, SharedAdam(0.9, 1e-8, None)))
    s = (0.1 * curvatures.sqrt() + (0.01 * curvatures + 16).sqrt()) / 4
    torch.testing.assert_close(chain.z.var(0), s.square() / curvatures, rtol=FIVE_SIGMA, atol=0)


@pytest.mark.parametrize("step_size", [0.02, 0.5])
def test_fisher_gives_every_curvature_the_same_step(step_size):
    """m goes to E[g²] = λ² v, v = 2/(λ(2 - γ')), γ' = γλG, G = 1/(m + 1): from curvature 1 to 10^4 by one γ.

    So m = 2λ/(2 - γλ/(m + 1)), λ(1 + γ/2) where λ is large: λ as γ -> 0, which is Fisher's identity. Every chain
    starts where the one before ended.
    """
    curvatures = torch.tensor([1.0, 100.0, 1e4], dtype=torch.float64)
    want = curvatures.clone()
    for _ in range(100):
        want = 2 * curvatures / (2 - step_size * curvatures / (want + 1))
    fisher = Fisher(0.8, 1.0)
    sampler, seen = langevin(20, step_size, fisher), []
    z = torch.randn(4000, 3, dtype=torch.float64) / curvatures.sqrt()
    for update in range(24):
        chain = run(gaussian(curvatures), z, sampler, seed=update)
        fisher.observe(fisher.contribution(chain))
        z = chain.z
        seen.append(fisher.second_moment[0])
    within = 5 * math.sqrt(2 / len(z))
    torch.testing.assert_close(torch.stack(seen[-5:]).mean(0), want, rtol=within, atol=0)
    torch.testing.assert_close(z.var(0), want / curvatures.square(), rtol=within, atol=0)
    effective = step_size * curvatures / (want + 1)
    torch.testing.assert_close(want / curvatures.square(), 2 / (curvatures * (2 - effective)))
    assert (z.mean(0).abs() * curvatures.sqrt() < 5 * (2 / len(z)) ** 0.5).all()
    assert want[2] / curvatures[2] == pytest.approx(1 + step_size / 2, rel=1e-3)  # where 1/s² is nothing


def test_fisher_by_hand():
    """The first batch sets m, over batch, steps and the past; until then a chain stays where it starts."""
    curvatures = torch.tensor([2.0, 3.0], dtype=torch.float64)
    fisher, seen = Fisher(0.75, 2.0), []
    sampler = langevin(4, 0.1, fisher)
    start = torch.randn(5, 2, dtype=torch.float64)
    first = run(gaussian(curvatures), start, sampler)
    torch.testing.assert_close(first.z, start)
    torch.testing.assert_close(first.drift_square, (curvatures * start).square().mean(0, keepdim=True))
    fisher.observe(fisher.contribution(first))
    second = run(gaussian(curvatures), start, sampler, on_step=lambda state, info: seen.append(info))
    drifts = torch.stack([info.drift for info in seen])
    variances = torch.stack([info.noise_variance for info in seen])
    scale = 1 / (first.drift_square + 0.25)
    torch.testing.assert_close(variances, (0.2 * scale).expand_as(variances))
    torch.testing.assert_close(second.drift_square[0], drifts.square().mean((0, 1)))
    fisher.observe(fisher.contribution(second))
    want = 0.75 * first.drift_square + 0.25 * second.drift_square
    torch.testing.assert_close(fisher.second_moment, want)
    logged = fisher.scalars()
    torch.testing.assert_close(list(logged.values()), [want.min(), want.max()])
    other = Fisher(0.75, 2.0)
    other.load_state_dict(fisher.state_dict())
    assert torch.equal(other.init(start), 1 / (want + 0.25))


def test_per_sample_preconditioner_inflates_the_variance():
    """γ = .1, β = .25: stationary variance 2.86 times the target's at λ = 100, 5.55 times at λ = 1000.

    The numbers are those of 50 000 scalar chains of 3200 steps written in numpy. It takes some 600 steps
    until the few chains that a tiny first gradient threw up to 300 sd away (m̂ = |g| at t = 1) are back, as
    G g = ±1 is 0.1 per step.
    """
    curvatures = torch.tensor([100.0, 1000.0])
    z = torch.randn(30_000, 2) / curvatures.sqrt()
    seen = []
    run(
        gaussian(curvatures),
        z,
        langevin(800, 0.1, Adam(0.25, 1e-8, None)),
        on_step=lambda state, _: seen.append(state.z.var(0)),
    )
    ratio = torch.stack(seen[700:]).mean(0) * curvatures
    assert ratio.tolist() == pytest.approx([2.86, 5.55], rel=0.02)


def test_per_sample_preconditioner_doubles_the_variance_of_a_fine_chain():
    """γ -> 0: G = 1/|g|, and without the Γ term the chain samples p/G ~ |z| exp(-λz²/2): variance 2/λ.

    Chains start at that density (sign times Rayleigh) and stay; 1500 steps of 10 000 chains err by < 1 %.
    """
    start = torch.randn(10_000, 2).norm(dim=1, keepdim=True) * torch.randn(10_000, 1).sign()
    seen = []
    run(
        gaussian([1.0]),
        start,
        langevin(1500, 0.01, Adam(0.25, 1e-8, None)),
        on_step=lambda state, _: seen.append(state.z.var(0)),
    )
    assert torch.stack(seen).mean().item() == pytest.approx(2, rel=0.03)


def test_linear_posterior():
    """Linear model: chains have the posterior's mean, and covariance 2 (P(2I - γP))⁻¹, P the precision."""
    model = Linear((5,), 2, 1.0, Gaussian("fixed", 0.7, 0.9), 0.3)
    x = torch.randn(1, 5).expand(30_000, 5)
    posterior = model.posterior(x[:1])
    precision = posterior.precision_matrix[0]
    chain = run(lambda z: model.log_joint(x, z), torch.randn(30_000, 2), langevin(150, 0.1))
    covariance = 2 * torch.linalg.inv(precision @ (2 * torch.eye(2) - 0.1 * precision))
    scale = covariance.diagonal().sqrt().outer(covariance.diagonal().sqrt())
    assert ((chain.z.T.cov() - covariance).abs() / scale).max() < 5 * math.sqrt(2 / 30_000)
    error = (chain.z.mean(0) - posterior.mean[0]).abs() / covariance.diagonal().sqrt()
    assert error.max() < 5 / math.sqrt(30_000)


def test_map_finds_the_mode():
    """Without noise the chain converges to the linear model's posterior mode."""
    model = Linear((5,), 2, 1.0, Gaussian("fixed", 0.7, 0.9), 0.3).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    sampler = Map(400, "last", Constant(0.1), Identity())
    chain = run(lambda z: model.log_joint(x, z), torch.randn(6, 2, dtype=torch.float64), sampler)
    torch.testing.assert_close(chain.z, model.posterior(x).mean)
    assert (chain.trace["noise_variance"] == 0).all()


def test_identity_is_plain_langevin_bit_for_bit():
    """z + γ g + sqrt(2γ) ξ, the same float32 bits."""
    z = torch.randn(16, 4)
    chain = run(gaussian(CURVATURES), z, langevin(40, 0.07))
    noise = ChainNoise(0, 0, (16, 4), "cpu")
    for t in range(1, 41):
        z = z + 0.07 * (-CURVATURES * z) + (2 * 0.07) ** 0.5 * noise(t)
    assert torch.equal(chain.z, z)


def test_adam_is_the_bias_corrected_second_moment():
    """G(t) = 1/(sqrt(Σ_s β^(t-s) (1-β) g_s² / (1-β^t)) + eps); after freeze_after it no longer moves."""
    drifts = torch.randn(6, 8, 3, dtype=torch.float64)
    for metric, square in ((Adam, drifts.square()), (SharedAdam, drifts.square().mean(1, keepdim=True))):
        for freeze_after in (None, 4):
            adam = metric(0.8, 0.01, freeze_after)
            state = adam.init(drifts[0])
            for t in range(1, 7):
                state, scale = adam.update(state, drifts[t - 1], t)
                last = min(t, freeze_after or t)
                decay = torch.tensor([0.8 ** (last - s) for s in range(1, last + 1)], dtype=torch.float64)
                moment = (decay[:, None, None] * square[:last]).sum(0) / decay.sum()
                torch.testing.assert_close(scale, 1 / (moment.sqrt() + 0.01))


def test_a_frozen_scale_is_bounded_by_eps_alone():
    """A drift near 0 until G is frozen leaves that coordinate with G = 1/eps, whatever its drift is later."""
    adam = Adam(0.25, 0.01, 1)
    state, _ = adam.update(adam.init(torch.zeros(1, 2)), torch.tensor([[1e-12, 1.0]]), 1)
    _, later = adam.update(state, torch.full((1, 2), 50.0), 2)
    torch.testing.assert_close(later, torch.tensor([[1 / 0.01, 1 / 1.01]]))


def test_step_sizes():
    """γ(t) = value (1 + (t-1)/offset)^-power, used at its own step: the noise variance is 2γ(t)."""
    sampler = Langevin(25, "all", Polynomial(0.2, 10.0, 0.5), Identity())
    chain = run(gaussian([1.0]), torch.zeros(2, 1), sampler)
    want = [0.4 * (10 / (10 + t)) ** 0.5 for t in range(25)]
    assert chain.trace["noise_variance"].tolist() == pytest.approx(want)


def test_noise_is_named_by_step_and_sample():
    """ξ(t) is the same whatever was asked before, and a slice of rows gets those rows of the whole batch."""
    ahead, straight = ChainNoise(3, 7, (6, 2), "cpu"), ChainNoise(3, 7, (6, 2), "cpu")
    part = ChainNoise(3, 7, (6, 2), "cpu", rows=slice(2, 5))
    sequence = [straight(t) for t in range(1, 2 * NOISE_BLOCK + 3)]
    for t in (2 * NOISE_BLOCK + 1, NOISE_BLOCK, NOISE_BLOCK + 1, 1):
        assert torch.equal(ahead(t), sequence[t - 1])
        assert torch.equal(part(t), sequence[t - 1][2:5])
    every = torch.stack(sequence)
    assert len(every.unique()) == every.numel()  # no draw twice
    for other in (ChainNoise(3, 8, (6, 2), "cpu"), ChainNoise(4, 7, (6, 2), "cpu")):
        assert not torch.equal(other(1), sequence[0])


def test_chains_of_a_batch_are_independent_unless_the_metric_is_shared():
    """Moving one sample's start changes its own chain only; under SharedAdam it changes the others'."""
    start = torch.randn(8, 4)
    moved = start.clone()
    moved[5] += 3
    others = [0, 1, 2, 3, 4, 6, 7]
    for metric, independent in (
        (Identity(), True),
        (Adam(0.5, 1e-8, None), True),
        (SharedAdam(0.5, 1e-8, None), False),
    ):
        sampler = langevin(10, 0.05, metric)
        one, two = (run(gaussian(CURVATURES), z, sampler).z for z in (start, moved))
        assert torch.equal(one[others], two[others]) == independent
        assert not torch.equal(one[5], two[5])


@pytest.fixture
def mlp():
    return MLP((1, 3, 3), 4, 1.0, Gaussian("learned", 0.5, 0.9), 0.3, [6]).double()


def test_fused_backward_equals_separate_ones(mlp):
    """Value, drift and the sum over calls of ∇θ, each against its own autograd pass."""
    x, theta = torch.randn(5, 1, 3, 3, dtype=torch.float64), list(mlp.parameters())
    potential = FusedPotential(lambda z: mlp.log_joint(x, z), theta)
    sums = [torch.zeros_like(parameter) for parameter in theta]
    for accumulate in (True, False, True):
        z = torch.randn(5, 4, dtype=torch.float64)
        value, drift = potential(z, accumulate)
        point = z.clone().requires_grad_()
        torch.testing.assert_close(value, mlp.log_joint(x, z).detach())
        torch.testing.assert_close(drift, torch.autograd.grad(mlp.log_joint(x, point).sum(), point)[0])
        if accumulate:
            for total, gradient in zip(sums, torch.autograd.grad(mlp.log_joint(x, z).sum(), theta)):
                total.add_(gradient)
    torch.testing.assert_close(potential.sums, sums)
    assert all(parameter.grad is None for parameter in theta)


@pytest.mark.parametrize("theta_states", ["all", "last", "none"])
def test_chain_gathers_what_its_states_say(mlp, theta_states):
    """θ's gradient, moments, trace, first and number of evaluations, from the states an observer kept."""
    x, z = torch.randn(5, 1, 3, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    centre = torch.randn(5, 4, dtype=torch.float64)
    theta, seen = list(mlp.parameters()), []
    metric = Adam(0.5, 1e-8, None)
    sampler = NoSteps(None, None) if theta_states == "none" else langevin(6, 0.02, metric, theta_states)
    log_joint = lambda z: mlp.log_joint(x, z)
    chain = run(log_joint, z, sampler, on_step=lambda *both: seen.append(both), parameters=theta, centre=centre)
    states = [z, *(state.z for state, _ in seen)]
    assert [state.t for state, _ in seen] == list(range(1, sampler.num_steps + 1))
    assert torch.equal(chain.z, states[-1]) and not chain.z.requires_grad
    used = states[:-1] if theta_states == "all" else states[-1:]
    mean = torch.stack([log_joint(state).mean() for state in used]).mean()
    torch.testing.assert_close(chain.theta_gradient, list(torch.autograd.grad(mean, theta)))
    assert chain.num_evaluations == 5 * (6 if theta_states == "all" else len(states))
    differences = torch.stack(states)[1:] - centre
    torch.testing.assert_close(chain.moments.first, differences.sum(0))
    torch.testing.assert_close(chain.moments.second, differences.square().sum(0))
    assert chain.moments.count == len(states) - 1
    point = z.clone().requires_grad_()
    (drift,) = torch.autograd.grad(log_joint(point).sum(), point)
    torch.testing.assert_close(chain.first, (log_joint(z).detach(), drift))
    for index, (_, info) in enumerate(seen):
        torch.testing.assert_close(info.log_joint, log_joint(states[index]).detach())
        torch.testing.assert_close(chain.trace["log_joint"][index], info.log_joint.mean())
        torch.testing.assert_close(chain.trace["drift_norm"][index], info.drift.norm(dim=1).mean())
        assert chain.trace["noise_variance"][index] == info.noise_variance.max()


def test_moments_keep_the_variance_in_float32():
    """At mean 2, sd .01 the variance is exact to 1e-3; raw sums in float32 would err by more than 2 %."""
    states = 2 + 0.01 * torch.randn(2000, 64, 4, dtype=torch.float64)
    moments, raw_first, raw_second = (
        Moments(torch.full((64, 4), 2.01)),
        torch.zeros(64, 4),
        torch.zeros(64, 4),
    )
    for z in states.float():
        moments.add(z[None])
        raw_first, raw_second = raw_first + z, raw_second + z.square()
    want = states.float().double().var(0, correction=0)
    got = moments.second / 2000 - (moments.first / 2000).square()
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=0)
    raw = raw_second / 2000 - (raw_first / 2000).square()
    assert ((raw - want).abs() / want).max() > 0.02


def test_memory_does_not_grow_with_the_number_of_steps(mlp):
    """Of all states, drifts and densities along the way only those of the first and the last step live on."""
    x = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    for num_steps in (5, 80):
        seen, most = [], []

        def observe(state, info, seen=seen, most=most):
            seen.extend(map(weakref.ref, (state.z, state.metric, info.log_joint, info.drift, info.noise_variance)))
            most.append(sum(reference() is not None for reference in seen))

        sampler = langevin(num_steps, 0.02, Adam(0.5, 1e-8, None))
        start = torch.randn(5, 4, dtype=torch.float64)
        theta = list(mlp.parameters())
        chain = run(lambda z: mlp.log_joint(x, z), start, sampler, on_step=observe, parameters=theta)
        # one step's five, the first step's two, and what the loop has not yet let go of the step before
        assert max(most) <= 12 and len(chain.trace["log_joint"]) == num_steps


def test_chains_of_another_purpose_draw_other_noise():
    """Of one seed and number: a chain that measures is not the chain of a training update again."""
    train, measure = (ChainNoise(3, 7, (2, 4), "cpu", stream=stream) for stream in ("chain", "posterior chain noise"))
    assert torch.equal(train(1), ChainNoise(3, 7, (2, 4), "cpu")(1)) and not torch.equal(train(1), measure(1))
